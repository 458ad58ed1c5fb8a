"""Which images a report shows side by side."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from .files import ImageSet, Pixels

T = TypeVar("T")

NUM_CLASSES = 10
PER_CLASS = 6
PER_SET = 48
THUMBNAIL_SIZE = 160


@dataclass(frozen=True)
class Picture:
    """An image on the page: the name of its file, a PNG as data URI, and the size of that in pixels."""

    name: str
    data_uri: str
    width: int
    height: int


@dataclass(frozen=True)
class GridRow:
    """Indices of images that are shown together: one class, or a whole set when classes are not known."""

    label: str | None
    real: list[int] = field(default_factory=list)
    generated: list[int] = field(default_factory=list)


def choose_rows(real: ImageSet | None, generated: ImageSet) -> list[GridRow]:
    """Choose images evenly over both sets, and class by class when the classes of both are known.

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
    indices = [range(len(images.names)) if images is not None else range(0) for images in (real, generated)]
    return [GridRow(None, real=_spread(indices[0], PER_SET), generated=_spread(indices[1], PER_SET))]


def make_picture(pixels: Pixels, name: str) -> Picture:
    """Encode an image, shrunk when it is large; small images keep their pixels."""
    image = Image.fromarray(pixels)
    image.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
    return Picture(name, f"data:image/png;base64,{encoded}", *image.size)


def _members(images: ImageSet, by_name: bool) -> dict[Any, list[int]]:
    """Indices of the images of each class (its name, or its id), classes in the order of their ids."""
    members: dict[int, list[int]] = {}
    for index, label in enumerate(images.labels or ()):
        members.setdefault(label, []).append(index)
    ids = sorted(members)
    return {images.class_names.get(label) if by_name else label: members[label] for label in ids}


def _spread(items: Sequence[T], count: int) -> list[T]:
    """At most ``count`` of ``items``, evenly spaced."""
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[place] for place in places]
