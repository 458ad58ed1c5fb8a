"""The benchmarks of scoring measure what they say; their times are not tested."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mhla_diffusion.benchmarks import shared
from mhla_diffusion.benchmarks.evaluation_video import evaluation_video
from mhla_diffusion.benchmarks.frechet import frechet

from .tables import cells


def test_clips_are_scored_beside_cdfvd_with_one_result() -> None:
    ours, theirs = cells(evaluation_video(clips=2, size=(32, 32), repeats=1))
    assert (ours[0], theirs[0]) == ("mhla_diffusion", "cd-fvd")
    assert abs(float(ours[4]) - float(theirs[4])) <= 1e-3 * float(theirs[4])
    assert float(ours[5].removesuffix(" x")) > 0


def test_the_distance_is_that_of_sqrtm() -> None:
    rows = cells(frechet(dimension=24, samples=200))
    assert len(rows) == 3
    assert all(float(row[-1]) < 1e-6 for row in rows)


def test_a_race_says_how_many_times_as_fast_ours_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(calls: list[Callable[[], None]], *_: Any) -> list[list[float]]:
        for call in calls:
            call()
        return [[1.0] * 3, [2.0] * 3]

    monkeypatch.setattr(shared, "interleaved", timed)
    ours, theirs = cells(shared.race({"ours": lambda: 1.0, "theirs": lambda: 1.0}, 10, "images", 3))
    assert (ours[0], ours[2], ours[5]) == ("ours", "10.0", "2.00 x")
    assert (theirs[0], theirs[2], theirs[5]) == ("theirs", "5.0", "")
