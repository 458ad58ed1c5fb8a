"""Softmax in blocks that queries choose; test_window.py holds it against the O(N^2) reference."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mhla_diffusion import MHLA, MHLAConfig
from mhla_diffusion.ops import (
    BlockLayout,
    choose_blocks,
    routed_attention,
    window_attention,
)

AssertClose = Callable[..., None]

LAYOUTS = [
    BlockLayout((8, 8), (2, 4)),
    BlockLayout((7, 9), (3, 2)),
    BlockLayout((5, 5, 3), (2, 2, 2)),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_all_blocks_chosen_are_softmax_attention(assert_close: AssertClose, layout: BlockLayout) -> None:
    q, k, v = torch.randn(3, 2, 3, layout.num_tokens, 6, dtype=torch.float64)
    chosen = choose_blocks(q, k, layout, 1000)
    assert chosen.shape[-1] == layout.num_blocks - 1
    out = window_attention(q, k, v, layout, chosen=chosen)
    assert_close(out, F.scaled_dot_product_attention(q, k, v))


def test_a_query_chooses_the_block_of_its_key_and_never_its_own() -> None:
    layout = BlockLayout((8, 8), (2, 2))
    block = layout.block_index()
    k = torch.zeros(1, 1, 64, 16)
    q = torch.zeros(1, 1, 64, 16)
    wanted = torch.randint(4, (64,))
    k[0, 0, torch.arange(64), block] = 1
    q[0, 0, torch.arange(64), wanted] = 1
    chosen = choose_blocks(q, k, layout, 1)[0, 0, :, 0]
    assert (chosen[wanted != block] == wanted[wanted != block]).all()
    assert (choose_blocks(q, k, layout, 3) != block[:, None]).all()


@pytest.mark.parametrize("hidden", [slice(0, 32), slice(32, 64)], ids=str)
def test_where_few_blocks_hold_a_key_the_own_one_is_not_chosen(
    assert_close: AssertClose, hidden: slice
) -> None:
    layout = BlockLayout((8, 8), (4, 4))
    q, k, v = torch.randn(3, 2, 2, 64, 8)
    mask = torch.ones(2, 64, dtype=torch.bool)
    mask[:, hidden] = False
    chosen = choose_blocks(q, k, layout, 15, key_mask=mask)
    assert (chosen != layout.block_index()[:, None]).all()
    out = window_attention(q, k, v, layout, chosen=chosen, key_mask=mask)
    assert_close(out, F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None]))


@pytest.mark.parametrize(("dtype", "scale"), [(torch.bfloat16, 4.0), (torch.float16, 4.0)], ids=str)
def test_scores_of_16_bits_are_not_rounded(dtype: torch.dtype, scale: float) -> None:
    layout = BlockLayout((8, 8), (2, 2))
    q, k, v = (x.to(dtype) for x in torch.randn(3, 1, 2, 64, 64))
    q = q * scale
    chosen = choose_blocks(q, k, layout, 3)
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    for autocast in (False, True):
        with torch.autocast("cpu", dtype, enabled=autocast):
            found = window_attention(q, k, v, layout, chosen=chosen)
        assert (found - expected).abs().max() < 1e-5
    far = q + 40, k + 40, v
    assert window_attention(*far, layout, chosen=choose_blocks(*far[:2], layout, 3)).isfinite().all()


@pytest.mark.parametrize("exact", [False, True], ids=["gaussian", "exact"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_blocks_are_ranked_by_what_they_hold_or_would_of_gaussian_scores(
    layout: BlockLayout, masked: bool, exact: bool
) -> None:
    q, k = torch.randn(2, 2, 3, layout.num_tokens, 6) + 1
    mask = torch.rand(2, layout.num_tokens) < 0.6 if masked else None
    block = layout.block_index()
    held = torch.full((2, 3, layout.num_tokens, layout.num_blocks), -math.inf)
    for sample, number in itertools.product(range(2), range(layout.num_blocks)):
        inside = block == number if mask is None else (block == number) & mask[sample]
        scores = (q[sample] @ k[sample, :, inside].mT) / math.sqrt(6)
        variance, mean = torch.var_mean(scores, -1, correction=0)
        gaussian = scores.shape[-1] * (mean + variance / 2).exp()
        held[sample, ..., number] = scores.exp().sum(-1) if exact else gaussian
        held[sample][:, block == number, number] = -math.inf
    found = choose_blocks(q, k, layout, 3, exact=exact, key_mask=mask)
    assert (found == held.topk(3, -1).indices).double().mean() > 0.99  # some are equal but for rounding


def test_a_query_finds_one_key_among_random_ones() -> None:
    """Where heads have 16 channels, 16 keys are too many for a sum to tell which block holds one of them."""
    layout = BlockLayout((16, 16), (4, 4))
    k = F.normalize(torch.randn(8, 1, 256, 16), dim=-1)
    wanted = torch.randperm(256)
    chosen = choose_blocks(40 * k[:, :, wanted], k, layout, 4)
    block = layout.block_index()
    further = block[wanted] != block
    found = (chosen == block[wanted][:, None]).any(-1)[..., further].double().mean()
    assert 0.9 < found < 1
    exactly = choose_blocks(40 * k[:, :, wanted], k, layout, 1, exact=True)
    assert (exactly == block[wanted][:, None])[..., further, :].all()
    sums = 40 * k[:, :, wanted] @ layout.block_sums(k, k.dtype).mT
    by_sums = sums.scatter(-1, block[:, None].expand(8, 1, 256, 1), -math.inf).topk(4, -1).indices
    assert (by_sums == block[wanted][:, None]).any(-1)[..., further].double().mean() < 0.8


def test_scores_far_from_zero_stay_finite() -> None:
    layout = LAYOUTS[0]
    q, k, v = torch.randn(3, 1, 2, 64, 6)
    for scale in (100.0, -100.0):
        out, sums = routed_attention(q.abs() * 10, scale * k.abs(), v, choose_blocks(q, k, layout, 2), layout)
        assert out.isfinite().all()
        assert sums.isfinite().all()


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-9), (torch.float32, 1e-2)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("score", [-12_800.0, 0.0, 12_800.0])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_shift_of_all_scores_is_not_seen(
    layout: BlockLayout, score: float, masked: bool, dtype: torch.dtype, limit: float
) -> None:
    """With all blocks it is softmax attention, in float64 from the same numbers."""
    q, k, v = torch.randn(3, 2, 2, layout.num_tokens, 16)
    q[..., 0], k[..., 0] = 64, score / 16
    inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    block = layout.block_index()
    mask = (block > 1) & (block != 3) if masked else torch.ones_like(block, dtype=torch.bool)
    mask = mask.expand(2, -1)
    chosen = choose_blocks(*inputs[:2], layout, 1000, key_mask=mask)
    whole = window_attention(*inputs, layout, chosen=chosen, key_mask=mask)
    others, log_sums = routed_attention(*inputs, chosen[..., :2], layout, key_mask=mask)
    near = (chosen[..., None, :2] == block[:, None]).any(-1) & mask[:, None, None]
    expected = [
        F.scaled_dot_product_attention(*exact, attn_mask=seen)
        for seen in (mask[:, None, None].expand_as(near), near)
    ]
    cotangent = torch.randn_like(expected[0])
    for found, wanted in zip((whole, others), expected, strict=True):
        both = [
            (out, *torch.autograd.grad(out, tensors, cotangent.to(out.dtype)))
            for out, tensors in ((found, inputs), (wanted, exact))
        ]
        for a, b in zip(*both, strict=True):
            # Of the gradient of q not the channel of the shift, which adds 0 times a large number to it.
            a, b = (x[..., 1:] for x in (a.double(), b))
            assert (a - b).norm() <= limit * b.norm()
    assert (log_sums > score - 100).all()


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (torch.zeros(1, 2, 64, 1, dtype=torch.int32), r"int64 \[B, H, N, r\] = \[1, 2, 64, r\].*int32"),
        (torch.zeros(1, 2, 64, 1), r"int64 .*got torch.float32"),
        (torch.zeros(1, 2, 5, 1, dtype=torch.int64), r"got torch.int64 \(1, 2, 5, 1\)"),
        (torch.zeros(1, 2, 64, dtype=torch.int64), r"got torch.int64 \(1, 2, 64\)"),
        (torch.zeros((), dtype=torch.int64), r"got torch.int64 \(\)"),
        (torch.full((1, 2, 64, 1), -1), r"of the 8 blocks of the grid, 0 to 7, .*choose_blocks.*got -1"),
        (torch.full((1, 2, 64, 1), 8), r"0 to 7, .*got 8"),
    ],
)
def test_chosen_blocks_that_are_none_are_refused(chosen: torch.Tensor, message: str) -> None:
    q, k, v = torch.randn(3, 1, 2, 64, 6).unbind()
    with pytest.raises(ValueError, match=message):
        window_attention(q, k, v, LAYOUTS[0], chosen=chosen)
    with pytest.raises(ValueError, match=message):
        routed_attention(q, k, v, chosen, LAYOUTS[0])


@pytest.mark.parametrize("count", [-1, 1.5, None])
def test_a_count_that_is_none_is_refused(count: Any) -> None:
    q = torch.randn(1, 2, 64, 6)
    with pytest.raises(ValueError, match=rf"count must be an integer of at least 0 blocks .*got {count}"):
        choose_blocks(q, q, LAYOUTS[0], count)
    assert choose_blocks(q, q, LAYOUTS[0], 0).shape == (1, 2, 64, 0)


def test_a_route_without_keys_adds_nothing() -> None:
    layout = LAYOUTS[0]
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 2, 64, 6).unbind())
    mask = torch.zeros(1, 64, dtype=torch.bool)
    chosen = choose_blocks(q, k, layout, 2, key_mask=mask)
    for out in (
        routed_attention(q, k, v, chosen, layout, key_mask=mask)[0],
        window_attention(q, k, v, layout, chosen=chosen, key_mask=mask),
    ):
        assert not out.any()
        assert not any(x.any() for x in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("local", ["shared", "gate", "only"])
@pytest.mark.parametrize(
    "wider",
    [
        {"routed_blocks": 2},
        {"routed_blocks": 2, "exact_routing": True},
        {"local_margin": 1},
        {"local_margin": (0, 2)},
    ],
    ids=str,
)
def test_the_module_sees_further_trains_and_keeps_its_config(local: str, wider: dict[str, Any]) -> None:
    config = MHLAConfig(blocks=(2, 2), local=local, **wider)
    assert MHLAConfig.from_dict(config.to_dict()) == config
    assert MHLAConfig(local=local).to_dict().keys().isdisjoint(wider)
    module = MHLA(config, heads=2, head_dim=8, grid=(8, 8))
    near = MHLA(MHLAConfig(blocks=(2, 2), local=local), heads=2, head_dim=8, grid=(8, 8))
    near.load_state_dict(module.state_dict())
    q, k, v = (torch.randn(2, 2, 64, 8, requires_grad=True) for _ in range(3))
    out = module(q, k, v, grid=(8, 8))
    assert (out - near(q, k, v, grid=(8, 8))).abs().max() > 1e-2
    out.square().mean().backward()
    assert all(x.grad is not None and x.grad.abs().max() > 0 for x in (q, k, v, *module.parameters()))
    assert module(q[:, :, :1], k[:, :, :1], v[:, :, :1], grid=(1, 1)).isfinite().all(), "one block"


@pytest.mark.parametrize(
    "settings",
    [
        {"routed_blocks": 2, "local": None},
        {"routed_blocks": -1, "local": "shared"},
        {"routed_blocks": 1.5, "local": "shared"},
        {"routed_blocks": 2, "local": "only", "blocks": 1},
        {"exact_routing": True, "local": "shared"},
        {"local_margin": 2, "local": None},
        {"local_margin": (1, -1), "local": "gate"},
        {"local_margin": 1.5, "local": "gate"},
        {"local_margin": (), "local": "gate"},
        {"local_margin": 1, "local": "only", "blocks": 1},
    ],
)
def test_what_no_window_can_see_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        MHLAConfig(**settings)


def test_a_margin_of_other_axes_than_the_grid_is_refused() -> None:
    config = MHLAConfig(blocks=4, local="shared", local_margin=(1, 1, 1))
    with pytest.raises(ValueError, match=r"local_margin \(1, 1, 1\) must be one number or 2"):
        MHLA(config, heads=1, head_dim=8, grid=(8, 8))


def test_time_is_linear_in_tokens_by_products() -> None:
    """Products of matrices as torch counts them: four times the tokens in blocks as large cost four times."""
    from torch.utils.flop_counter import FlopCounterMode

    flops = []
    for side in (16, 32):
        layout = BlockLayout((side, side), (side // 4, side // 4))
        q, k, v = torch.randn(3, 1, 1, side * side, 8)
        chosen = choose_blocks(q, k, layout, 3)
        with FlopCounterMode(display=False) as counter:
            routed_attention(q, k, v, chosen, layout)
        flops.append(counter.get_total_flops())
    assert math.isclose(flops[1], 4 * flops[0], rel_tol=0.01)


def test_blocks_of_more_tokens_than_are_looked_at_together_are_chosen_by_all_scores() -> None:
    layout = BlockLayout((8, 16), (2, 2))  # blocks of 32 tokens, d 2
    q, k = torch.randn(2, 1, 2, 128, 2)
    own, scores = layout.block_index(), q @ k.mT / 2**0.5
    held = torch.stack([scores[..., own == block].logsumexp(-1) for block in range(4)], -1)
    held = held.masked_fill(own[:, None] == torch.arange(4), -torch.inf)
    assert torch.equal(choose_blocks(q, k, layout, 1, exact=True)[..., 0], held.argmax(-1))


def test_the_same_blocks_are_chosen_under_autocast() -> None:
    layout = BlockLayout((8, 8), (4, 4))
    q, k = torch.randn(2, 4, 2, 64, 16)
    for exact in (False, True):
        expected = choose_blocks(q, k, layout, 3, exact=exact)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(choose_blocks(q, k, layout, 3, exact=exact), expected)
