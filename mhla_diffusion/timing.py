"""Times and memory of calls: what is compared takes turns in one run."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def interleaved(
    calls: Sequence[Callable[[], Any]],
    device: str,
    repeats: int,
    seconds: float = math.inf,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[float]]:
    """Seconds of each call's runs by a clock, the calls taking turns; slow ones get fewer, at least one."""
    times: list[list[float]] = [[] for _ in calls]
    spent, runs = [0.0] * len(calls), [0] * len(calls)
    for turn in range(repeats + 1):
        for i, call in enumerate(calls):
            if times[i] and spent[i] * (runs[i] + 1) / runs[i] > seconds:
                continue
            elapsed = _time(call, device, clock)
            spent[i], runs[i] = spent[i] + elapsed, runs[i] + 1
            if turn or 2 * elapsed > seconds:  # the first turn warms up, which what is slow has no need of
                times[i].append(elapsed)
    return times


def best(
    calls: Sequence[Callable[[], Any]],
    device: str,
    repeats: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Return the shortest of each call's interleaved runs, in seconds of a clock."""
    return [min(times) for times in interleaved(calls, device, repeats, clock=clock)]


def _time(call: Callable[[], Any], device: str, clock: Callable[[], float]) -> float:
    _synchronize(device)
    start = clock()
    result = call()
    _synchronize(device)
    elapsed = clock() - start
    del result
    return elapsed


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def spread(times: Sequence[float]) -> float | None:
    """Return (third quartile - first) / median of at least three times, else None."""
    if len(times) < 3:
        return None
    quartiles = statistics.quantiles(times, n=4)
    return (quartiles[2] - quartiles[0]) / statistics.median(times)


def peak_bytes(call: Callable[[], Any], device: str) -> int:
    """Return the most that is allocated during a call, beyond what it returns.

    Args:
        call: returns a tensor or several that it made; on a CPU it allocates in this thread.
        device: ``cpu``, or a GPU that torch knows by this name.
    """
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        return torch.cuda.max_memory_allocated(device) - before - _size(result)
    # Else it tells its steps, and what it says of GPUs that are not there looks like a failure.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        result = call()
    current = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak - _size(result)


def _size(result: Tensor | Iterable[Tensor]) -> int:
    tensors = [result] if isinstance(result, Tensor) else result
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())
