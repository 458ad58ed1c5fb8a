"""Which images and clips a report shows side by side."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from .files import Pixels, SampleSet

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
    """Choose samples evenly over both sets, and class by class when the classes of both are known.

    Classes are matched by name when the sets have names in common, else by id.
    """
    if real is not None and real.labels is not None and generated.labels is not None:
        by_name = not set(real.class_names.values()).isdisjoint(generated.class_names.values())
        names = real.class_names | generated.class_names
        in_real, in_generated = _members(real, by_name), _members(generated, by_name)
        common = [key for key in in_real if key in in_generated and key is not None]
        if common:
            return [
                GridRow(
                    key if by_name else names.get(key, f"class {key}"),
                    real=_spread(in_real[key], PER_CLASS),
                    generated=_spread(in_generated[key], PER_CLASS),
                )
                for key in _spread(common, NUM_CLASSES)
            ]
    indices = [
        range(len(samples.names)) if samples is not None else range(0) for samples in (real, generated)
    ]
    count = PER_SET[generated.kind.name]
    return [GridRow(None, real=_spread(indices[0], count), generated=_spread(indices[1], count))]


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


def _members(samples: SampleSet, by_name: bool) -> dict[Any, list[int]]:
    """Indices of the samples of each class (its name, or its id), classes in the order of their ids."""
    members: dict[int, list[int]] = {}
    for index, label in enumerate(samples.labels or ()):
        members.setdefault(label, []).append(index)
    ids = sorted(members)
    return {samples.class_names.get(label) if by_name else label: members[label] for label in ids}


def _spread(items: Sequence[T], count: int) -> list[T]:
    """At most ``count`` of ``items``, evenly spaced."""
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[place] for place in places]
