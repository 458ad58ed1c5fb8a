"""The GPU kernels of softmax windows in Triton's interpreter, against dense attention in float64.

test_triton.py runs this file in a process of its own, as Triton decides on import whether it interprets.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from mhla_diffusion.ops import (
    LOCAL_FORMS,
    BlockLayout,
    choose_blocks,
    mhla_local,
    mhla_local_reference,
    window_attention,
)
from tests.ops.tensors import amid_nan

# Of a case: grid, blocks, margin, dtype, d, d_v; a rest unless it says otherwise.
CASES: dict[str, dict[str, Any]] = {
    "plain": {"grid": (4, 6), "blocks": (2, 2), "batch": 2, "heads": 2},
    "ragged, margin": {"grid": (5, 9), "blocks": (3, 2), "margin": 1, "d": 24, "d_v": 10},
    "no rest": {"grid": (3, 9), "blocks": (1, 2), "margin": 1, "mask": 0.3, "batch": 2, "far": False},
    "a margin along one axis": {"grid": (6, 6), "blocks": (1, 3), "margin": (0, 2), "mask": 0.3},
    "a margin beyond the grid": {"grid": (5, 3), "blocks": (2, 2), "margin": 10**12},
    "no key": {"grid": (4, 4), "blocks": (2, 2), "mask": 0.8},
    "one token a block": {"grid": (3, 2), "blocks": (3, 2), "margin": 1},
    "sequence, several tiles": {"grid": (300,), "blocks": (2,), "margin": 3},
    "video": {"grid": (3, 5, 4), "blocks": (2, 2, 1), "margin": 0.25, "mask": 0.3, "heads": 2},
    "heads side by side": {"grid": (4, 6), "blocks": (2, 2), "heads_inside": True, "heads": 2},
    "channels apart": {"grid": (4, 6), "blocks": (2, 2), "channels_apart": True, "margin": 1, "heads": 2},
    "wide heads": {"grid": (4, 2), "blocks": (2, 1), "d": 128, "d_v": 20, "margin": 1},
    "too wide for kernels": {"grid": (4, 2), "blocks": (2, 1), "d": 160, "margin": 1},
    "bfloat16": {"grid": (7, 9), "blocks": (2, 1), "dtype": "bfloat16", "d": 40, "d_v": 72, "margin": 1},
    "bfloat16, a mean": {
        "grid": (20, 9), "blocks": (2, 1), "dtype": "bfloat16", "d": 72, "mean": 3.0, "margin": 1,
        "heads_inside": True,
    },
    "bfloat16, a mean, no rest": {
        "grid": (16, 18), "blocks": (1, 2), "dtype": "bfloat16", "d": 64, "mean": 3.0, "far": False,
    },
    "bfloat16, a mean of keys": {
        "grid": (16, 16), "blocks": (2, 1), "dtype": "bfloat16", "d": 128, "mean": 3.0, "key_mean": 1.0,
        "mask": 0.3,
    },
    "float16, a mean": {
        "grid": (9, 10), "blocks": (2, 1), "dtype": "float16", "d": 88, "mean": 3.0, "margin": 2,
    },
}  # fmt: skip
LAYOUT = BlockLayout((3, 4), (2, 1))
LIMIT = {"float32": 2e-6, "bfloat16": 1e-2, "float16": 1e-3}
NAMES = ("output", "q", "k", "v", "far", "log_sums")


def dense(
    q: Tensor, k: Tensor, v: Tensor, rest: list[Tensor], layout: BlockLayout, margin: Any, mask: Any
) -> Tensor:
    """Softmax over all N keys, all but those of the window hidden, and the rest."""
    seen = torch.zeros(layout.num_tokens, layout.num_tokens, dtype=torch.bool)
    index, (token, there) = layout.block_index(), layout.reach(margin)
    for row in range(layout.num_tokens):
        seen[row, token[index[row]][there[index[row]]]] = True
    seen = seen if mask is None else seen & mask[:, None, None]
    weights = (q @ k.mT / math.sqrt(q.shape[-1])).exp() * seen
    sums, total = weights @ v, weights.sum(-1, keepdim=True)
    if rest:
        weight = rest[1][..., None].exp()
        sums, total = sums + weight * rest[0], total + weight
    return sums / torch.where(total == 0, 1, total)


def make(
    layout: BlockLayout,
    *,
    batch: int = 1,
    heads: int = 1,
    d: int = 16,
    d_v: int | None = None,
    dtype: str = "float32",
    mean: float = 0.0,
    key_mean: float = 0.0,
    heads_inside: bool = False,
    channels_apart: bool = False,
    far: bool = True,
) -> list[Tensor]:
    """q, k, v and the rest, amid NaN."""

    def amid(channels: int, add: float, kind: str) -> Tensor:
        order = {"heads_inside": heads_inside, "channels_apart": channels_apart}
        x = amid_nan(batch, heads, layout.num_tokens, channels, kind, **order)
        return x.add_(add).requires_grad_()

    d_v = d_v or d
    tensors = [amid(d, 0, dtype), amid(d, key_mean, dtype), amid(d_v, mean, dtype)]
    if far:
        log_sums = torch.randn(batch, heads, layout.num_tokens) + math.log(layout.block_size)
        log_sums = log_sums.mT.contiguous().mT if heads_inside else log_sums
        tensors += [amid(d_v, mean, "float32"), log_sums.requires_grad_()]
    return tensors


def compare(
    *, grid: tuple[int, ...], blocks: tuple[int, ...], margin: Any = 0, mask: float = 0.0, **options: Any
) -> dict[str, float]:
    """Relative errors of the output and of each gradient."""
    torch.manual_seed(0)
    layout = BlockLayout(grid, blocks)
    inputs = make(layout, **options)
    hidden = torch.rand(inputs[0].shape[0], layout.num_tokens) < mask
    key_mask = ~hidden if mask else None
    exact = [x.detach().double().requires_grad_() for x in inputs]
    rest = (inputs[3], inputs[4]) if len(inputs) > 3 else None
    out = window_attention(*inputs[:3], layout, key_mask=key_mask, margin=margin, rest=rest)
    expected = dense(*exact[:3], exact[3:], layout, margin, key_mask)
    cotangent = torch.randn_like(expected).to(inputs[0].dtype)
    found = [out, *torch.autograd.grad(out, inputs, cotangent.to(out.dtype))]
    wanted = [expected, *torch.autograd.grad(expected, exact, cotangent.double())]
    errors = [(a.double() - b).norm() / b.norm().clamp_min(1e-12) for a, b in zip(found, wanted, strict=True)]
    return {
        name: error.item() if error.isfinite() else 1e9
        for name, error in zip(NAMES, errors, strict=False)
    }  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_dense_attention(case: str) -> None:
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    errors = compare(**CASES[case])
    assert max(errors.values()) < LIMIT[CASES[case].get("dtype", "float32")], errors


def test_operators_are_what_they_say() -> None:
    """Opcheck with and without a rest and a mask: fake and real shapes, strides and dtypes are equal."""
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    mask = torch.rand(1, 12) < 0.7
    for far, hidden, margin in ((True, mask, [1, 1]), (False, None, [0, 0])):
        q, k, v, *rest = make(LAYOUT, heads=2, heads_inside=True, d_v=10, dtype="bfloat16", far=far)
        tensors, settings = (q, k, v, *(rest or (None, None))), (hidden, [3, 4], [2, 1], margin)
        opcheck(torch.ops.mhla.window.default, (*tensors, *settings), test_utils=tests)
        out, log_den = torch.ops.mhla.window(*tensors, *settings)
        saved = (torch.randn_like(out), out.detach(), log_den)
        plain = (None if x is None else x.detach() for x in tensors)
        arguments = (*saved, *plain, *settings)
        opcheck(torch.ops.mhla.window_backward.default, arguments, test_utils=tests[:2])


def test_products_are_counted() -> None:
    inputs = make(LAYOUT, d=8, d_v=4)
    with FlopCounterMode(display=False) as counter:
        out = window_attention(*inputs[:3], LAYOUT, margin=1, rest=(inputs[3], inputs[4]))
        out.sum().backward()
    forward = 2 * 12 * 12 * (8 + 4)  # 12 queries, and 3 rows of 4 keys in each window
    assert counter.get_total_flops() == forward + forward * 5 // 2


def test_windows_compile_whole() -> None:
    q, k, v, *rest = make(LAYOUT)

    def call(q: Tensor, k: Tensor, v: Tensor, far: Tensor, log_sums: Tensor) -> Tensor:
        return window_attention(q, k, v, LAYOUT, margin=1, rest=(far, log_sums))

    def results(function: Any) -> list[Tensor]:
        out = function(q, k, v, *rest)
        return [out, *torch.autograd.grad(out.square().sum(), (q, k, v, *rest))]

    found = results(torch.compile(call, backend="aot_eager", fullgraph=True))
    assert all(torch.equal(a, b) for a, b in zip(found, results(call), strict=True))


def test_windows_are_exported_whole_and_come_apart() -> None:
    q, k, v = (x.detach() for x in make(LAYOUT, far=False))

    class Window(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return window_attention(q, k, v, LAYOUT, margin=1)

    program = torch.export.export(Window(), (q, k, v))
    assert "mhla.window" in str(program.graph)
    apart = program.run_decompositions(get_decompositions([torch.ops.mhla.window.default]))
    assert "mhla" not in str(apart.graph)
    expected = window_attention(q, k, v, LAYOUT, margin=1)
    for each in (program, apart):
        torch.testing.assert_close(each.module()(q, k, v), expected)


def test_windows_have_gradients_of_gradients() -> None:
    """By operations of torch, which the backward takes where a gradient of it is wanted."""
    mask = torch.rand(1, 12) < 0.7

    def again(inputs: list[Tensor], call: Any) -> list[Tensor]:
        grads = torch.autograd.grad(call(inputs).square().sum(), inputs, create_graph=True)
        return list(torch.autograd.grad(sum(x.square().sum() for x in grads), inputs))

    for far in (True, False):
        inputs = make(LAYOUT, d=4, far=far)
        exact = [x.detach().double().requires_grad_() for x in inputs]

        def call(x: list[Tensor]) -> Tensor:
            rest = (x[3], x[4]) if len(x) > 3 else None
            return window_attention(*x[:3], LAYOUT, margin=1, rest=rest, key_mask=mask)

        expected = again(exact, lambda x: dense(*x[:3], x[3:], LAYOUT, 1, mask))
        for a, b in zip(again(inputs, call), expected, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("score", [-12_800.0, 12_800.0])
@pytest.mark.parametrize(("margin", "routes"), [(0, 0), (1, 0), (0, 2)])
def test_a_shift_of_all_scores_is_not_seen(
    score: float, margin: int, routes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor are blocks without a key; test_window.py holds operations of torch against dense attention."""
    layout = BlockLayout((6, 6), (2, 2))
    mask = (layout.block_index() > 1)[None]
    q, k, v = (x.detach() for x in make(layout, heads=2, far=False))
    q[..., 0], k[..., 0] = 64, score / 16
    chosen = choose_blocks(q, k, layout, routes, key_mask=mask) if routes else None
    cotangent, found = torch.randn_like(v), []
    for kernels, dtype in (("triton", torch.float32), ("torch", torch.float64)):
        monkeypatch.setenv("MHLA_KERNELS", kernels)
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = window_attention(*inputs, layout, key_mask=mask, margin=margin, chosen=chosen)
        found.append([out, *torch.autograd.grad(out, inputs, cotangent.to(out.dtype))])
    for a, b in zip(*found, strict=True):
        # Of the gradient of q not the channel of the shift, which adds 0 times a large number to it.
        assert (a - b)[..., 1:].norm() < 1e-2 * b[..., 1:].norm()


