"""Tokens that lie on no grid, in the module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mhla_diffusion import MHLA, MHLAConfig
from mhla_diffusion.ops import (
    BlockLayout,
    apply_rotary_emb,
    extend_mixing,
    mhla_local_reference,
    mhla_reference,
    resize_mixing,
)
from tests.test_attention import make_module

AssertClose = Callable[..., None]


@pytest.mark.parametrize("grid", [(4, 6), (3, 4, 5)], ids=str)
@pytest.mark.parametrize("extra", [(1, 5), (0, 0)], ids=str)
def test_all_flags_together_with_extra_tokens_by_hand(
    assert_close: AssertClose, grid: tuple[int, ...], extra: tuple[int, int]
) -> None:
    blocks = (2,) * len(grid)
    config = MHLAConfig.paper(
        blocks=blocks, cpe="identity", gate=True, output_norm=True, qk_norm=True, extra_block=True
    )
    module, tensors, x = make_module(config, grid)
    for parameter in module.parameters():
        torch.nn.init.uniform_(parameter, 0.1, 1)
    layout = BlockLayout(grid, blocks, extra)
    q, k, v = (F.pad(y, (0, 0, *extra), value=0.7) for y in tensors)
    x = F.pad(x, (0, 0, *extra), value=0.3)
    assert module.norm_q is not None
    assert module.norm_k is not None
    assert module.cpe is not None
    assert module.gate is not None
    assert module.norm is not None

    def normed(y: Tensor, norm: torch.nn.RMSNorm) -> Tensor:
        return y.double() * (y.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.weight.double()

    mask = torch.ones(2, layout.num_tokens, dtype=torch.bool)
    mask[1, -2:] = False
    dense = mhla_reference(
        normed(q, module.norm_q), normed(k, module.norm_k), v, module.mixing_matrix(), layout, key_mask=mask
    )
    out = normed(dense, module.norm).transpose(1, 2).reshape(2, -1, 12)
    out = out * F.silu(x.double() @ module.gate.weight.double().T + module.gate.bias.double())
    shown = mask[:, None, layout.grid_tokens, None] * tensors[2].double()  # to it masked tokens are 0
    images = shown.permute(0, 1, 3, 2).reshape(2, 12, *grid)
    conv = F.conv2d if len(grid) == 2 else F.conv3d
    cpe = conv(images, module.cpe.weight.double(), module.cpe.bias.double(), padding=1, groups=12)
    out[:, layout.grid_tokens] += cpe.flatten(2).transpose(1, 2)
    options: dict[str, Any] = {"grid": grid, "hidden_states": x, "key_mask": mask}
    assert_close(module(q, k, v, extra=extra, **options), out, torch.float32)
    if not any(extra):
        torch.testing.assert_close(module(q, k, v, **options), module(q, k, v, extra=extra, **options))


@pytest.mark.parametrize("local", ["shared", "gate"])
@pytest.mark.parametrize("extra", [(2, 9), (0, 1), (0, 0)], ids=str)
def test_a_window_beside_extra_tokens_is_the_reference(
    assert_close: AssertClose, local: str, extra: tuple[int, int]
) -> None:
    """Extra tokens have a softmax window of their own, with positions of the grid alone and a mask."""
    grid = (5, 6)
    config = MHLAConfig(blocks=(2, 2), extra_block=True, local=local, center_keys=True)
    module = MHLA(config, heads=2, head_dim=6, grid=grid)
    assert module.local is not None
    torch.nn.init.normal_(module.local)
    layout = BlockLayout(grid, (2, 2), extra)
    q, k, v = (torch.randn(2, 2, layout.num_tokens, 6, requires_grad=True) for _ in range(3))
    angles = F.pad(torch.rand(30, 3) * 6, (0, 0, *extra))
    turns = angles.cos(), angles.sin()
    mask = torch.ones(2, layout.num_tokens, dtype=torch.bool)
    mask[1, -1] = False
    inside = layout.grid_tokens
    found = module(
        q, k, v, grid=grid, extra=extra, key_mask=mask, rotary_emb=(turns[0][inside], turns[1][inside])
    )
    counts = mask[:, None, :, None]
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    centred = exact[1] - (exact[1] * counts).sum(2, keepdim=True) / counts.sum(2, keepdim=True)
    expected = mhla_local_reference(
        exact[0], centred, exact[2], module.mixing_matrix(), layout, form=local, weight=module.local,
        window=(apply_rotary_emb(exact[0], turns), apply_rotary_emb(exact[1], turns)), key_mask=mask,
        rotary_emb=turns,
    ).transpose(1, 2).flatten(2)  # fmt: skip
    assert_close(found, expected)
    cotangent = torch.randn_like(found)
    gradients = torch.autograd.grad(found, (q, k, v), cotangent)
    for gradient, reference in zip(
        gradients, torch.autograd.grad(expected, exact, cotangent.double()), strict=True
    ):
        assert_close(gradient, reference, torch.float32)


def test_extra_tokens_join_plain_linear_attention_and_nothing_else_without_a_block(
    assert_close: AssertClose,
) -> None:
    q, k, v = torch.randn(3, 1, 2, 27, 6)
    module, _, _ = make_module(MHLAConfig(blocks=1))
    plain = mhla_reference(q, k, v, torch.ones(1, 1), BlockLayout((27,), (1,)))
    assert_close(module(q, k, v, grid=(4, 6), extra=(1, 2)), plain.transpose(1, 2).flatten(2))
    module, _, _ = make_module(MHLAConfig(blocks=4))
    with pytest.raises(ValueError, match=r"no row and column .* got \(1, 2\): set extra_block=True"):
        module(q, k, v, grid=(4, 6), extra=(1, 2))
    with pytest.raises(ValueError, match="extra_block is for self-attention: leave it out, or key_blocks"):
        MHLAConfig(extra_block=True, key_blocks=2)


def test_the_mixing_of_extra_tokens_is_taken_over_and_fits_another_grid(assert_close: AssertClose) -> None:
    plain, _, _ = make_module(MHLAConfig.paper(blocks=(2, 2)))
    wider, _, _ = make_module(MHLAConfig.paper(blocks=(4, 3), extra_block=True, mixing_per_head=True))
    assert plain.mixing is not None
    torch.nn.init.uniform_(plain.mixing)
    wider.take_mixing(plain)
    layouts = BlockLayout((2, 2), (2, 2), (0, 0)), BlockLayout((4, 3), (4, 3), (0, 0))
    expected = resize_mixing(extend_mixing(plain.mixing), *layouts)
    torch.testing.assert_close(wider.mixing_matrix(), expected.expand(2, 13, 13))
    again, _, _ = make_module(MHLAConfig.paper(blocks=(4, 3)))
    again.take_mixing(wider)
    torch.testing.assert_close(again.mixing_matrix(), expected[:-1, :-1])
    # Fewer tokens than blocks along an axis.
    q, k, v = torch.randn(3, 1, 2, 13, 6)
    small = BlockLayout((2, 5), (2, 3), (3, 0))
    mixing = resize_mixing(expected, layouts[1], small)
    dense = mhla_reference(q, k, v, mixing, small)
    assert_close(wider(q, k, v, grid=(2, 5), extra=(3, 0)), dense.transpose(1, 2).flatten(2), torch.float32)
