"""Captioned videos from files and from moving digits, as samples for training.

A sample is ``{"samples": float32 [C, F, H, W] in [-1, 1], "caption": str}``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torchvision.transforms.v2.functional as tvf
from torch import Tensor

from mhla_diffusion.pipelines.sampling import DEFAULT_FPS

from ...files.clips import choose_clip
from ...files.pictures import WHITE, background_color
from ...files.videos import VIDEO_EXTENSIONS, Decoder, Frames, UnreadableVideoError, open_video
from ...processes import in_first_process
from .buckets import nearest_size
from .captions import Caption, draw_caption, read_captions
from .fingerprint import file_content, fingerprint, fingerprint_of, relative_names
from .shapes import Shape, read_shapes
from .sources import Source, SourceConfig
from .stream import UnreadableSampleError, from_pixels

logger = logging.getLogger(__name__)


@runtime_checkable
class CaptionedVideos(Protocol):
    """Videos that are read clip by clip."""

    captions: Sequence[Caption]

    def name(self, index: int) -> str:
        """Return what to call a video in a message."""
        ...

    def read(self, index: int, *, length: int, fps: float | None, start: float) -> Frames:
        """Read a clip, uint8 ``[F, H, W, 3]`` or gray ``[F, H, W]``; arguments as of ``choose_clip``.

        Raises:
            UnreadableVideoError: when it cannot be decoded or is too short.
        """
        ...

    def shapes(self) -> Sequence[Shape]:
        """Return height and width of each video in pixels."""
        ...


@dataclass(frozen=True)
class VideoFile:
    """File, or a part of one, and its caption.

    Args:
        path: of the file.
        caption: what it shows.
        first, last: frames that the part begins and ends with; to the end when None.
    """

    path: Path
    caption: Caption
    first: int = 0
    last: int | None = None


class VideoFiles:
    """Videos in files. Each is opened, read and closed by whoever loads the sample.

    Args:
        files: in the order of the samples.
        decoder, background: see :class:`FileSource`.
        index: where the shapes of the files are kept; None for nowhere.
    """

    def __init__(
        self,
        files: Sequence[VideoFile],
        *,
        decoder: Decoder = "auto",
        background: str = WHITE,
        index: Path | None = None,
    ) -> None:
        self.files, self.decoder, self.background, self.index = list(files), decoder, background, index
        self.captions = [file.caption for file in self.files]

    @property
    def paths(self) -> list[str]:
        return [str(file.path) for file in self.files]

    def name(self, index: int) -> str:
        return str(self.files[index].path)

    def read(self, index: int, *, length: int, fps: float | None, start: float) -> Frames:
        file = self.files[index]
        reader = open_video(file.path, decoder=self.decoder, background=self.background)
        try:
            chosen = choose_clip(
                reader, length=length, fps=fps, start=start, first=file.first, last=file.last
            )
        except UnreadableVideoError as error:
            raise UnreadableVideoError(f"{file.path}: {error}") from error
        return reader.read(chosen)

    def rate(self, index: int) -> float:
        """Return the frames per second of a file."""
        return open_video(self.files[index].path, decoder=self.decoder).fps

    def fingerprint(self) -> str:
        names = relative_names([file.path for file in self.files])
        samples = [
            (name, file.caption, file.first, file.last) for name, file in zip(names, self.files, strict=True)
        ]
        return fingerprint(samples, lambda index: file_content(self.files[index].path))

    def shapes(self) -> list[Shape]:
        """Return height and width of each video in pixels, out of the index as far as it has them."""
        return read_shapes([file.path for file in self.files], self._shape, self.index)

    def _shape(self, index: int) -> Shape:
        try:
            return self.read(index, length=1, fps=None, start=0.0).shape[1:3]
        except UnreadableVideoError:
            return None  # named, skipped and counted when its turn comes


class VideoSource(Source):
    """Kind of source whose ``open()`` gives :class:`CaptionedVideos`, or samples that are ready."""


@dataclass(frozen=True, kw_only=True)
class ClipSource(VideoSource):
    """Videos that clips are taken out of.

    Args:
        frames: of a clip.
        sizes: height and width in pixels. With several, each clip goes to the one nearest to its own shape,
            and a batch has clips of one size. A clip is resized to cover its size and cropped at the centre.

    Raises:
        ValueError: for a value out of its range.
    """

    frames: int = 16
    sizes: tuple[tuple[int, int], ...] = ((64, 64),)

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise ValueError(f"data.frames must be positive, got {self.frames}")
        if not self.sizes or any(min(size) < 1 for size in self.sizes):
            raise ValueError(f"data.sizes must be pairs of height and width in pixels, got {self.sizes}")


@dataclass(frozen=True, kw_only=True)
class FileSource(ClipSource):
    """Videos in files.

    Args:
        fps: frames per second of a clip, chosen by the time at which they are shown; a file with fewer is
            named and skipped. Every frame of the file when not given.
        decoder: see :func:`mhla_diffusion.files.videos.open_video`.
        background: colour behind transparent pixels, by its name in CSS or as #rrggbb.

    Raises:
        ValueError: for a value out of its range.
    """

    fps: float | None = None
    decoder: Decoder = "auto"
    background: str = WHITE

    def __post_init__(self) -> None:
        super().__post_init__()
        background_color(self.background)
        if self.fps is not None and not self.fps > 0:
            raise ValueError(f"data.fps must be positive, got {self.fps}")


@dataclass(frozen=True)
class FolderVideos(FileSource):
    """Videos in a folder with a file of captions.

    Args:
        path: of the folder.
        captions: CSV with the columns path (or file_name), caption (or text) and perhaps weight, or JSON or
            JSONL with these keys; paths are relative to the folder and lie in it, and lines of one path are
            several captions. By default captions.csv or .jsonl in it, or else a .txt beside each video, each
            line a caption.
    """

    path: str
    captions: str | None = None

    def open(self) -> VideoFiles:
        listed = read_captions(Path(self.path), self.captions, extensions=VIDEO_EXTENSIONS)
        files = [VideoFile(*file) for file in listed]
        place = Path(self.captions or Path(self.path) / "captions")
        index = place.with_name(f"{place.name}.shapes.json")
        return VideoFiles(files, decoder=self.decoder, background=self.background, index=index)


class VideoSamples:
    """Clips of a fixed number of frames, resized, cropped and scaled to [-1, 1].

    Args:
        videos: where they come from.
        config: of a :class:`ClipSource`; says what a clip is.
        channels: 1 (gray) or 3 (RGB).

    Attributes:
        buckets: which of the sizes each video goes to; None when there is one size.

    Raises:
        ValueError: for another number of channels.
    """

    def __init__(self, videos: CaptionedVideos, config: SourceConfig, *, channels: int) -> None:
        if channels not in (1, 3):
            raise ValueError(f"videos have 1 or 3 channels, but model.in_channels is {channels}")
        self.videos, self.config, self.channels = videos, config, channels
        self.captions = videos.captions
        self.buckets = None
        if len(config.sizes) > 1:
            shapes = in_first_process(videos.shapes)
            self.buckets = [nearest_size(shape, config.sizes) for shape in shapes]

    def __len__(self) -> int:
        return len(self.captions)

    def name(self, index: int) -> str:
        return self.videos.name(index)

    def fingerprint(self) -> str | None:
        return fingerprint_of(self.videos)

    def warn_of_rates(self) -> None:
        """Say that clips have rates of their own, if so, and what a model makes of them another."""
        if self.config.fps is not None or not isinstance(self.videos, VideoFiles):
            return
        try:
            first = self.videos.rate(0)
        except UnreadableVideoError:
            return  # named, skipped and counted when its turn comes
        logger.warning(
            "data.fps is not given: clips have the rates of their files, the first %.4g frames a second, and "
            "what a model learns from them is written with %.4g; give data.fps to have one rate",
            first, DEFAULT_FPS,
        )  # fmt: skip

    def load(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        config, start = self.config, float(torch.rand((), generator=generator))
        try:
            frames = self.videos.read(index, length=config.frames, fps=config.fps, start=start)
        except UnreadableVideoError as error:
            raise UnreadableSampleError(str(error)) from error
        size = config.sizes[self.buckets[index] if self.buckets else 0]
        clip = prepare_clip(frames, size=size, channels=self.channels)
        caption = draw_caption(self.captions[index], generator)
        return {"samples": from_pixels(clip).transpose(0, 1), "caption": caption}


def prepare_clip(frames: Frames, *, size: tuple[int, int], channels: int) -> Tensor:
    """Resize uint8 ``[F, H, W, 3]`` or ``[F, H, W]`` to cover ``size``, crop: ``[F, C, *size]``, 0 to 255."""
    clip = torch.from_numpy(frames).unsqueeze(-1) if frames.ndim == 3 else torch.from_numpy(frames)
    clip = clip.movedim(-1, 1)
    if clip.shape[1] != channels:
        clip = tvf.rgb_to_grayscale(clip) if channels == 1 else clip.expand(-1, 3, -1, -1)
    scale = max(size[0] / clip.shape[2], size[1] / clip.shape[3])
    cover = [max(side, round(scale * old)) for side, old in zip(size, clip.shape[2:], strict=True)]
    if cover != list(clip.shape[2:]):
        clip = tvf.resize(clip, cover, tvf.InterpolationMode.BICUBIC, antialias=True)
    return tvf.center_crop(clip, list(size)).float()
