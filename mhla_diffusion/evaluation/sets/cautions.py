"""What has to be said of two sets beside their scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .samples import SampleSet, SetSummary, class_notes
from .videos import rate_notes

# Below this the bias of a Frechet distance is of the size of the differences people report.
MIN_SAMPLES = 2048


def set_notes(real: SampleSet | None, generated: SampleSet) -> list[str]:
    """Return what has to be said of the sets, known before they are read."""
    titled = (("Real", real), ("Generated", generated))
    notes = [f"{title} set: {note}" for title, its in titled if its is not None for note in its.notes]
    rates = rate_notes([] if real is None else real.frame_rates, generated.frame_rates)
    return notes + class_notes(real, generated) + rates


def require_apart(real: SampleSet | None, generated: SampleSet) -> None:
    """Refuse a folder of real samples in which the generated ones lie: they would be scored as real."""
    if real is None or not isinstance(generated.path, Path) or not isinstance(real.path, Path):
        return
    outer, inner = real.path.resolve(), generated.path.resolve()
    if inner == outer or not inner.is_relative_to(outer):
        return
    below = f"{inner.relative_to(outer).as_posix()}/"
    count = sum(name.startswith(below) for name in real.names)
    if count:
        raise ValueError(
            f"{generated.path} lies in {real.path}, so that {count:,} of its samples would be real ones too: "
            "move it out"
        )


def sample_flags(samples: SampleSet, dimension: int, real: SetSummary, generated: SetSummary) -> list[str]:
    """Return cautions when a set is too small for its covariance, or its size not known.

    What counts of frames are the videos that they are of, as they are alike.
    """
    needed, kind = max(MIN_SAMPLES, dimension + 1), samples.kind
    of = f"{kind.name}s" if samples.group == 1 else "videos' frames"
    published, flags = kind.published_count // samples.group, []
    for title, count in (("real", real.count), ("generated", generated.count)):
        if count is None:
            flags.append(f"The number of {title} {kind.name}s is not stated in their statistics.")
        elif (independent := count // samples.group) < needed:
            flags.append(
                f"Only {independent:,} {title} {of} for {dimension}-dimensional features: Frechet "
                f"distances are biased upwards. Use at least {needed:,}; papers use {published:,}."
            )
        elif independent // 2 <= dimension:
            flags.append(
                f"{independent:,} {title} {of} for {dimension}-dimensional features are too few to tell how "
                "far Frechet distances are biased upwards: their intervals leave that out."
            )
    return flags


def _sizes(sizes: Sequence[str]) -> str:
    """Name the most frequent size, and how many others there are."""
    return sizes[0] + (f" (and {len(sizes) - 1:,} other sizes)" if len(sizes) > 1 else "")


def content_flags(samples: SampleSet, real: SetSummary, generated: SetSummary) -> list[str]:
    """Return cautions when what was scored is not all, or not as many different samples as it seems."""
    kind, flags = samples.kind, []
    known = [[size for size in its.sizes if size != "unknown"] for its in (real, generated)]
    if all(known) and set(known[0]) != set(known[1]):
        flags.append(
            f"Real {kind.name}s are {_sizes(known[0])} pixels, generated ones {_sizes(known[1])}: sizes and "
            "ratios of sides that differ are resized to one, and count as differences."
        )
    if generated.copies:
        flags.append(f"{generated.copies:,} generated {kind.name}s have the same pixels as real ones.")
    for title, its in (("real", real), ("generated", generated)):
        if its.duplicates and samples.group == 1:  # frames of one video may be alike
            flags.append(f"{its.duplicates:,} {title} {kind.name}s have the same pixels as one before.")
        if its.unlisted:
            flags.append(f"{its.unlisted:,} {title} {kind.name}s are not in their manifest and are left out.")
        if its.skipped:
            flags.append(f"{len(its.skipped):,} {title} {kind.name}s could not be read and are left out.")
        if its.manifest.get("complete") is False:
            flags.append(f"The manifest says that {title} {kind.name}s were not all made.")
    return flags
