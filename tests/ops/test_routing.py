"""Softmax in blocks that queries choose, forward and each gradient, against the O(N^2) reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mhla_diffusion import MHLA, MHLAConfig
from mhla_diffusion.ops import (
    LOCAL_FORMS,
    BlockLayout,
    choose_blocks,
    mhla_local,
    mhla_local_reference,
    routed_attention,
    window_attention,
)

AssertClose = Callable[..., None]

LAYOUTS = [
    BlockLayout((8, 8), (2, 4)),
    BlockLayout((7, 9), (3, 2)),
    BlockLayout((5, 5, 3), (2, 2, 2)),
    BlockLayout((6, 6), (2, 2), (3, 2)),
]
NAMES = ("q", "k", "v", "mixing", "window q", "window k", "weight")


def make_inputs(layout: BlockLayout, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    q, k, v, window_q, window_k = torch.randn(5, 2, 3, layout.num_tokens, 6, dtype=torch.float64)
    mixing = torch.rand(3, layout.num_blocks, layout.num_blocks, dtype=torch.float64)
    tensors = (q, k, v + 0.5, mixing, window_q, window_k, torch.randn(3, dtype=torch.float64))
    return [x.to(dtype).requires_grad_() for x in tensors]


def call(
    operator: Callable[..., Tensor], inputs: list[Tensor], layout: BlockLayout, **options: Any
) -> Tensor:
    q, k, v, mixing, *window, weight = inputs
    return operator(q, k, v, mixing, layout, window=tuple(window), weight=weight, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", LOCAL_FORMS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_output_and_each_gradient_equal_the_reference(
    assert_close: AssertClose, layout: BlockLayout, form: str, dtype: torch.dtype, masked: bool
) -> None:
    inputs = make_inputs(layout, dtype)
    mask = torch.rand(2, layout.num_tokens) < 0.7 if masked else None
    chosen = choose_blocks(inputs[0], inputs[1], layout, 2, key_mask=mask)
    options: dict[str, Any] = {"form": form, "chosen": chosen, "key_mask": mask}
    out = call(mhla_local, inputs, layout, **options)
    expected = call(mhla_local_reference, inputs, layout, **options)
    without = call(mhla_local_reference, inputs, layout, form=form, key_mask=mask)
    assert out.dtype == dtype
    assert not torch.allclose(expected, without, rtol=0.02), "the chosen blocks make no difference"
    assert_close(out, expected, dtype)
    cotangent = torch.randn_like(expected)
    found = torch.autograd.grad(out, inputs, cotangent.to(dtype))
    references = torch.autograd.grad(expected, inputs, cotangent)
    for name, gradient, reference in zip(NAMES, found, references, strict=True):
        if name == "weight" and dtype == torch.bfloat16:
            # A sum over tokens of terms of both signs, each rounded to bfloat16.
            assert (gradient - reference).norm() <= 0.05 * reference.norm()
            continue
        try:
            assert_close(gradient, reference, dtype)
        except AssertionError as error:
            raise AssertionError(f"gradient of {name}: {error}") from error


@pytest.mark.parametrize("layout", LAYOUTS[:3], ids=str)
def test_all_blocks_chosen_are_softmax_attention(assert_close: AssertClose, layout: BlockLayout) -> None:
    q, k, v = torch.randn(3, 2, 3, layout.num_tokens, 6, dtype=torch.float64)
    chosen = choose_blocks(q, k, layout, 1000)
    assert chosen.shape[-1] == layout.num_blocks - 1
    out = window_attention(q, k, v, layout, rest=routed_attention(q, k, v, chosen, layout))
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


def test_scores_far_from_zero_stay_finite() -> None:
    layout = LAYOUTS[0]
    q, k, v = torch.randn(3, 1, 2, 64, 6)
    for scale in (100.0, -100.0):
        out, sums = routed_attention(q.abs() * 10, scale * k.abs(), v, choose_blocks(q, k, layout, 2), layout)
        assert out.isfinite().all()
        assert sums.isfinite().all()


@pytest.mark.parametrize("local", ["shared", "gate", "only"])
def test_the_module_routes_trains_and_keeps_its_config(local: str) -> None:
    config = MHLAConfig(blocks=(2, 2), local=local, routed_blocks=2)
    assert MHLAConfig.from_json(config.to_json()) == config
    assert "routed_blocks" not in MHLAConfig(local=local).to_dict()
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
        {"routed_blocks": 2},
        {"routed_blocks": -1, "local": "shared"},
        {"routed_blocks": 1.5, "local": "shared"},
        {"routed_blocks": 2, "local": "only", "blocks": 1},
    ],
)
def test_routes_without_a_window_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="routed_blocks"):
        MHLAConfig(**settings)


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
