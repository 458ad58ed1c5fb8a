"""Machines, checks, plots and races of the benchmarks."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from ..files.pages import written
from ..files.text import markdown_table
from ..timing import interleaved, spread

PASSES = ("forward", "forward + backward")


def clock_of(device: str, *, processor_time: bool) -> Callable[[], float]:
    """Return the clock that calls are timed by, in seconds: of the wall, or of all threads on processors.

    Raises:
        ValueError: for processor time on another device than a CPU, whose work it would not count.
    """
    if processor_time and device != "cpu":
        raise ValueError(f"processor_time is for the device cpu, got {device}: leave it out")
    return time.process_time if processor_time else time.perf_counter


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
    return written(figure.savefig, format="png", dpi=120)


def check_choices(**choices: tuple[Iterable[str], Iterable[str]]) -> None:
    """Check ``name=(chosen, allowed)``.

    Raises:
        ValueError: when something chosen is not allowed or chosen twice, or nothing is chosen.
    """
    for name, (chosen, allowed) in choices.items():
        values = list(chosen)
        if not values:
            raise ValueError(f"{name} is empty: give one or more of {', '.join(allowed)}")
        for value in values:
            if value not in allowed:
                raise ValueError(f"{name} must be of {', '.join(allowed)}, got {value!r}")
        check_different(**{name: values})


def check_different(**values: Sequence[object]) -> None:
    """Check that in ``name=[...]`` nothing stands twice, as one would be measured for nothing.

    Raises:
        ValueError: when something does.
    """
    for name, chosen in values.items():
        if twice := [value for value in dict.fromkeys(chosen) if chosen.count(value) > 1]:
            raise ValueError(f"{name} must differ, got {twice[0]!r} more than once")


def check_seconds(seconds: float) -> None:
    """Check the time that runs may take.

    Raises:
        ValueError: when there is none.
    """
    if not seconds > 0:
        raise ValueError(f"seconds must be above 0, got {seconds}")


def check_at_least(least: int, **values: int) -> None:
    """Check ``name=value``.

    Raises:
        ValueError: when a value is smaller than ``least``.
    """
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def percent(share: float | None) -> str:
    """Return a share as a table has it, a dash where there is none."""
    return "-" if share is None else f"{share:.0%}"


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
                name, f"{medians[i]:.1f}", f"{count / medians[i]:.1f}", percent(spread(times[i])),
                f"{scores[name]:.6g}", ratio,
            ]
        )  # fmt: skip
    return f"{machine('cpu')}, {count:,} {unit}\n\n{markdown_table(lines)}"
