"""Checks for scripts/gpu_validate.py: results against float64, and streams, graphs, compile, wide indices."""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mhla_diffusion.ops import BlockLayout, Norms, locality_mixing, mhla, mhla_reference

TOLERANCE = {"float32": 2e-5, "bfloat16": 1e-2, "float16": 2e-3}
NAMES = ("o", "dq", "dk", "dv", "dW")
# A check says what it found and whether that is as it should be.
Check = Callable[[], tuple[str, bool]]


class Shape(NamedTuple):
    """An attention layer of a known model."""

    d: int
    heads: int
    grid: tuple[int, ...]
    blocks: tuple[int, ...]
    rotary: bool = False


SHAPES = {
    "DiT-S/2, 512 px": Shape(64, 6, (32, 32), (4, 4)),
    "DiT-XL/2, 2048 px": Shape(72, 16, (128, 128), (8, 8)),
    "Wan2.1-1.3B": Shape(128, 12, (21, 30, 50), (3, 5, 10), True),
    "SANA-Video": Shape(112, 20, (21, 30, 50), (3, 5, 8), True),
    "a million tokens": Shape(64, 1, (1024, 1024), (16, 16)),
    "one block, 2048 px": Shape(72, 16, (128, 128), (1, 1)),
}


class Machine(NamedTuple):
    """Where the checks run."""

    device: str

    @property
    def tiny(self) -> bool:
        return self.device == "cpu"

    def randn(self, *shape: int, dtype: str = "float32", seed: int | None = None) -> Tensor:
        if seed is not None:
            torch.manual_seed(seed)
        return torch.randn(shape, device=self.device).to(getattr(torch, dtype))

    def heads_inside(self, batch: int, tokens: int, heads: int, d: int, dtype: str = "bfloat16") -> Tensor:
        """``[B, H, N, d]`` as projections leave it, heads side by side."""
        return self.randn(batch, tokens, heads, d, dtype=dtype).transpose(1, 2)

    def angles(self, tokens: int, d: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions, ``[N, d / 2]`` each."""
        angles = torch.rand(tokens, d // 2, device=self.device) * 6
        return angles.cos(), angles.sin()

    def synchronize(self) -> None:
        if not self.tiny:
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], object], repeats: int = 10, *, graph: bool = False) -> float:
        """Median time of a call on the device, the cache filled with other things before each.

        In a CUDA graph it is the time of the kernels alone, whatever launching them takes the processor.
        """
        call()
        if self.tiny:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        if graph:
            call = captured(call).replay
        flush = torch.empty(2**28, dtype=torch.int8, device=self.device)
        events = []
        for _ in range(repeats):
            flush.zero_()
            start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start_event.record()
            call()
            end_event.record()
            events.append((start_event, end_event))
        self.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


def captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Return a CUDA graph of what a call launches."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is made once must not be part of it
        call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def peers(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Other attention on the same tensors: plain linear attention in two products, and softmax."""

    def linear() -> Tensor:
        queries, keys = F.relu(q) + 1e-6, F.relu(k) + 1e-6
        return (queries @ (keys.mT @ v)) / (queries @ keys.sum(-2)[..., None])

    calls: dict[str, Callable[[], Tensor]] = {"linear": linear}
    if q.shape[2] < 2**18:
        calls["softmax"] = lambda: F.scaled_dot_product_attention(q, k, v)
    return calls


# Correct: against float64, in memory that holds NaN before it is written.


CASES: dict[str, dict[str, Any]] = {
    "even": {"grid": (16, 16), "blocks": (4, 4)},
    "ragged, W a head": {"grid": (13, 17), "blocks": (3, 4), "per_head": True},
    "video, positions, mask": {"grid": (5, 7, 9), "blocks": (2, 3, 2), "rotary": True, "mask": True},
    "no denominator": {
        "grid": (5, 7, 9), "blocks": (2, 3, 2), "rotary": True, "normalizer": "none", "feature_map": "elu",
    },
    "official": {"grid": (8, 12), "blocks": (2, 3), "normalizer": "official"},
    "softmax features": {"grid": (13, 17), "blocks": (3, 4), "feature_map": "softmax", "mask": True},
    "cross-attention": {"grid": (13, 17), "blocks": (3, 4), "keys": ((77,), (4,)), "mask": True},
    "one block": {"grid": (30, 40), "blocks": (1, 1)},
    "long blocks": {"grid": (32, 50), "blocks": (1, 2)},
    "one token a block": {"grid": (4, 6), "blocks": (4, 6)},
    "one head, one frame": {"grid": (1, 9, 9), "blocks": (1, 3, 3), "heads": 1, "batch": 1},
    "nothing seen": {"grid": (8, 8), "blocks": (2, 2), "nothing": True},
    "extra tokens": {"grid": (13, 17), "blocks": (3, 4), "extra": (77, 5), "rotary": True, "mask": True},
    "many extra tokens": {"grid": (16, 16), "blocks": (4, 4), "extra": (0, 512)},
    "another width of values": {"grid": (13, 17), "blocks": (3, 4), "d": 128, "d_v": 40},
}  # fmt: skip
WIDTHS = (16, 20, 40, 64, 72, 80, 96, 112, 128, 160, 192, 256)


def correct_checks(at: Machine) -> Iterator[tuple[str, Check]]:
    dtypes = ["bfloat16"] if at.tiny else list(TOLERANCE)
    for name, case in CASES.items():
        for dtype in dtypes:
            yield f"{name}, {dtype}", functools.partial(_compare, at, dtype, **case)
    for d in WIDTHS[1:2] if at.tiny else WIDTHS:
        for dtype in dtypes:
            case = {"grid": (13, 17), "blocks": (3, 4), "d": d, "rotary": d % 16 == 0}
            yield f"d {d}, {dtype}", functools.partial(_compare, at, dtype, **case)
    for d in WIDTHS[3:5] if at.tiny else WIDTHS[3:]:
        for dtype in dtypes:
            yield f"norms and gate, d {d}, {dtype}", functools.partial(_with_norms, at, d, dtype)
    for mean in (0.0, 1.0, 3.0):
        for dtype in dtypes:
            yield f"values of mean {mean}, {dtype}", functools.partial(_with_mean, at, mean, dtype)
    yield "values of one", lambda: _ones(at)
    yield "NaN is seen", lambda: _nan(at)
    yield "float16 sums are finite", lambda: _finite(at)


def _compare(
    at: Machine,
    dtype: str,
    grid: tuple[int, ...],
    blocks: tuple[int, ...],
    *,
    extra: tuple[int, int] | None = None,
    keys: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
    d: int = 64,
    d_v: int | None = None,
    batch: int = 2,
    heads: int = 2,
    per_head: bool = False,
    rotary: bool = False,
    mask: bool = False,
    nothing: bool = False,
    **options: Any,
) -> tuple[str, bool]:
    """Errors of the output and of all gradients against the dense reference."""
    torch.manual_seed(0)
    layout, key_layout = BlockLayout(grid, blocks, extra), BlockLayout(*keys) if keys else None
    tokens, key_tokens = layout.num_tokens, (key_layout or layout).num_tokens
    q, k = (at.heads_inside(batch, n, heads, d, dtype) for n in (tokens, key_tokens))
    v = at.heads_inside(batch, key_tokens, heads, d_v or d, dtype)
    sizes = layout.num_blocks, (key_layout or layout).num_blocks
    mixing = torch.rand(*([heads] if per_head else []), *sizes, device=at.device)
    if rotary:
        options["rotary_emb"] = at.angles(tokens, d)
    if mask or nothing:
        options["key_mask"] = torch.rand(batch, key_tokens, device=at.device) > (1 if nothing else 0.3)
    options["key_layout"] = key_layout
    inputs = [q, k, v, mixing]
    expected = _gradients(mhla_reference, [x.double() for x in inputs], q.dtype, layout, options)
    found = _gradients(mhla, inputs, q.dtype, layout, options)
    if layout.num_blocks == 1:  # the output does not depend on the one weight
        found, expected = found[:-1], expected[:-1]
    return verdict(found, expected, TOLERANCE[dtype])


def _gradients(
    operator: Callable[..., Tensor],
    inputs: list[Tensor],
    dtype: torch.dtype,
    layout: BlockLayout,
    options: dict[str, Any],
) -> list[Tensor]:
    """The output, and the gradients of the inputs for a fixed cotangent in that dtype."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    return gradients(functools.partial(operator, *leaves, layout, **options), leaves, dtype)


def gradients(call: Callable[[], Tensor], leaves: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return the output of a call, and the gradients of leaves for a fixed cotangent in that dtype."""
    out = call()
    generator = torch.Generator(out.device).manual_seed(1)
    cotangent = torch.randn(out.shape, generator=generator, device=out.device).to(dtype)
    return [out, *torch.autograd.grad(out, leaves, cotangent.to(out.dtype))]


def verdict(
    found: list[Tensor], expected: list[Tensor], limit: float, names: tuple[str, ...] = NAMES
) -> tuple[str, bool]:
    """Say how large the relative error of each tensor is, and whether all are below a limit."""
    pairs = zip(found, expected, strict=True)
    errors = [((a.double() - b).norm() / b.norm().clamp_min(1e-12)).item() for a, b in pairs]
    text = " ".join(f"{name} {error:.0e}" for name, error in zip(names, errors, strict=False))
    return text, all(error < limit for error in errors)


def _with_norms(at: Machine, d: int, dtype: str) -> tuple[str, bool]:
    """Norms of q, k and the output and a gate, which kernels apply under torch.no_grad."""
    torch.manual_seed(0)
    layout = BlockLayout((13, 17), (3, 4))
    q, k, v, gate = (at.heads_inside(2, layout.num_tokens, 2, d, dtype) for _ in range(4))
    of_q, of_k, of_out = (torch.rand(d, device=at.device) + 0.5 for _ in range(3))
    norms = Norms(of_q, of_k, of_out, gate)
    arguments = q, k, v, torch.rand(12, 12, device=at.device), layout
    options: dict[str, Any] = {"rotary_emb": at.angles(layout.num_tokens, d)} if d % 16 == 0 else {}
    with torch.no_grad():
        found = mhla(*arguments, norms=norms, **options)
    return verdict([found], [mhla_reference(*arguments, norms=norms, **options)], TOLERANCE[dtype])


def _with_mean(at: Machine, mean: float, dtype: str) -> tuple[str, bool]:
    """Long blocks and values with a mean, against tiles in float64."""
    side = 16 if at.tiny else 128
    layout = BlockLayout((side, side), (4, 4))
    torch.manual_seed(0)
    tensors = [at.heads_inside(1, side**2, 2, 64, "float32") for _ in range(3)]
    tensors[2] = tensors[2] + mean * at.randn(64)
    inputs = [*(x.to(getattr(torch, dtype)) for x in tensors), locality_mixing(layout).to(at.device)]
    found = _gradients(mhla, inputs, inputs[0].dtype, layout, {})
    kernels = os.environ.get("MHLA_KERNELS", "auto")
    os.environ["MHLA_KERNELS"] = "torch"
    expected = _gradients(mhla, [x.double() for x in inputs], inputs[0].dtype, layout, {})
    os.environ["MHLA_KERNELS"] = kernels
    return verdict(found, expected, TOLERANCE[dtype])


def _ones(at: Machine) -> tuple[str, bool]:
    layout = BlockLayout((16, 16), (4, 4))
    q, k = (at.heads_inside(2, 256, 2, 64) for _ in range(2))
    out = mhla(q, k, torch.ones_like(k), locality_mixing(layout).to(at.device), layout)
    return f"furthest from one: {(out - 1).abs().max().item():.0e}", bool((out == 1).all())


def _nan(at: Machine) -> tuple[str, bool]:
    layout, seen = BlockLayout((8, 8), (2, 2)), []
    for which in range(3):
        inputs = [at.heads_inside(1, 64, 1, 64) for _ in range(3)]
        inputs[which][0, 0, 5, 3] = torch.nan
        q, k, v = inputs
        seen.append(mhla(q, k, v, torch.ones(4, 4, device=at.device), layout).isnan().any().item())
    return f"of q, k, v in the output: {seen}", all(seen)


def _finite(at: Machine) -> tuple[str, bool]:
    layout = BlockLayout((32, 32), (4, 4))
    q, k, v = (at.heads_inside(1, 1024, 1, 64, "float16") * 4 + 1 for _ in range(3))
    out = mhla(q, k, v, torch.ones(16, 16, device=at.device), layout, normalizer="none")
    return f"{out.isfinite().float().mean().item():.3f} finite", bool(out.isfinite().all())


# Runtime: how the operators live with the rest of torch.


def runtime_checks(at: Machine) -> Iterator[tuple[str, Check]]:
    layout = BlockLayout((32, 32), (4, 4))
    mixing = locality_mixing(layout).to(at.device)
    q, k, v = (at.heads_inside(1, 1024, 6, 64) for _ in range(3))

    def call(*inputs: Tensor) -> Tensor:
        a, b, c = inputs or (q, k, v)
        return mhla(a, b, c, mixing, layout)

    def deterministic() -> tuple[str, bool]:
        runs = [_gradients(mhla, [q, k, v, mixing], q.dtype, layout, {}) for _ in range(3)]
        same = all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))
        return "bits of gradients in three runs", same

    def compiled() -> tuple[str, bool]:
        function = torch.compile(
            lambda *x: 2 * call(*x), fullgraph=True, backend="aot_eager" if at.tiny else "inductor"
        )
        return "fullgraph", torch.allclose(function(q, k, v).float(), 2 * call().float(), rtol=1e-2)

    def autocast() -> tuple[str, bool]:
        with torch.autocast(at.device, torch.bfloat16):
            normed = [F.rms_norm(x.float(), (64,)) for x in (q, k)]
            out = call(*normed, v)
        return f"float32 queries give {out.dtype}", out.dtype == torch.bfloat16

    def precision_setting() -> tuple[str, bool]:
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        out = call(q.float(), k.float(), v.float())
        torch.backends.cuda.matmul.fp32_precision = before
        error = (out - call(q.float(), k.float(), v.float())).abs().max().item()
        return f"fp32_precision = tf32 moves the output by {error:.0e}", error < 1e-2

    def far_apart() -> tuple[str, bool]:
        wide, tokens = (2**7, 2**8) if at.tiny else (2**12, 2**20)
        x = torch.empty(1, tokens, wide, dtype=torch.bfloat16, device=at.device)[..., None, -64:].transpose(
            1, 2
        )
        x.copy_(at.heads_inside(1, tokens, 1, 64))
        side = int(tokens**0.5)
        far = BlockLayout((side, side), (4, 4))
        near = x.contiguous()
        return "2^32 numbers", torch.equal(mhla(x, x, x, mixing, far), mhla(near, near, near, mixing, far))

    def many() -> tuple[str, bool]:
        x = at.randn(4 if at.tiny else 65536, 1, 16, 16, dtype="bfloat16")
        out = mhla(x, x, x, torch.ones(4, 4, device=at.device), BlockLayout((16,), (4,)))
        last = mhla(x[-1:], x[-1:], x[-1:], torch.ones(4, 4, device=at.device), BlockLayout((16,), (4,)))
        return f"{len(x)} samples", torch.equal(out[-1:], last)

    def odd_places() -> tuple[str, bool]:
        moved = (torch.cat((x.new_zeros(1), x.flatten()))[1:].view_as(x) for x in (q, k, v))
        return "rows at no multiple of 16 bytes", torch.equal(call(*moved), call(q, k, v))

    def operators() -> tuple[str, bool]:
        settings = (None, None, [32, 32], [4, 4], None, "relu", 1e-6, True, False)
        leaves = [x.detach().requires_grad_() for x in (k, v)]
        torch.library.opcheck(torch.ops.mhla.summarize.default, (*leaves, *settings))
        summaries = torch.ops.mhla.summarize(k, v, *settings)
        leaves = [x.detach().requires_grad_() for x in (q, *summaries[:2])]
        arguments = (*leaves, summaries[2], mixing.clone().requires_grad_(), *settings, torch.bfloat16)
        torch.library.opcheck(torch.ops.mhla.read.default, arguments)
        return "schema, fake tensors, autograd", True

    yield "determinism", deterministic
    yield "torch.compile", compiled
    yield "autocast", autocast
    yield "TF32 setting", precision_setting
    yield "tokens far apart", far_apart
    yield "many samples", many
    yield "odd places", odd_places
    yield "no samples", lambda: ("a batch of 0", call(q[:0], k[:0], v[:0]).shape[0] == 0)
    yield "opcheck", operators
    if not at.tiny:
        yield "another stream", lambda: ("equal", torch.equal(_on_a_stream(call), call()))
        yield "CUDA graph", lambda: ("replay equals a call", _in_a_graph(call, [q, k, v]))
        yield "second device", lambda: _on_second_device(call, [q, k, v], mixing, layout)


def _on_a_stream(call: Callable[..., Tensor]) -> Tensor:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = call()
    torch.cuda.current_stream().wait_stream(stream)
    return out


def _in_a_graph(call: Callable[..., Tensor], tensors: list[Tensor]) -> bool:
    inputs, outputs = [x.clone() for x in tensors], []
    graph = captured(lambda: outputs.append(call(*inputs)))
    for x in inputs:
        x.copy_(torch.randn_like(x))
    graph.replay()
    return torch.equal(outputs[-1], call(*inputs))


def _on_second_device(
    call: Callable[..., Tensor], tensors: list[Tensor], mixing: Tensor, layout: BlockLayout
) -> tuple[str, bool]:
    if torch.cuda.device_count() < 2:
        return "one device only: not checked", True
    a, b, c = (x.to("cuda:1") for x in tensors)
    out = mhla(a, b, c, mixing.to("cuda:1"), layout)
    return "tensors on cuda:1, current device 0", torch.equal(out.cpu(), call().cpu())
