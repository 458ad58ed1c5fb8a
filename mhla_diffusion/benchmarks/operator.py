"""The operator beside softmax attention, plain linear attention and the convention of the public code."""

from __future__ import annotations

import json
import logging
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ..devices import resolve_device
from ..files.text import markdown_table
from ..files.writing import require_room, write_file
from ..ops import BlockLayout, locality_mixing, mhla, mhla_reference
from ..optional import require
from ..timing import best, interleaved, peak_bytes, spread
from .shared import (
    PASSES,
    check_at_least,
    check_choices,
    check_seconds,
    clock_of,
    machine,
    plot,
)  # fmt: skip

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shape:
    """Size of the operator: head width d, heads H, and a grid of tokens in blocks."""

    d: int
    heads: int
    grid: tuple[int, ...]
    blocks: tuple[int, ...]

    @property
    def layout(self) -> BlockLayout:
        return BlockLayout(self.grid, self.blocks)

    @property
    def flops(self) -> int:
        """``H d^2 (4 N + 2 M^2)`` of a forward (section 4.2 of the paper)."""
        layout = self.layout
        return self.heads * self.d**2 * (4 * layout.num_tokens + 2 * layout.num_blocks**2)

    def __str__(self) -> str:
        layout = self.layout
        return f"d {self.d}, H {self.heads}, N {layout.num_tokens:,}, M {layout.num_blocks}"


SHAPES = {
    "0.25k": Shape(64, 6, (16, 16), (4, 2)),  # DiT-S/2 at 256 px
    "1k narrow": Shape(32, 12, (32, 32), (4, 4)),
    "1k": Shape(64, 6, (32, 32), (4, 4)),  # DiT-S/2 at 512 px
    "4k": Shape(72, 16, (64, 64), (4, 4)),  # DiT-XL/2 at 1024 px
    "16k": Shape(72, 16, (128, 128), (8, 8)),  # DiT-XL/2 at 2048 px
    "wan": Shape(128, 12, (21, 30, 50), (3, 5, 10)),  # Wan2.1-1.3B, 81 frames of 480 x 800
    "1M": Shape(64, 1, (1024, 1024), (16, 16)),
}
LONG = ("1k", "4k", "16k", "wan", "1M")
PEERS = ("mhla", "softmax", "linear", "convolution")


@dataclass(frozen=True)
class Measurement:
    """Times and memory of one peer at one shape; None where it would have taken too long."""

    shape: str
    dtype: str
    passes: str
    peer: str
    seconds: float | None
    spread: float | None  # of the interleaved runs, (third quartile - first) / median
    floor: float  # seconds
    peak_bytes: int | None  # beyond inputs, output and gradients


def operator(
    shapes: Sequence[str] = LONG,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    passes: Sequence[str] = PASSES,
    peers: Sequence[str] = PEERS,
    repeats: int = 9,
    seconds: float = 60,
    scaling: bool = True,
    out: Path | None = None,
    device: str | None = None,
    processor_time: bool = False,
) -> str:
    """MHLA against softmax attention, plain linear attention and the reference convention.

    Every shape is first compared with the float64 reference, outputs and gradients; nothing is timed where
    that fails. The floor is the larger of the FLOPs over the rate of a 2048 x 2048 product and the bytes of
    q, k, v and the output over the rate of a copy, both measured here; three times that with the backward.

    Args:
        shapes: of 0.25k, 1k narrow, 1k, 4k, 16k, wan, 1M.
        dtypes: of float32, bfloat16.
        passes: of ``forward``, ``forward + backward``.
        peers: of mhla, softmax, linear, convolution.
        repeats: interleaved runs, of which the median counts.
        seconds: a peer takes no more runs than fit into this, and one at least; softmax attention is left
            out where one run would take longer.
        scaling: also time MHLA from 1k to 1M tokens, at 1,024 tokens a block.
        out: folder for operator.json (written after each shape), operator.md and scaling.png.
        device: cpu or cuda; a GPU where there is one.
        processor_time: count the seconds of all threads on the processor and not those of the clock, which
            other work on the machine lengthens; on a CPU.

    Returns:
        A table in Markdown. Its spread is the distance between the quartiles of a peer's runs, of the median.

    Raises:
        ValueError: for a choice that does not exist or stands twice, or where results lie in ``out`` already.
        ImportError: for a drawing without matplotlib.
        RuntimeError: when MHLA does not equal its reference.
    """
    check_choices(shapes=(shapes, SHAPES), dtypes=(dtypes, ("float32", "bfloat16")), passes=(passes, PASSES))
    check_choices(peers=(peers, PEERS))
    if "mhla" not in peers:
        raise ValueError(f"peers must hold mhla, whose time others are compared with, got {list(peers)}")
    check_at_least(1, repeats=repeats)
    check_seconds(seconds)
    if scaling and out is not None:
        require("matplotlib")
    if out is not None:
        require_room(out, ["operator.json", "operator.md", *["scaling.png"] * scaling])
    device = resolve_device(device)
    clock = clock_of(device, processor_time=processor_time)
    for name in shapes:
        check(SHAPES[name], device)
    where = machine(device) + (", processor time" if processor_time else "")
    record: dict[str, Any] = {"machine": where, "measurements": []}
    results: list[Measurement] = []
    for name in tqdm(shapes, desc="shapes", disable=None):
        for dtype in dtypes:
            results += _measure_shape(name, dtype, passes, peers, repeats, seconds, device, clock)
            record["measurements"] = [asdict(result) for result in results]
            if out is not None:
                write_file(out / "operator.json", json.dumps(record, indent=2))
    text = f"{where}\n\n{_operator_table(results)}"
    if scaling:
        times = measure_scaling(device, clock=clock)
        record["scaling"] = times
        text += "\n\n" + "\n".join(
            f"{name}: slope of log time over log tokens {slope(points):.3f}, 1k to 1M tokens"
            for name, points in times.items()
        )
    if out is not None:
        write_file(out / "operator.md", text)
        write_file(out / "operator.json", json.dumps(record, indent=2))
        if scaling:
            write_file(out / "scaling.png", plot(times, "tokens", "seconds"))
    return text


