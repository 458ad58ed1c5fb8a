"""Times, memory and tables of the benchmarks: what is compared takes turns in one run."""

from __future__ import annotations

import importlib
import io
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PASSES = ("forward", "forward + backward")


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
    spent = [0.0] * len(calls)
    for turn in range(repeats + 1):
        for i, call in enumerate(calls):
            if times[i] and spent[i] * (turn + 1) / turn > seconds:
                continue
            elapsed = _time(call, device, clock)
            spent[i] += elapsed
            if turn or 2 * elapsed > seconds:  # the first turn warms up, which what is slow has no need of
                times[i].append(elapsed)
    return times


def best(calls: Sequence[Callable[[], Any]], device: str, repeats: int) -> list[float]:
    """Return the shortest of each call's interleaved runs, in seconds."""
    return [min(times) for times in interleaved(calls, device, repeats)]


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
    """Return the most that is allocated during a call, beyond what it returns."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        return torch.cuda.max_memory_allocated() - before - _size(result)
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
    return sum(x.untyped_storage().nbytes() for x in tensors)


def default_device() -> str:
    """Return cuda where there is a GPU, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def machine(device: str) -> str:
    """Return what the times are measured on: processor, threads, torch."""
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name()
    else:
        name = f"{_processor()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    return f"{name}; torch {torch.__version__}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first of them the head, as a table in Markdown."""
    head, *rows = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, f"|{' --- |' * len(lines[0])}", *rows])


def require_plots() -> None:
    """Check that :func:`plot` can draw, before anything is measured.

    Raises:
        ModuleNotFoundError: without matplotlib.
    """
    importlib.import_module("matplotlib")


def plot(lines: dict[str, list[tuple[int, float]]], x: str, y: str) -> bytes:
    """Draw a PNG of lines on two logarithmic axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, points in lines.items():
        axes.loglog(*zip(*points, strict=True), marker="o", label=name)
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def check_choices(**choices: tuple[Iterable[str], Iterable[str]]) -> None:
    """Check ``name=(chosen, allowed)``.

    Raises:
        ValueError: when something chosen is not allowed.
    """
    for name, (chosen, allowed) in choices.items():
        for value in chosen:
            if value not in allowed:
                raise ValueError(f"{name} must be of {', '.join(allowed)}, got {value!r}")


def check_at_least(least: int, **values: int) -> None:
    """Check ``name=value``.

    Raises:
        ValueError: when a value is smaller than ``least``.
    """
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def race(calls: dict[str, Callable[[], float]], count: int, unit: str, repeats: int) -> str:
    """Return a table of calls that return a distance, each of ours before its alternative."""
    scores: dict[str, float] = {}

    def timed(name: str, call: Callable[[], float]) -> Callable[[], None]:
        return lambda: scores.__setitem__(name, call())

    times = interleaved([timed(name, call) for name, call in calls.items()], "cpu", repeats)
    medians = [statistics.median(its) for its in times]
    lines = [["scored by", "seconds", f"{unit} per second", "spread", "distance", "times as fast"]]
    for i, name in enumerate(calls):
        ratio = f"{medians[i + 1] / medians[i]:.2f} x" if i % 2 == 0 else ""
        lines.append(
            [
                name, f"{medians[i]:.1f}", f"{count / medians[i]:.1f}", f"{spread(times[i]) or 0:.0%}",
                f"{scores[name]:.6g}", ratio,
            ]
        )  # fmt: skip
    return f"{machine('cpu')}, {count:,} {unit}\n\n{markdown_table(lines)}"
