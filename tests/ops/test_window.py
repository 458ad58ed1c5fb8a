"""MHLA with a softmax window, forward and each gradient, against its O(N^2) reference."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mhla_diffusion.ops import (
    LOCAL_FORMS,
    BlockLayout,
    apply_rotary_emb,
    choose_blocks,
    mhla_causal,
    mhla_local,
    mhla_local_reference,
    routing,
    window_attention,
)
from mhla_diffusion.ops.window_composite import softmax_in_blocks, softmax_of_scores

AssertClose = Callable[..., None]

LAYOUTS = [
    BlockLayout((8, 8), (2, 4)),
    BlockLayout((7, 9), (3, 2)),
    BlockLayout((1, 63), (1, 8)),
    BlockLayout((5, 5, 3), (2, 2, 2)),
    BlockLayout((6, 6), (2, 2), (3, 2)),
]
NAMES = ("q", "k", "v", "mixing", "window q", "window k", "weight")


def make_inputs(layout: BlockLayout, dtype: torch.dtype = torch.float64, mean: float = 0.0) -> list[Tensor]:
    q, k, v, window_q, window_k = torch.randn(5, 2, 3, layout.num_tokens, 6, dtype=torch.float64)
    mixing = torch.rand(3, layout.num_blocks, layout.num_blocks, dtype=torch.float64)
    tensors = (q, k, v + mean, mixing, window_q, window_k, torch.randn(3, dtype=torch.float64))
    return [x.to(dtype).requires_grad_() for x in tensors]


def call(
    operator: Callable[..., Tensor], inputs: list[Tensor], layout: BlockLayout, **options: Any
) -> Tensor:
    q, k, v, mixing, window_q, window_k, weight = inputs
    return operator(q, k, v, mixing, layout, window=(window_q, window_k), weight=weight, **options)


@pytest.mark.parametrize(
    ("dtype", "mean"), [(torch.float64, 0.5), (torch.float32, 0.0), (torch.bfloat16, 3.0)], ids=str
)
@pytest.mark.parametrize("form", LOCAL_FORMS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(
    ("routes", "margin", "masked"), [(0, 0, False), (2, 0, False), (0, 1, False), (2, 2, True)]
)
def test_output_and_each_gradient_equal_the_reference(
    assert_close: AssertClose,
    layout: BlockLayout,
    form: str,
    dtype: torch.dtype,
    routes: int,
    margin: int,
    masked: bool,
    mean: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(routing, "_WIDE_DEVICES", ())  # 16 bits stay 16, as on a GPU
    inputs = make_inputs(layout, dtype, mean)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    mask = torch.rand(2, layout.num_tokens) < 0.7 if masked else None
    options: dict[str, Any] = {"form": form, "key_mask": mask}
    near = call(mhla_local_reference, exact, layout, **options)
    if routes:
        options["chosen"] = choose_blocks(inputs[0], inputs[1], layout, routes, key_mask=mask)
    options["margin"] = margin
    out = call(mhla_local, inputs, layout, **options)
    expected = call(mhla_local_reference, exact, layout, **options)
    same = torch.allclose(expected, near, rtol=0.02)
    assert same == (not routes and not margin), "chosen blocks and a margin make a difference"
    assert out.dtype == dtype
    assert_close(out, expected, dtype)
    # Along what the weight does, or its gradient, a sum over all tokens, is a small rest of large terms.
    moved = call(mhla_local_reference, [*exact[:-1], exact[-1] + 1], layout, **options) - expected
    cotangent = (torch.randn_like(expected) + moved / moved.std()).detach().to(dtype)
    found = torch.autograd.grad(out, inputs, cotangent)
    references = torch.autograd.grad(expected, exact, cotangent.double())
    for name, gradient, reference in zip(NAMES, found, references, strict=True):
        try:
            assert_close(gradient, reference, dtype)
        except AssertionError as error:
            raise AssertionError(f"gradient of {name}: {error}") from error


@pytest.mark.parametrize("form", LOCAL_FORMS)
@pytest.mark.parametrize("routes", [0, 2])
def test_positions_and_a_mask_equal_the_reference(assert_close: AssertClose, form: str, routes: int) -> None:
    layout = LAYOUTS[1]
    inputs = make_inputs(layout)
    angles = torch.rand(layout.num_tokens, 3, dtype=torch.float64)
    mask = torch.rand(2, layout.num_tokens) < 0.5
    mask[1] = False
    options: dict[str, Any] = {"form": form, "key_mask": mask, "rotary_emb": (angles.cos(), angles.sin())}
    if routes:
        options["chosen"] = choose_blocks(inputs[0], inputs[1], layout, routes, key_mask=mask)
    out = call(mhla_local, inputs, layout, **options)
    assert_close(out, call(mhla_local_reference, inputs, layout, **options))
    assert (out[1] == 0).all(), "no key is seen"
    near = window_attention(*inputs[4:6], inputs[2], layout, key_mask=mask, chosen=options.get("chosen"))
    assert (near[1] == 0).all(), "nor by the window"


def test_the_score_of_the_rest_is_held_finer_than_sixteen_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "_WIDE_DEVICES", ())  # as on a GPU
    layout = BlockLayout((8, 8), (2, 4))
    q = torch.ones(1, 1, 64, 16, dtype=torch.bfloat16)
    score = torch.linspace(10, 14, 64)[None, None]  # of the rest; each of the 8 keys has one of 10
    rest = torch.ones(1, 1, 64, 16), score
    out = softmax_in_blocks(q, 2.5 * q, torch.zeros_like(q), layout, None, (0, 0), rest)
    expected = torch.sigmoid(score - 10 - math.log(8))[..., None].expand_as(out)
    # A bfloat16 near 12 is up to .03 off, and so a weight up to .008.
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=3e-3)


def test_one_block_is_softmax_attention(assert_close: AssertClose) -> None:
    layout = BlockLayout((4, 5), (1, 1))
    inputs = make_inputs(layout)
    expected = F.scaled_dot_product_attention(inputs[4], inputs[5], inputs[2])
    assert_close(call(mhla_local, inputs, layout, form="shared"), expected)
    assert_close(window_attention(inputs[4], inputs[5], inputs[2], layout), expected)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_margin_as_wide_as_the_grid_is_softmax_attention(
    assert_close: AssertClose, layout: BlockLayout
) -> None:
    layout = BlockLayout(layout.grid, layout.blocks)
    q, k, v = make_inputs(layout)[:3]
    out = window_attention(q, k, v, layout, margin=max(layout.grid))
    assert_close(out, F.scaled_dot_product_attention(q, k, v))
    beyond = window_attention(q, k, v, layout, margin=10**12)
    assert torch.equal(beyond, out), "a margin ends with the grid, and so does what it costs"
    along = tuple(n if axis == 0 else 0 for axis, n in enumerate(layout.grid))
    axis = BlockLayout(layout.grid, (1, *layout.blocks[1:]))  # all blocks of the first axis are one
    assert_close(window_attention(q, k, v, layout, margin=along), window_attention(q, k, v, axis))


def test_16_bits_on_a_cpu_are_float32_inside_the_window(assert_close: AssertClose) -> None:
    layout = LAYOUTS[0]
    q, k, v = (x.detach() for x in make_inputs(layout, torch.bfloat16)[:3])
    expected = window_attention(q.double(), k.double(), v.double(), layout)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = window_attention(q, k, v, layout)
    assert_close(out, expected.float())
    narrow, keys, values = (layout.pack(x).flatten(0, 1) for x in (q, k, v))
    other = F.scaled_dot_product_attention(narrow, keys, values).unflatten(0, q.shape[:2])
    assert (layout.unpack(other) - expected).abs().max() > 1e-3, "16 bits would show"


def test_scores_far_from_zero_stay_finite() -> None:
    layout = LAYOUTS[0]
    q, k, v, mixing, window_q, window_k, weight = make_inputs(layout, torch.float32)
    for scale in (100.0, -100.0):
        window = (window_q.abs() * 10, scale * window_k.abs())
        out = mhla_local(q, k, v, mixing, layout, window=window, weight=weight, form="shared")
        assert out.isfinite().all()


def shifted(layout: BlockLayout, score: float, dtype: torch.dtype) -> list[Tensor]:
    """q, k and v with scores that differ by ones around a number, in which softmax does not see it."""
    q, k, v = torch.randn(3, 2, 3, layout.num_tokens, 16, dtype=torch.float64)
    q[..., 0], k[..., 0] = 64, score / 16
    return [x.to(dtype).requires_grad_() for x in (q, k, v)]


def seen_keys(layout: BlockLayout, margin: int = 0) -> Tensor:
    """Which keys a window holds, bool ``[N, N]``."""
    token, there = layout.reach(margin)
    seen = torch.zeros(layout.num_blocks, layout.num_tokens, dtype=torch.int64)
    return seen.scatter_add(1, token, there.long())[layout.block_index()] > 0


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float64, 1e-9), (torch.float32, 1e-2), (torch.bfloat16, 2e-2)], ids=str
)
@pytest.mark.parametrize("score", [-12_800.0, 0.0, 12_800.0])
@pytest.mark.parametrize(
    ("grid", "blocks", "options"),
    [
        ((8, 8), (2, 4), {}),
        ((7, 9), (3, 2), {"margin": 1}),
        ((7, 9), (3, 2), {"masked": True}),
        ((8, 8), (2, 4), {"masked": True, "margin": 1}),
        ((8, 8), (1, 1), {}),
        ((64,), (4,), {"causal": True}),
        ((64,), (4,), {"causal": True, "masked": True}),
    ],
    ids=str,
)
def test_a_shift_of_all_scores_is_not_seen(
    grid: tuple[int, ...], blocks: tuple[int, ...], options: dict[str, Any], score: float, dtype: torch.dtype,
    limit: float,
) -> None:  # fmt: skip
    """Against softmax attention in float64 from the same numbers; a query that sees no key gets 0."""
    layout = BlockLayout(grid, blocks)
    inputs = shifted(layout, score, dtype)
    causal, margin = options.get("causal", False), options.get("margin", 0)
    seen = seen_keys(layout, margin).expand(2, 1, -1, -1)
    mask = None
    if options.get("masked"):
        mask = torch.rand(2, layout.num_tokens) < 0.7
        mask[:, layout.block_index() < 2] = False  # whole blocks hidden
        seen = seen & mask[:, None, None]
    seen = seen.tril() if causal else seen
    exact = [x.detach().double().requires_grad_() for x in inputs]
    outs = [window_attention(*inputs, layout, key_mask=mask, margin=margin, causal=causal)]
    if not causal:  # which has one path
        outs.append(softmax_of_scores(*inputs, layout, mask, layout.margins(margin), None))
    # The same shift, taken away before.
    q, k, v = exact
    keys = torch.cat((k[..., :1] - score / 16, k[..., 1:]), -1)
    some = seen.any(-1, keepdim=True)
    expected = F.scaled_dot_product_attention(q, keys, v, attn_mask=seen | ~some).where(some, 0)
    cotangent = torch.randn_like(expected)
    wanted = [expected, *torch.autograd.grad(expected, exact, cotangent)]
    for out in outs:
        found = [out, *torch.autograd.grad(out, inputs, cotangent.to(out.dtype))]
        for a, b in zip(found, wanted, strict=True):
            # Of the gradient of q not the channel of the shift, which adds 0 times a large number to it.
            difference = (a.double() - b)[..., 1:]
            assert difference.norm() <= limit * b[..., 1:].norm()
        assert not out.masked_fill(some, 0).any()


@pytest.mark.parametrize("score", [-12_800.0, 12_800.0])
@pytest.mark.parametrize(
    ("form", "routes", "margin", "masked"),
    [
        ("gate", 0, 0, False),
        ("gate", 0, 1, False),
        ("gate", 2, 0, False),
        ("gate", 2, 0, True),
        ("shared", 0, 0, False),
        ("shared", 2, 1, True),
    ],
)
def test_windows_far_from_zero_equal_the_reference(
    form: str, routes: int, margin: int, masked: bool, score: float
) -> None:
    layout = BlockLayout((8, 8), (2, 4))
    inputs = make_inputs(layout)
    window_q, window_k, _ = shifted(layout, score, torch.float64)
    inputs[4:6] = window_q, window_k
    mask = torch.rand(2, 64) < 0.7 if masked else None
    if mask is not None:
        mask[:, layout.block_index() < 5] = False
    chosen = choose_blocks(window_q, window_k, layout, routes, key_mask=mask) if routes else None
    outs = [
        call(each, inputs, layout, form=form, key_mask=mask, margin=margin, chosen=chosen)
        for each in (mhla_local, mhla_local_reference)
    ]
    cotangent = torch.randn_like(outs[0])
    grads = [torch.autograd.grad(out, inputs, cotangent) for out in outs]
    for a, b in zip((outs[0], *grads[0]), (outs[1], *grads[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("form", LOCAL_FORMS)
@pytest.mark.parametrize("score", [-12_800.0, 12_800.0])
def test_where_no_other_block_is_seen_scores_may_be_of_any_size(score: float, form: str) -> None:
    """Beside other blocks they may not: "shared" weighs against them."""
    layout = BlockLayout((8, 8), (1, 2))
    inputs = [x.detach() for x in make_inputs(layout)]
    inputs[3], inputs[6] = torch.eye(2).double(), torch.full((3,), 40.0).double()
    inputs[4], inputs[5], _ = shifted(layout, score, torch.float64)
    found, wanted = (call(each, inputs, layout, form=form) for each in (mhla_local, mhla_local_reference))
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)
    own = F.scaled_dot_product_attention(inputs[4], inputs[5], inputs[2], attn_mask=seen_keys(layout))
    torch.testing.assert_close(found, own, rtol=1e-8, atol=1e-8)


def test_float16_holds_a_rest_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "_WIDE_DEVICES", ())  # as on a GPU
    layout = BlockLayout((8, 8), (2, 4))
    for score in (-12_800.0, 12_800.0):
        q, k, v = inputs = shifted(layout, score, torch.float16)
        rest = torch.zeros_like(v, dtype=torch.float32), torch.full(q.shape[:3], routing.NOTHING)
        with_rest = softmax_in_blocks(q, k, v, layout, None, (0, 0), rest)
        expected = F.scaled_dot_product_attention(*(x.double() for x in inputs), attn_mask=seen_keys(layout))
        assert (with_rest - expected).norm() < 1e-2 * expected.norm()
        grads = torch.autograd.grad(with_rest.sum(), inputs)
        assert all(x.isfinite().all() for x in grads)
    hidden = torch.zeros(2, 64, dtype=torch.bool)
    for each in (None, rest):
        out = softmax_in_blocks(q, k, v, layout, hidden, (0, 0), each)
        grads = torch.autograd.grad(out.sum(), inputs)
        assert not out.any()
        assert not any(x.any() for x in grads)


def test_the_causal_form_joins_the_causal_operator(assert_close: AssertClose) -> None:
    layout = BlockLayout((24,), (4,))
    q, k, v, mixing, window_q, window_k, _ = make_inputs(layout)
    past = mixing.tril(-1)
    far = mhla_causal(q, k, v, past, 6)
    sums = mhla_causal(q, k, torch.ones_like(v[..., :1]), past, 6, normalizer="none")[..., 0]
    out = window_attention(
        window_q, window_k, v, layout, rest=(far, sums.clamp_min(1e-30).log()), causal=True
    )
    block = layout.block_index()
    earlier = torch.ones(24, 24).tril().bool()
    near = (window_q @ window_k.mT / math.sqrt(6)).exp() * (earlier & (block[:, None] == block))
    others = (past[..., block, :][..., block]) * ((F.relu(q) + 1e-6) @ (F.relu(k) + 1e-6).mT)
    weights = near + others
    assert_close(out, weights @ v / weights.sum(-1, keepdim=True))


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float64, 1e-6), (torch.float32, 1e-4), (torch.bfloat16, 3e-2)], ids=str
)
def test_a_row_of_w_that_sees_no_other_block_learns_to(dtype: torch.dtype, limit: float) -> None:
    """Two blocks start so by locality. There is no derivative to both sides: W grows from zero."""
    layout = BlockLayout((4, 4), (1, 2))
    *tensors, _, window_q, window_k, weight = [x.detach().to(dtype) for x in make_inputs(layout)]
    cotangent = torch.randn_like(tensors[2])

    def value(mixing: Tensor, dtype: torch.dtype) -> Tensor:
        inputs = [x.to(dtype) for x in (*tensors, mixing, window_q, window_k, weight)]
        out = call(mhla_local, inputs, layout, form="shared")
        return (out.double() * cotangent.double()).sum()

    mixing = torch.eye(2, dtype=dtype).expand(3, 2, 2).clone().requires_grad_()
    (found,) = torch.autograd.grad(value(mixing, dtype), mixing)
    start = value(mixing.double(), torch.float64).item()
    for head, row in itertools.product(range(3), range(2)):
        moved = mixing.detach().double().clone()
        moved[head, row, 1 - row] = 1e-7
        expected = (value(moved, torch.float64).item() - start) / 1e-7
        assert abs(expected) > 0.01
        assert found[head, row, 1 - row].item() == pytest.approx(expected, rel=limit, abs=10 * limit)


def test_rotated_windows_see_offsets_alone() -> None:
    layout = BlockLayout((12,), (2,))
    q, k, v = (x[:, :, :1].expand(-1, -1, 12, -1) for x in make_inputs(layout)[:3])
    angles = torch.arange(12.0, dtype=torch.float64)[:, None] * torch.tensor([0.3, 0.7, 1.1])
    rotary = (angles.cos(), angles.sin())
    v = torch.randn(2, 3, 6, 6, dtype=torch.float64).repeat(1, 1, 2, 1)
    out = window_attention(apply_rotary_emb(q, rotary), apply_rotary_emb(k, rotary), v, layout)
    torch.testing.assert_close(out[:, :, :6], out[:, :, 6:])


def test_windows_that_do_not_fit_are_refused() -> None:
    layout = LAYOUTS[0]
    q, k, v = make_inputs(layout)[:3]
    with pytest.raises(ValueError, match="q and k must have the same B, H and d"):
        window_attention(q[:1], k, v, layout)
    with pytest.raises(ValueError, match="with the same B, H, N for k and v"):
        window_attention(q, k[:, :, 1:], v, layout)
    with pytest.raises(ValueError, match=rf"q hold {q.shape[2] - 1} tokens"):
        window_attention(q[:, :, 1:], k, v, layout)


@pytest.mark.parametrize(
    ("extra", "options", "message"),
    [
        (
            None,
            {"margin": 2},
            r"has no margin, .* later tokens .* got 2: leave that out, or set causal=False",
        ),
        (None, {"margin": 0.5}, "has no margin, .* got 0.5"),
        (
            None,
            {"chosen": torch.zeros(2, 3, 16, 1, dtype=torch.int64)},
            r"has no chosen blocks, .* got \(2, 3, 16, 1\)",
        ),
        ((0, 1), {}, r"has no extra tokens, .* got \(0, 1\)"),
    ],
)
def test_what_a_causal_window_does_not_have_is_refused(
    extra: tuple[int, int] | None, options: dict[str, Any], message: str
) -> None:
    layout = BlockLayout((16,), (4,), extra)
    q, k, v = make_inputs(layout)[:3]
    with pytest.raises(ValueError, match=message):
        window_attention(q, k, v, layout, causal=True, **options)


def test_another_form_is_refused() -> None:
    layout = LAYOUTS[0]
    with pytest.raises(ValueError, match=r"local window must be of shared, gate, got 'sum'"):
        call(mhla_local, make_inputs(layout), layout, form="sum")