def check(shape: Shape, device: str, rows: int = 16) -> None:
    """Compare output and all gradients with the float64 reference, at some queries of one head.

    Raises:
        RuntimeError: when they differ by more than 1e-5 of their root mean square.
    """
    layout, generator = shape.layout, torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, layout.num_tokens, shape.d, generator=generator) for _ in range(3))
    chosen = torch.randperm(layout.num_tokens, generator=generator)[:rows]
    mixing = locality_mixing(layout)
    inputs = tuple(x.to(device).requires_grad_() for x in (q, k, v, mixing))
    exact = [x.double().requires_grad_() for x in (q, k, v, mixing)]
    # Each chosen query as a block of its own, with the row of W that is its block's.
    expected = mhla_reference(
        exact[0][:, :, chosen], exact[1], exact[2], exact[3][layout.block_index()[chosen]],
        BlockLayout((rows,), (rows,)), key_layout=layout,
    )  # fmt: skip
    found = mhla(inputs[0], inputs[1], inputs[2], inputs[3], layout)[:, :, chosen.to(device)]
    cotangent = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    pairs = [
        (found, expected),
        *zip(
            torch.autograd.grad(found, inputs, cotangent.to(device, found.dtype)),
            torch.autograd.grad(expected, exact, cotangent),
            strict=True,
        ),
    ]
    for name, (a, b) in zip(("output", "q", "k", "v", "mixing"), pairs, strict=True):
        error = ((a.double().cpu() - b).norm() / b.norm()).item()
        if not error < 1e-5:
            raise RuntimeError(
                f"{shape}: {name} differs from the reference by {error:.1e}; no times are given"
            )
    logger.info("%s equals the reference", shape)


