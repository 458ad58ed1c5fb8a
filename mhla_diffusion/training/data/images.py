"""Images of classes or with captions, read one by one, as samples for training.

A sample is ``{"samples": float32 [C, H, W] in [-1, 1]}`` and ``"class_labels": int`` or ``"caption": str``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torchvision.transforms.v2.functional as tvf
from PIL import Image

from ...files.pictures import DECODING_ERRORS, WHITE, flat_picture, open_picture, read_picture
from ...processes import in_first_process
from .buckets import Size, nearest_size
from .captions import Caption, draw_caption, warn_of_sides
from .fingerprint import file_content, fingerprint, fingerprint_of, relative_names
from .shapes import Shape, measured, read_shapes
from .stream import UnreadableSampleError, from_pixels

logger = logging.getLogger(__name__)

_ORIENTATION = 0x0112  # of EXIF
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

    def shapes(self) -> Sequence[Shape]:
        """Return height and width of each image in pixels."""
        ...

    def read(self, index: int) -> Image.Image:
        """Read an image, of 8 bits in mode L or RGB."""
        ...


@dataclass
class ArrayImages:
    """Images in memory.

    Args:
        images: uint8 ``[N, H, W, C]`` or ``[N, H, W]``; a second or fourth channel is alpha.
        labels: ``[N]``, 0 to ``len(class_names) - 1``.
        origin: what to call them.
        class_names: the labels as text by default.
        background: see :class:`.image_sources.PictureSource`.

    Raises:
        ValueError: for images that are not uint8 of that shape, or labels that are not as many.
    """

    images: np.ndarray
    labels: Any
    origin: str
    class_names: list[str] = field(default_factory=list)
    background: str = WHITE
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
        if self.labels.shape != shape[:1] or self.labels.dtype.kind not in "iu":
            raise ValueError(
                f"{self.origin}: labels must be {shape[0]} integers >= 0, got {self.labels.dtype} "
                f"{list(self.labels.shape)}"
            )
        require_labels(self.origin, self.labels.tolist())
        self.class_names = self.class_names or [str(i) for i in range(int(self.labels.max()) + 1)]

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"{self.origin}, image {index}"

    def shapes(self) -> list[Shape]:
        height, width = self.images.shape[1:3]
        return [(height, width)] * len(self)

    def read(self, index: int) -> Image.Image:
        return flat_picture(Image.fromarray(self.images[index]), self.background)

    def fingerprint(self) -> str:
        return fingerprint(self.labels.tolist(), lambda index: self.images[index].tobytes())


@dataclass
class ImageFiles:
    """Images in files.

    Args:
        files: their paths.
        labels, class_names, captions: see :class:`Images`.
        background: see :class:`.image_sources.PictureSource`.
        index: where the shapes of the files are kept; None for nowhere.
    """

    files: Sequence[str]
    labels: Sequence[int] | None = None
    class_names: list[str] = field(default_factory=list)
    captions: Sequence[Caption | None] | None = None
    background: str = WHITE
    index: Path | None = None

    def __len__(self) -> int:
        return len(self.files)

    @property
    def paths(self) -> Sequence[str]:
        return self.files

    def name(self, index: int) -> str:
        return self.files[index]

    def shapes(self) -> list[Shape]:
        return read_shapes([Path(file) for file in self.files], self._shape, self.index)

    def _shape(self, index: int) -> Shape:
        return shape_of(self.files[index])

    def read(self, index: int) -> Image.Image:
        return read_picture(self.files[index], self.background)

    def fingerprint(self) -> str:
        told = self.captions if self.labels is None else [self.class_names[label] for label in self.labels]
        samples = list(zip(relative_names(self.files), told or (), strict=True))
        return fingerprint(samples, lambda index: file_content(self.files[index]))


@dataclass
class ImageRows:
    """Images in the rows of a Hugging Face dataset.

    Args:
        path: what to call it.
        rows: the dataset, its images as they are stored.
        image_column: its name.
        labels, class_names, captions: see :class:`Images`.
    """

    path: str
    rows: Any
    image_column: str
    labels: Sequence[int] | None = None
    class_names: list[str] = field(default_factory=list)
    captions: Sequence[Caption | None] | None = None
    background: str = WHITE

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return f"{self.path}, row {index}"

    def shapes(self) -> list[Shape]:
        return list(measured(self._shape, range(len(self))))

    def _shape(self, index: int) -> Shape:
        return shape_of(self._file(index)) if self.rows[index][self.image_column] else None

    def _file(self, index: int) -> Any:
        image = self.rows[index][self.image_column]
        if image is None:
            raise ValueError("the row has no picture")
        return image["path"] if image["bytes"] is None else BytesIO(image["bytes"])

    def read(self, index: int) -> Image.Image:
        return read_picture(self._file(index), self.background)

    def fingerprint(self) -> str:
        def content(index: int) -> bytes:
            image = self.rows[index][self.image_column] or {"bytes": b"", "path": ""}
            return file_content(image["path"]) if image["bytes"] is None else image["bytes"]

        return fingerprint(list((self.captions if self.labels is None else self.labels) or ()), content)


def shape_of(file: Any) -> Shape:
    """Read height and width of a picture as a viewer shows it; None when it cannot be read."""
    try:
        with open_picture(file) as image:
            turned = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
            return (image.width, image.height) if turned else (image.height, image.width)
    except DECODING_ERRORS:
        return None


def require_labels(origin: str, labels: Sequence[Any], *, numbers: bool = True) -> None:
    """Check that every row has a label; data sets write None or -1 where there is none.

    Raises:
        ValueError: that names the first row without one.
    """
    without = [row for row, label in enumerate(labels) if label is None or (numbers and label < 0)]
    if without:
        more = f" (and {len(without) - 1:,} more rows have none)" if len(without) > 1 else ""
        raise ValueError(
            f"{origin}, row {without[0]}: the label is {labels[without[0]]}{more}; take out the rows without "
            "labels, or choose another split or file"
        )


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
        if flip:
            warn_of_sides(self.captions or ())
        self.buckets = self._choose_sizes() if len(self.sizes) > 1 else None

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return self.images.name(index)

    def fingerprint(self) -> str | None:
        return fingerprint_of(self.images)

    def load(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        size = self.sizes[self.buckets[index] if self.buckets else 0]
        try:
            image = self.images.read(index).convert(_MODES[self.channels])
            image = cover(image, size, enlarge=self.enlarge)
        except DECODING_ERRORS as error:
            raise UnreadableSampleError(f"{self.images.name(index)}: {error}") from error
        pixels = tvf.pil_to_tensor(image)
        if self.flip and torch.rand((), generator=generator) < 0.5:
            pixels = pixels.flip(-1)
        return {"samples": from_pixels(pixels), **self._told(index, generator)}

    def _told(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        if self.images.labels is not None:
            return {"class_labels": int(self.images.labels[index])}
        assert self.captions is not None, "images have classes or captions"
        caption = self.captions[index]
        if caption is None:
            raise UnreadableSampleError(f"{self.images.name(index)}: no caption")
        return {"caption": draw_caption(caption, generator)}

    def _choose_sizes(self) -> list[int]:
        shapes = in_first_process(self.images.shapes)
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


def cover(image: Image.Image, size: Size, *, enlarge: bool = True) -> Image.Image:
    """Resize an image to cover a size, and crop it there at both ends.

    Raises:
        ValueError: for one that is smaller, and not to be enlarged.
    """
    (height, width), (old_height, old_width) = size, (image.height, image.width)
    if not enlarge and _is_smaller((old_height, old_width), size):
        raise ValueError(
            f"{old_height} x {old_width} pixels are fewer than the {height} x {width} it goes to; "
            "data.enlarge true takes it"
        )
    if height * old_width >= width * old_height:
        whole = [height, max(width, int(height * old_width / old_height))]
    else:
        whole = [max(height, int(width * old_height / old_width)), width]
    if whole != [old_height, old_width]:
        image = tvf.resize(image, whole, tvf.InterpolationMode.BICUBIC)
    return tvf.center_crop(image, list(size))


def _is_smaller(shape: Size, size: Size) -> bool:
    return shape[0] < size[0] or shape[1] < size[1]
