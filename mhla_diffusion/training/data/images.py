"""Images of classes or with captions, read one by one, as samples for training.

A sample is ``{"samples": float32 [C, H, W] in [-1, 1]}`` and ``"class_labels": int`` or ``"caption": str``.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torchvision.transforms.v2.functional as tvf
from PIL import Image

from .buckets import Size, nearest_size, read_shapes
from .captions import Caption, draw_caption
from .stream import UnreadableSampleError

logger = logging.getLogger(__name__)

# What PIL raises for a file that is cut short, broken, no image, or absurdly large.
_DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
_MODES = {1: "L", 3: "RGB"}


@runtime_checkable
class Images(Protocol):
    """Images that are read one by one.

    Attributes:
        labels: class of each; None when they have captions.
        class_names: by their numbers.
        captions: of each, None where there is none; None when they have classes.
    """

    labels: Sequence[int] | None
    class_names: list[str]
    captions: Sequence[Caption | None] | None

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Return what to call an image in a message."""
        ...

    def size(self, index: int) -> Size:
        """Read height and width of an image, without its pixels."""
        ...

    def read(self, index: int) -> Image.Image:
        """Read an image."""
        ...


@dataclass
class ArrayImages:
    """Images in memory.

    Args:
        images: uint8 ``[N, H, W, C]`` or ``[N, H, W]``.
        labels: ``[N]``, 0 to ``len(class_names) - 1``.
        origin: what to call them.
        class_names: the labels as text by default.

    Raises:
        ValueError: for images that are not uint8 of that shape, or labels that are not as many.
    """

    images: np.ndarray
    labels: Any
    origin: str
    class_names: list[str] = field(default_factory=list)
    captions: None = None

    def __post_init__(self) -> None:
        shape = self.images.shape
        if self.images.dtype != np.uint8 or len(shape) not in (3, 4) or not len(self.images):
            raise ValueError(
                f"{self.origin}: images must be uint8 [N, H, W, C] or [N, H, W] with N > 0, got "
                f"{self.images.dtype} {list(shape)}"
            )
        if len(shape) == 4 and shape[-1] == 1:
            self.images = self.images[..., 0]
        if self.labels.shape != shape[:1] or self.labels.dtype.kind not in "iu" or self.labels.min() < 0:
            raise ValueError(
                f"{self.origin}: labels must be {shape[0]} integers >= 0, got {self.labels.dtype} "
                f"{list(self.labels.shape)}"
            )
        self.class_names = self.class_names or [str(i) for i in range(int(self.labels.max()) + 1)]

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"{self.origin}, image {index}"

    def size(self, index: int) -> Size:
        height, width = self.images.shape[1:3]
        return height, width

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index])


@dataclass
class ImageFiles:
    """Images in files.

    Args:
        files: their paths.
        labels, class_names, captions: see :class:`Images`.
    """

    files: Sequence[str]
    labels: Sequence[int] | None = None
    class_names: list[str] = field(default_factory=list)
    captions: Sequence[Caption | None] | None = None

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return self.files[index]

    def size(self, index: int) -> Size:
        with Image.open(self.files[index]) as image:
            return image.height, image.width

    def read(self, index: int) -> Image.Image:
        with Image.open(self.files[index]) as image:
            image.load()
        return image


@dataclass
class ImageRows:
    """Images in the rows of a Hugging Face dataset.

    Args:
        path: what to call it.
        rows: the dataset.
        image_column: its name.
        labels, class_names, captions: see :class:`Images`.
    """

    path: str
    rows: Any
    image_column: str
    labels: Sequence[int] | None = None
    class_names: list[str] = field(default_factory=list)
    captions: Sequence[Caption | None] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return f"{self.path}, row {index}"

    @cached_property
    def _encoded(self) -> Any:
        import datasets

        return self.rows.cast_column(self.image_column, datasets.Image(decode=False))

    def size(self, index: int) -> Size:
        stored = self._encoded[index][self.image_column]
        with Image.open(io.BytesIO(stored["bytes"]) if stored["bytes"] else stored["path"]) as image:
            return image.height, image.width

    def read(self, index: int) -> Image.Image:
        return self.rows[index][self.image_column]


