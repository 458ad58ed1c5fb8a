"""Which images and clips a report shows side by side."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from PIL import Image

from .sets.samples import Pixels, SampleSet, common_classes

T = TypeVar("T")

NUM_CLASSES = 10
PER_CLASS = 6
PER_SET = {"image": 48, "video": 12}
THUMBNAIL_SIZE = 160
FRAME_MILLISECONDS = 125


@dataclass(frozen=True)
class Picture:
    """A sample on the page.

    Args:
        name: of its file.
        data_uri: a PNG, or an animated WebP of a clip.
        width, height: of that in pixels.
        prompt: that it was generated from, as far as known.
    """

    name: str
    data_uri: str
    width: int
    height: int
    prompt: str | None = None


@dataclass(frozen=True)
class GridRow:
    """Indices of samples that are shown together: one class, or a whole set when classes are not known."""

    label: str | None
    real: list[int] = field(default_factory=list)
    generated: list[int] = field(default_factory=list)


def choose_rows(real: SampleSet | None, generated: SampleSet) -> list[GridRow]:
    """Choose samples evenly over both sets, and class by class when these are known of both."""
    classes = common_classes(real, generated)
    if real is not None and classes is not None:
        members = [
            _members(labels, samples) for labels, samples in zip(classes, (real, generated), strict=True)
        ]
        common = [name for name in members[0] if name in members[1]]
        return [
            GridRow(
                name,
                real=_spread(members[0][name], PER_CLASS),
                generated=_spread(members[1][name], PER_CLASS),
            )
            for name in _spread(common, NUM_CLASSES)
        ]
    indices = [
        range(len(samples.names)) if samples is not None else range(0) for samples in (real, generated)
    ]
    count = PER_SET[generated.kind.name]
    return [GridRow(None, real=_spread(indices[0], count), generated=_spread(indices[1], count))]


def take_pictures(samples: SampleSet | None, indices: set[int]) -> dict[int, Picture]:
    """Read samples once more and encode them, by index; without those that cannot be read."""
    pictures = {}
    for index, (name, read) in enumerate(
        zip(samples.names, samples.readers(), strict=True) if samples else ()
    ):
        if index in indices:
            with suppress(Exception):  # it was named when the set was passed over
                pictures[index] = make_picture(read(), name, samples.prompts.get(name) if samples else None)
    return pictures


def make_picture(pixels: Pixels, name: str, prompt: str | None = None) -> Picture:
    """Encode an image ``[H, W, 3]`` or a looping clip ``[F, H, W, 3]``; large ones are shrunk."""
    frames = [Image.fromarray(frame) for frame in (pixels if pixels.ndim == 4 else pixels[None])]
    exact = max(frames[0].size) <= THUMBNAIL_SIZE
    for frame in frames:
        frame.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if pixels.ndim == 3:
        kind = "png"
        frames[0].save(buffer, kind, optimize=True)
    else:
        kind = "webp"
        animation = {"save_all": True, "append_images": frames[1:], "duration": FRAME_MILLISECONDS, "loop": 0}
        frames[0].save(buffer, kind, lossless=exact, quality=80, **animation)
    encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
    return Picture(name, f"data:image/{kind};base64,{encoded}", *frames[0].size, prompt)


def _members(classes: list[str], samples: SampleSet) -> dict[str, list[int]]:
    """Indices of the samples of each class, classes in the order of their ids."""
    members: dict[str, list[int]] = {}
    for index in sorted(range(len(classes)), key=(samples.labels or ()).__getitem__):
        members.setdefault(classes[index], []).append(index)
    return members


def _spread(items: Sequence[T], count: int) -> list[T]:
    """At most ``count`` of ``items``, evenly spaced."""
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[place] for place in places]
