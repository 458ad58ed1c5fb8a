"""Pictures of a report: which images and clips stand side by side, and how they are encoded."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from ...files.pages import data_uri, written
from ..measure import Pass
from ..scores.neighbours import Neighbourhoods
from ..sets.samples import Pixels, SampleSet, common_classes

T = TypeVar("T")

NUM_CLASSES = 10
PER_CLASS = 6
PER_SET = {"image": 48, "video": 12}
THUMBNAIL_SIZE = 160
FRAME_MILLISECONDS = 125
SHOWN = 12


@dataclass(frozen=True)
class Picture:
    """Sample on the page.

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
class PictureRow:
    """Real and generated samples of one class, or of the whole sets (``label`` None)."""

    label: str | None
    real: list[Picture]
    generated: list[Picture]


@dataclass(frozen=True)
class Neighbours:
    """Generated samples in the space of features.

    Args:
        closest: those nearest to a real sample, each with it; copies show here.
        best, worst: those of the highest and the lowest realism.
        realism: the median of all; 1 and more is as near to real samples as these are to each other.
    """

    closest: list[tuple[Picture, Picture]]
    best: list[Picture]
    worst: list[Picture]
    realism: float


@dataclass(frozen=True)
class GridRow:
    """Indices of samples that are shown together: one class, or a whole set when classes are not known."""

    label: str | None
    real: list[int] = field(default_factory=list)
    generated: list[int] = field(default_factory=list)


def show(
    real_set: SampleSet | None,
    generated_set: SampleSet,
    real: Pass,
    generated: Pass,
    found: Neighbourhoods | None,
) -> tuple[list[PictureRow], Neighbours | None]:
    """Encode what the page shows: both sets side by side, nearest neighbours, and extremes of realism.

    Args:
        real_set, generated_set: the sets; the real one None when it is known by its statistics alone.
        real, generated: what a pass over each found.
        found: neighbourhoods of the samples that were scored; None when no score needed them.
    """
    rows = choose_rows(real_set, generated_set)
    closest: list[tuple[int, int]] = []
    order: list[int] = []
    if found is not None:
        closest = [
            (generated.indices[i], real.indices[found.nearest[i]])
            for i in np.argsort(found.distance, kind="stable")[:SHOWN]
        ]
        order = [generated.indices[i] for i in np.argsort(-found.realism, kind="stable")]
    best, worst = order[:SHOWN], order[::-1][:SHOWN]
    shown_real = {i for row in rows for i in row.real} | {j for _, j in closest}
    shown = {i for row in rows for i in row.generated} | {i for i, _ in closest} | {*best, *worst}
    of_real, of_generated = take_pictures(real_set, shown_real), take_pictures(generated_set, shown)

    def those(pictures: dict[int, Picture], indices: Sequence[int]) -> list[Picture]:
        return [pictures[i] for i in indices if i in pictures]

    neighbours = None
    if found is not None:
        neighbours = Neighbours(
            closest=[(of_generated[i], of_real[j]) for i, j in closest if i in of_generated and j in of_real],
            best=those(of_generated, best),
            worst=those(of_generated, worst),
            realism=float(np.median(found.realism)),
        )
    pictures = [
        PictureRow(row.label, real=those(of_real, row.real), generated=those(of_generated, row.generated))
        for row in rows
    ]
    return pictures, neighbours


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
    kind, options = "png", dict[str, Any](optimize=True)
    if pixels.ndim == 4:
        kind = "webp"
        options = {
            "lossless": exact, "quality": 80, "save_all": True, "append_images": frames[1:],
            "duration": FRAME_MILLISECONDS, "loop": 0,
        }  # fmt: skip
    uri = data_uri(written(frames[0].save, kind, **options), kind)
    return Picture(name, uri, *frames[0].size, prompt)


def _members(classes: list[str], samples: SampleSet) -> dict[str, list[int]]:
    """Indices of the samples of each class, classes in the order of their ids."""
    members: dict[str, list[int]] = {}
    for index in sorted(range(len(classes)), key=(samples.labels or ()).__getitem__):
        members.setdefault(classes[index], []).append(index)
    return members


def _spread(items: Sequence[T], count: int) -> list[T]:
    """Choose at most ``count`` of ``items``, evenly spaced."""
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[place] for place in places]