@torch.no_grad()
def test_windows_show_nan_but_not_what_is_hidden() -> None:
    mask = torch.ones(1, 12, dtype=torch.bool)
    for each in range(3):
        inputs = make(LAYOUT, far=False)
        inputs[each][0, 0, 7] = torch.nan
        assert window_attention(*inputs, LAYOUT)[0, 0, 7].isnan().all()
        if each:
            mask[0, 7] = False
            assert window_attention(*inputs, LAYOUT, key_mask=mask).isfinite().all()
    assert (window_attention(*make(LAYOUT, far=False), LAYOUT, key_mask=mask & False) == 0).all()


def test_windows_stand_in_mhla() -> None:
    """Extra tokens, chosen blocks, rotation: what window_attention makes of them are slices and rests."""
    layout = BlockLayout((3, 4), (2, 1), (3, 2))
    q, k, v = (x.detach() for x in make(layout, far=False, heads=2))
    mixing, weight = torch.rand(2, 3, 3), torch.randn(2)
    options: dict[str, Any] = {"window": (k, q), "weight": weight, "margin": 1}
    options["chosen"] = choose_blocks(q, k, layout, 1)
    exact = {key: x.double() if key == "weight" else x for key, x in options.items()}
    exact["window"] = (k.double(), q.double())
    for form in LOCAL_FORMS:
        out = mhla_local(q, k, v, mixing, layout, form=form, **options)
        expected = mhla_local_reference(
            q.double(), k.double(), v.double(), mixing.double(), layout, form=form, **exact
        )
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", LIMIT)
def test_a_row_of_w_that_sees_no_other_block_learns_to(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As test_window.py has it of operations of torch, which these are compared with."""
    layout, dtype = BlockLayout((4, 4), (1, 2)), getattr(torch, kind)
    q, k, v, window_q, window_k, cotangent = torch.randn(6, 1, 2, 16, 16)
    found = []
    for kernels, its in (("triton", dtype), ("torch", torch.float64)):
        monkeypatch.setenv("MHLA_KERNELS", kernels)
        mixing = torch.eye(2, requires_grad=True)
        q, k, v, window_q, window_k = (x.to(dtype).to(its) for x in (q, k, v, window_q, window_k))
        window, weight = (window_q, window_k), torch.zeros(2)
        out = mhla_local(q, k, v, mixing, layout, window=window, weight=weight, form="shared")
        found.append(torch.autograd.grad((out.double() * cotangent).sum(), mixing)[0])
    assert (found[0] - found[1]).norm() < LIMIT[kind] * found[1].norm()
    assert found[1][0, 1].abs() > 0.1


def test_calls_repeat_and_take_no_samples() -> None:
    inputs = make(LAYOUT)
    out = window_attention(*inputs[:3], LAYOUT, margin=1, rest=(inputs[3], inputs[4]))
    grads = [torch.autograd.grad(out.sum(), inputs, retain_graph=True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    empty = [x.detach()[:0].requires_grad_() for x in inputs]
    out = window_attention(*empty[:3], LAYOUT, margin=1, rest=(empty[3], empty[4]))
    assert [x.shape for x in torch.autograd.grad(out.sum(), empty)] == [x.shape for x in empty]
