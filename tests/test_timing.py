"""Times are shared out fairly, and memory is that of the call."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from mhla_diffusion.timing import interleaved, peak_bytes, spread


def timed(lengths: list[float], seconds: float) -> tuple[list[list[float]], list[int]]:
    """Times of calls of these lengths by a clock that they alone move, in five repeats, and their runs."""
    now, runs = [0.0], [0] * len(lengths)

    def call(i: int) -> None:
        now[0] += lengths[i]
        runs[i] += 1

    calls = [partial(call, i) for i in range(len(lengths))]
    return interleaved(calls, "cpu", 5, seconds, clock=lambda: now[0]), runs


def test_memory_beyond_what_is_returned() -> None:
    def call() -> torch.Tensor:
        large = torch.zeros(1000)
        return large[:10].clone()

    assert 4000 <= peak_bytes(call, "cpu") <= 4200


def test_views_of_one_storage_are_returned_once() -> None:
    def call() -> tuple[torch.Tensor, ...]:
        whole = torch.zeros(1000)
        return whole[:10], whole[10:]

    assert 0 <= peak_bytes(call, "cpu") <= 200


def test_slow_calls_have_fewer_runs_and_one_at_least() -> None:
    assert timed([4.0, 1.0, 6.0], seconds=9) == ([[4.0], [1.0] * 5, [6.0]], [2, 6, 1])


@pytest.mark.parametrize(("seconds", "most"), [(1, 1), (7, 1), (8, 2), (10, 2), (12, 3), (23, 5), (24, 6)])
def test_no_call_spends_more_than_its_seconds_after_its_first_run(seconds: int, most: int) -> None:
    (times,), (runs,) = timed([4.0], seconds)
    assert runs == most
    assert times == [4.0] * max(1, most - 1)


def test_spread_is_the_distance_of_the_quartiles_over_the_median() -> None:
    assert spread([2.0, 4.0, 6.0, 8.0, 10.0]) == pytest.approx(1)
    assert spread([20.0, 40.0, 60.0]) == pytest.approx(1)
    assert spread([1.0, 2.0]) is None
