"""Which images a report shows side by side."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from .files import ImageSet, Pixels

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
    """Choose images evenly over both sets, by class when the classes of both are known and the same."""
    if real is None:
        return [GridRow(None, generated=_spread(range(len(generated.names)), PER_SET))]
    known = real.labels is not None and generated.labels is not None
    renamed = (
        None not in (real.class_names, generated.class_names) and real.class_names != generated.class_names
    )
    common = sorted(set(real.labels or ()) & set(generated.labels or ()))
    if not known or renamed or not common:
        return [
            GridRow(
                None,
                real=_spread(range(len(real.names)), PER_SET),
                generated=_spread(range(len(generated.names)), PER_SET),
            )
        ]
    names = real.class_names or generated.class_names
    return [
        GridRow(
            names[label] if names else f"class {label}",
            real=_spread(_members(real, label), PER_CLASS),
            generated=_spread(_members(generated, label), PER_CLASS),
        )
        for label in (common[index] for index in _spread(range(len(common)), NUM_CLASSES))
    ]


def make_picture(pixels: Pixels, name: str) -> Picture:
    """Encode an image, shrunk when it is large; small images keep their pixels."""
    image = Image.fromarray(pixels)
    image.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
    return Picture(name, f"data:image/png;base64,{encoded}", *image.size)


def _members(images: ImageSet, label: int) -> list[int]:
    return [index for index, other in enumerate(images.labels or ()) if other == label]


def _spread(indices: range | list[int], count: int) -> list[int]:
    """At most ``count`` of ``indices``, evenly spaced."""
    places = np.linspace(0, len(indices) - 1, min(count, len(indices))).round().astype(int)
    return [indices[place] for place in places]