def measure_rates(
    dtype: torch.dtype, device: str, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, float]:
    """FLOP/s of a 2048 x 2048 product, and bytes/s read and written of a copy of 256 MB."""
    a, target = torch.randn(2, 2048, 2048, device=device).to(dtype)
    source = torch.empty(2**28 // dtype.itemsize, device=device, dtype=dtype).fill_(1)
    copy = torch.empty_like(source)
    calls = [lambda: torch.mm(a, a, out=target), lambda: copy.copy_(source)]
    product, copying = best(calls, device, 7, clock=clock)
    return 2 * 2048**3 / product, 2 * 2**28 / copying


def measure_scaling(
    device: str, most: int = 2**20, *, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[tuple[int, float]]]:
    """Tokens and seconds at 1,024 tokens a block, d 64, one head, float32, for both of ``PASSES``."""
    times: dict[str, list[tuple[int, float]]] = {name: [] for name in PASSES}
    sides = [2**i for i in range(5, 11) if 4**i <= most]
    for side in tqdm(sides, desc="scaling", disable=None):
        shape = Shape(64, 1, (side, side), (side // 32, side // 32))
        inputs = _inputs(shape, torch.float32, device)
        calls = [_calls("mhla", shape, inputs, passes) for passes in PASSES]
        for name, seconds in zip(PASSES, best(calls, device, 5, clock=clock), strict=True):
            times[name].append((side**2, seconds))
    return times


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Return the slope of a straight line through the logarithms, by least squares."""
    x, y = ([math.log(p[i]) for p in points] for i in (0, 1))
    return statistics.linear_regression(x, y).slope


def _measure_shape(
    name: str,
    dtype: str,
    passes: Sequence[str],
    peers: Sequence[str],
    repeats: int,
    seconds: float,
    device: str,
    clock: Callable[[], float],
) -> list[Measurement]:
    shape = SHAPES[name]
    inputs = _inputs(shape, getattr(torch, dtype), device)
    matmul_rate, copy_rate = measure_rates(getattr(torch, dtype), device, clock)
    results = []
    for kind in passes:
        factor = 1 if kind == "forward" else 3
        # Softmax attention's time is known before: 4 N^2 d H FLOPs.
        softmax = 4 * shape.layout.num_tokens**2 * shape.d * shape.heads * factor / matmul_rate
        names = [peer for peer in peers if peer != "softmax" or softmax < seconds]
        calls = [_calls(peer, shape, inputs, kind) for peer in names]
        runs = interleaved(calls, device, repeats, seconds, clock=clock)
        times = dict(zip(names, runs, strict=True))
        peaks = {peer: peak_bytes(call, device) for peer, call in zip(names, calls, strict=True)}
        moved = 4 * inputs[0].numel() * inputs[0].element_size()
        floor = factor * max(shape.flops / matmul_rate, moved / copy_rate)
        for peer in peers:
            measured = times.get(peer)
            results.append(
                Measurement(
                    name, dtype, kind, peer,
                    None if measured is None else statistics.median(measured),
                    None if measured is None else spread(measured),
                    floor, peaks.get(peer),
                )
            )  # fmt: skip
    return results


def _inputs(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """q, k, v and the mixing matrix, then a gradient of the output."""
    tokens = shape.layout.num_tokens
    q, k, v, gradient = (
        torch.randn(1, shape.heads, tokens, shape.d, device=device).to(dtype) for _ in range(4)
    )
    mixing = locality_mixing(shape.layout).to(device)
    return *(x.requires_grad_() for x in (q, k, v, mixing)), gradient


def _calls(peer: str, shape: Shape, inputs: tuple[Tensor, ...], passes: str) -> Callable[[], Any]:
    q, k, v, mixing, gradient = inputs
    layout = shape.layout

    def forward() -> Tensor:
        if peer == "mhla":
            return mhla(q, k, v, mixing, layout)
        if peer == "softmax":
            return F.scaled_dot_product_attention(q, k, v)
        if peer == "linear":
            return linear_attention(q, k, v)
        return convolution_mhla(q, k, v, mixing, layout)

    wanted = (q, k, v, mixing) if peer in ("mhla", "convolution") else (q, k, v)
    if passes == "forward":
        return torch.no_grad()(forward)
    return lambda: torch.autograd.grad(forward(), wanted, gradient)


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Plain linear attention as people write it: two products, and a denominator."""
    q, k = F.relu(q) + 1e-6, F.relu(k) + 1e-6
    return (q @ (k.transpose(-1, -2) @ v)) / (q @ k.sum(-2).unsqueeze(-1))


def convolution_mhla(q: Tensor, k: Tensor, v: Tensor, mixing: Tensor, layout: BlockLayout) -> Tensor:
    """MHLA in the way of the public reference code, convention ``official``.

    Queries and keys with and without positions and values are concatenated in float32 and put in blocks
    together; mixing is a 1x1 convolution with the blocks as channels.
    """
    (q, k), dtype = (F.relu(x) + 1e-6 for x in (q, k)), v.dtype
    packed = layout.pack(torch.cat((q, k, v, q, k), 1).float())
    q, k, v, q_rotated, k_rotated = packed.chunk(5, 1)  # [B, H, M, n, d]
    weight = mixing.float()[..., None, None]
    summaries = F.conv2d((k_rotated.transpose(-1, -2) @ v).flatten(0, 1), weight).view(
        *q.shape[:3], -1, v.shape[-1]
    )
    own = (q @ k.sum(-2).unsqueeze(-1)).flatten(0, 1)
    out = q_rotated @ summaries / F.conv2d(own, weight).view(*q.shape[:-1], 1)
    return layout.unpack(out).to(dtype)


def _operator_table(results: Sequence[Measurement]) -> str:
    """Markdown: milliseconds of MHLA, how many times slower the others are, memory of each."""
    rows: dict[tuple[str, str, str], dict[str, Measurement]] = {}
    for result in results:
        rows.setdefault((result.shape, result.dtype, result.passes), {})[result.peer] = result
    others = [peer for peer in PEERS[1:] if any(r.peer == peer for r in results)]
    head = ["shape", "dtype", "pass", "MHLA ms", "floor ms", "of the floor"]
    head += [f"{peer} / MHLA" for peer in others] + ["MB beyond in- and outputs", "spread"]
    lines = [head]
    for (shape, dtype, passes), peers in rows.items():
        ours = peers.get("mhla")
        if ours is None or ours.seconds is None:
            continue
        ratios = [peers[p].seconds for p in others]
        memory = " / ".join(
            f"{peer} {result.peak_bytes / 1e6:,.0f}"
            for peer, result in peers.items()
            if result.peak_bytes is not None
        )
        spreads = " / ".join(f"{p} {result.spread:.0%}" for p, result in peers.items() if result.spread)
        lines.append(
            [
                str(SHAPES[shape]), dtype, passes, f"{1e3 * ours.seconds:,.1f}",
                f"{1e3 * ours.floor:,.1f}", f"{ours.seconds / ours.floor:.2f} x",
                *("-" if s is None else f"{s / ours.seconds:.2f} x" for s in ratios), memory, spreads,
            ]
        )  # fmt: skip
    return markdown_table(lines)