class ImageSamples:
    """Images, resized, cropped and scaled to [-1, 1].

    Args:
        images: where they come from.
        channels: 1 (gray) or 3 (RGB); images are converted.
        sizes: height and width in pixels. With several, each image goes to the one nearest to its own shape.
            It is resized to cover its size, and cropped at both ends.
        flip: mirror with probability 1/2.
        enlarge: take images that are smaller than their size; otherwise they cannot be read.

    Attributes:
        buckets: which of the sizes each image goes to; None when there is one size.

    Raises:
        ValueError: for another number of channels.
    """

    def __init__(
        self,
        images: Images,
        *,
        channels: int,
        sizes: Sequence[Size],
        flip: bool = False,
        enlarge: bool = True,
    ) -> None:
        if channels not in _MODES:
            raise ValueError(
                f"images have 1 or 3 channels, but model.in_channels is {channels}; for latents, cache them "
                "with mhla cache-latents and set data.source to latents"
            )
        self.images, self.channels, self.sizes = images, channels, list(sizes)
        self.flip, self.enlarge = flip, enlarge
        self.class_names, self.captions = images.class_names, images.captions
        self.buckets = self._choose_sizes() if len(self.sizes) > 1 else None

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return self.images.name(index)

    def load(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        try:
            image = self.images.read(index).convert(_MODES[self.channels])
        except _DECODING_ERRORS as error:
            raise UnreadableSampleError(f"{self.images.name(index)}: {error}") from error
        size = self.sizes[self.buckets[index] if self.buckets else 0]
        if not self.enlarge and _is_smaller((image.height, image.width), size):
            raise UnreadableSampleError(
                f"{self.images.name(index)}: {image.height} x {image.width} pixels are fewer than the "
                f"{size[0]} x {size[1]} it goes to; data.enlarge true takes it"
            )
        pixels = tvf.pil_to_tensor(cover(image, size))
        if self.flip and torch.rand((), generator=generator) < 0.5:
            pixels = pixels.flip(-1)
        return {"samples": pixels.float() / 127.5 - 1, **self._told(index, generator)}

    def _told(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        if self.images.labels is not None:
            return {"class_labels": int(self.images.labels[index])}
        assert self.captions is not None, "images have classes or captions"
        caption = self.captions[index]
        if caption is None:
            raise UnreadableSampleError(f"{self.images.name(index)}: no caption")
        return {"caption": draw_caption(caption, generator)}

    def _choose_sizes(self) -> list[int]:
        shapes = read_shapes(self._shape, len(self.images), unit="image")
        buckets = [nearest_size(shape, self.sizes) for shape in shapes]
        small = [
            index
            for index, (shape, bucket) in enumerate(zip(shapes, buckets, strict=True))
            if shape is not None and _is_smaller(shape, self.sizes[bucket])
        ]
        if small and self.enlarge:
            logger.warning(
                "%d of %d images are smaller than the size they go to and are enlarged, first %s (%s pixels "
                "for %s); data.enlarge false leaves them out",
                len(small), len(shapes), self.images.name(small[0]), shapes[small[0]],
                self.sizes[buckets[small[0]]],
            )  # fmt: skip
        return buckets

    def _shape(self, index: int) -> Size | None:
        try:
            return self.images.size(index)
        except _DECODING_ERRORS:
            return None


def cover(image: Image.Image, size: Size) -> Image.Image:
    """Resize an image to cover a size, and crop it there at both ends."""
    (height, width), (old_height, old_width) = size, (image.height, image.width)
    if height * old_width >= width * old_height:
        whole = [height, max(width, int(height * old_width / old_height))]
    else:
        whole = [max(height, int(width * old_height / old_width)), width]
    if whole != [old_height, old_width]:
        image = tvf.resize(image, whole, tvf.InterpolationMode.BICUBIC)
    return tvf.center_crop(image, list(size))


def _is_smaller(shape: Size, size: Size) -> bool:
    return shape[0] < size[0] or shape[1] < size[1]
