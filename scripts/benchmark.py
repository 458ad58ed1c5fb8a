"""Compare the speed of attention operators on this machine.

python scripts/benchmark.py operator
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from torch import Tensor

from mhla_diffusion.ops import BlockLayout, locality_mixing, mhla, mhla_reference


@torch.no_grad()
def operator(
    sides: tuple[int, ...] = (32, 64, 128), heads: int = 6, head_dim: int = 64, repeats: int = 3
) -> None:
    """Forward of MHLA against softmax attention (F.scaled_dot_product_attention), float32, one line.

    Args:
        sides: of the square token grids; the blocks are the most that keep M^2 <= N, as a square.
        heads: H.
        head_dim: d.
        repeats: interleaved runs, of which the median counts.
    """
    _check()
    parts = []
    for side in sides:
        count = max(b for b in range(1, side + 1) if b**4 <= side**2 and side % b == 0)
        layout = BlockLayout((side, side), (count, count))
        mixing = locality_mixing(layout)
        q, k, v = (torch.randn(1, heads, side * side, head_dim) for _ in range(3))
        attentions = [
            partial(mhla, q, k, v, mixing, layout),
            partial(F.scaled_dot_product_attention, q, k, v),
        ]
        ours, softmax = _medians(attentions, repeats)
        parts.append(
            f"{side * side} tokens {softmax / ours:.1f} x ({1e3 * ours:.1f} / {1e3 * softmax:.1f} ms)"
        )
    threads = torch.get_num_threads()
    print(f"MHLA against softmax attention, forward, {threads} threads: " + ", ".join(parts))


def _check() -> None:
    """No table of something that is wrong."""
    layout = BlockLayout((16, 16), (4, 4))
    q, k, v = (torch.randn(1, 2, 256, 32) for _ in range(3))
    exact = mhla_reference(q, k, v, locality_mixing(layout), layout)
    if (mhla(q, k, v, locality_mixing(layout), layout) - exact).norm() > 1e-5 * exact.norm():
        sys.exit("error: the operator does not equal its reference here; no times are given")


def _medians(calls: Sequence[Callable[[], Tensor]], repeats: int) -> list[float]:
    """Median seconds of each call, the calls taking turns."""
    seconds: list[list[float]] = [[] for _ in calls]
    for turn in range(repeats + 1):
        for call, times in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            if turn:  # the first turn warms up
                times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]


if __name__ == "__main__":
    auto_cli({"operator": operator}, as_positional=False, allow_abbrev=False)
