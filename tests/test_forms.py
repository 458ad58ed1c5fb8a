"""Forms beside the paper's: mixing by content, softmax alone, wide features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mhla_diffusion import MHLA, MHLAConfig
from mhla_diffusion.ops import BlockLayout, mhla_local_reference, mhla_reference

from .test_attention import make_module

AssertClose = Callable[..., None]


@pytest.mark.parametrize("extra", [None, (2, 3)], ids=str)
def test_mixing_by_content_by_hand(assert_close: AssertClose, extra: tuple[int, int] | None) -> None:
    config = MHLAConfig.paper(
        blocks=(2, 2), mixing_content=True, mixing_per_head=True, extra_block=extra is not None
    )
    layout = BlockLayout((4, 6), (2, 2), extra)
    module, _, _ = make_module(config)
    q, k, v = (torch.randn(2, 2, layout.num_tokens, 6, requires_grad=True) for _ in range(3))
    arguments: dict[str, Any] = {"grid": (4, 6), "extra": extra}
    before = module(q, k, v, **arguments)
    assert module.strength is not None
    torch.nn.init.normal_(module.strength)
    mask = torch.ones(2, layout.num_tokens, dtype=torch.bool)
    mask[1, 3:7] = False
    found = module(q, k, v, key_mask=mask, **arguments)
    assert (found - before)[0].abs().max() > 1e-3  # strength 0 is W alone, and others are not

    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    member = F.one_hot(layout.block_index()).double()  # [N, M]
    queries = F.normalize(member.mT @ exact[0], dim=-1)
    keys = F.normalize(member.mT @ (exact[1] * mask[:, None, :, None]), dim=-1)
    scores = 6**0.5 * module.strength.detach().double()[:, None, None] * queries @ keys.mT
    static = module.mixing_matrix().detach().double()
    weights = static * scores.exp()
    weights = weights * static.sum(-1, keepdim=True) / weights.sum(-1, keepdim=True)
    expected = (
        torch.stack(
            [
                mhla_reference(*(x[b : b + 1] for x in exact), weights[b], layout, key_mask=mask[b : b + 1])[
                    0
                ]
                for b in range(2)
            ]
        )
        .transpose(1, 2)
        .flatten(2)
    )
    assert_close(found, expected)
    cotangent = torch.randn_like(found)
    gradients = torch.autograd.grad(found, (q, k, v, module.strength, module.mixing), cotangent)
    for gradient, reference in zip(
        gradients, torch.autograd.grad(expected, exact, cotangent.double()), strict=False
    ):
        assert_close(gradient, reference, torch.float32)
    assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_mixing_by_content_looks_where_keys_are_like_queries() -> None:
    """Two blocks, of which the second is what the first asks for."""
    module, _, _ = make_module(
        MHLAConfig.paper(blocks=(1, 2), mixing_content=True, mixing_init="uniform"), (1, 4)
    )
    assert module.strength is not None
    torch.nn.init.constant_(module.strength, 10.0)
    one, other = torch.eye(6)[:2]
    q = torch.stack((one, one, other, other)).expand(1, 2, 4, 6)
    k = torch.stack((other, other, one, one)).expand(1, 2, 4, 6)
    v = torch.arange(4.0)[:, None].expand(1, 2, 4, 6)
    out = module(q, k, v, grid=(1, 4))
    torch.testing.assert_close(out[0, :, 0], torch.tensor([2.5, 2.5, 0.5, 0.5]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("key_mask", [False, True])
def test_one_block_alone_is_softmax_attention_with_convolution_and_gate(key_mask: bool) -> None:
    config = MHLAConfig(blocks=1, local="only", cpe="zero", gate=True)
    module = MHLA(config, heads=2, head_dim=8, grid=(4, 6))
    assert [name for name, _ in module.named_parameters()] == [
        "cpe.weight", "cpe.bias", "gate.weight", "gate.bias",
    ]  # fmt: skip
    q, k, v = torch.randn(3, 2, 2, 24, 8)
    mask = torch.rand(2, 24) < 0.5 if key_mask else None
    out = module(q, k, v, grid=(4, 6), hidden_states=torch.randn(2, 24, 16), key_mask=mask)
    wide = None if mask is None else mask[:, None, None]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=wide).transpose(1, 2).flatten(2)
    torch.testing.assert_close(out, expected)
    torch.nn.init.normal_(module.cpe.weight)  # type: ignore[union-attr]
    changed = module(q, k, v, grid=(4, 6), hidden_states=torch.randn(2, 24, 16), key_mask=mask)
    assert not torch.allclose(changed, expected)


def test_extra_tokens_join_softmax_of_one_block_and_are_refused_beside_several() -> None:
    module = MHLA(MHLAConfig(blocks=1, local="only", cpe="zero"), heads=2, head_dim=8, grid=(4, 6))
    q, k, v = torch.randn(3, 2, 2, 3 + 24 + 1, 8)
    mask = torch.ones(2, 28, dtype=torch.bool)
    mask[0, 0] = False
    out = module(q, k, v, grid=(4, 6), extra=(3, 1), key_mask=mask)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
    torch.testing.assert_close(out, expected.transpose(1, 2).flatten(2))
    several = MHLA(MHLAConfig(blocks=(2, 2), local="only"), heads=2, head_dim=8, grid=(4, 6))
    with pytest.raises(ValueError, match="no row and column of the mixing matrix for extra tokens"):
        several(q, k, v, grid=(4, 6), extra=(3, 1))


def test_blocks_alone_do_not_see_each_other() -> None:
    module = MHLA(MHLAConfig(blocks=(2, 2), local="only"), heads=2, head_dim=8, grid=(4, 4))
    q, k, v = torch.randn(3, 1, 2, 16, 8)
    before = module(q, k, v, grid=(4, 4))
    v[:, :, 0] += 1  # of the first block: the tokens 0, 1, 4 and 5
    changed = (module(q, k, v, grid=(4, 4)) != before).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [0, 1, 4, 5]
    with pytest.raises(ValueError, match="no features and no block of extra tokens"):
        MHLAConfig(local="only", feature_map="hedgehog")


def test_crelu_is_relu_of_queries_and_keys_and_of_what_they_are_not() -> None:
    module = MHLA(MHLAConfig.paper(blocks=(2, 2), feature_map="crelu"), heads=2, head_dim=8, grid=(4, 4))
    q, k, v = torch.randn(3, 1, 2, 16, 8)
    wide = [torch.cat((x, -x), -1) for x in (q, k)]
    layout = module.config.layout((4, 4))
    expected = mhla_reference(*wide, v, module.mixing_matrix(), layout).transpose(1, 2).flatten(2)
    torch.testing.assert_close(module(q, k, v, grid=(4, 4)), expected.float())


@pytest.mark.parametrize("scale", [1.0, 1e-5, 1e9])
def test_power_features_are_cubes_with_the_norm_of_relu(scale: float) -> None:
    module = MHLA(MHLAConfig.paper(blocks=(2, 2), feature_map="power"), heads=2, head_dim=8, grid=(4, 4))
    q, k, v = torch.randn(3, 1, 2, 16, 8)
    q, k = q * scale, k * scale
    q[0, 0, 3] = -scale  # no feature but eps
    cubes = []
    for x in (q.double(), k.double()):
        relu = x.clamp_min(0)
        norms = [y.square().sum(-1, keepdim=True).sqrt() for y in (relu, relu**3)]
        cubes.append(torch.where(norms[1] > 0, relu**3 * norms[0] / norms[1], 0))
    layout = module.config.layout((4, 4))
    expected = mhla_reference(*cubes, v, module.mixing_matrix(), layout).transpose(1, 2).flatten(2)
    q.requires_grad_()
    out = module(q, k, v, grid=(4, 4))
    torch.testing.assert_close(out, expected.float(), rtol=1e-4, atol=1e-4)
    (gradient,) = torch.autograd.grad(out.square().sum(), q)
    assert gradient.isfinite().all()
    assert gradient.any()


def test_power_features_have_the_gradient_of_their_formula() -> None:
    module = MHLA(MHLAConfig.paper(blocks=(2, 2), feature_map="power"), heads=1, head_dim=4, grid=(4, 4))
    q, k, v = torch.randn(3, 1, 1, 16, 4, dtype=torch.float64)
    module = module.double()
    assert torch.autograd.gradcheck(
        lambda q, k: module(q, k, v, grid=(4, 4)), (q.requires_grad_(), k.requires_grad_())
    )


def test_the_paper_is_one_argument_away() -> None:
    assert MHLAConfig.paper() == MHLAConfig(blocks=16, feature_map="relu", constraint="clamp", local=None)
    assert MHLAConfig.paper(cpe="identity", blocks=(2, 2)) == MHLAConfig(
        blocks=(2, 2), cpe="identity", local=None
    )
    with pytest.raises(ValueError, match="unknown MHLA setting heads"):
        MHLAConfig.paper(heads=2)


def test_the_centre_of_many_keys_is_right_in_float16() -> None:
    config = MHLAConfig.paper(blocks=(4, 4), center_keys=True)
    module = MHLA(config, heads=1, head_dim=8, grid=(128, 128)).half()
    q, k = torch.randn(2, 1, 1, 128 * 128, 8).half()
    q_features, features = module.features(q, k + 8)
    assert torch.equal(q_features, q)
    assert features.float().mean(2).abs().max() < 1e-2


def test_softmax_over_all_tokens_has_derivatives_along_a_direction() -> None:
    module = MHLA(MHLAConfig(blocks=1, local="only"), heads=2, head_dim=6, grid=(4, 6))
    q, k, v, along = torch.randn(4, 2, 2, 24, 6, dtype=torch.float64)
    out, slope = torch.func.jvp(lambda q: module(q, k, v, grid=(4, 6)), (q,), (along,))
    torch.testing.assert_close(out, module(q, k, v, grid=(4, 6)))
    near = [module(q + step * along, k, v, grid=(4, 6)) for step in (1e-5, -1e-5)]
    torch.testing.assert_close(slope, (near[0] - near[1]) / 2e-5, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("local", [None, "gate", "shared"])
def test_eps_is_that_of_the_config(local: Any) -> None:
    module, (q, k, v), _ = make_module(MHLAConfig(blocks=(2, 2), local=local, eps=0.3))
    arguments = (q, k, v, module.mixing_matrix(), BlockLayout((4, 6), (2, 2)))
    if local is None:
        expected = mhla_reference(*arguments, eps=0.3)
    else:
        window: dict[str, Any] = {"window": (q, k), "weight": module.local, "form": local}
        expected = mhla_local_reference(*arguments, eps=0.3, **window)
    found = module(q, k, v, grid=(4, 6))
    torch.testing.assert_close(found, expected.transpose(1, 2).flatten(2).float(), rtol=1e-4, atol=1e-5)


def test_masked_keys_are_hidden_along_a_direction_too() -> None:
    module, (q, k, v), _ = make_module(MHLAConfig(blocks=1, local="only"))
    mask = torch.rand(2, 24) > 0.4

    def attend(q: Tensor) -> Tensor:
        return module(q, k, v, grid=(4, 6), key_mask=mask)

    torch.testing.assert_close(torch.func.jvp(attend, (q,), (q,))[0], attend(q))


def test_sums_before_a_norm_may_be_larger_than_float16_holds() -> None:
    config = MHLAConfig.paper(blocks=(2, 2), normalizer="none", output_norm=True)
    module = MHLA(config, heads=2, head_dim=8, grid=(16, 16))
    q, k, v = 40 * torch.rand(3, 1, 2, 256, 8)
    expected = module(q, k, v, grid=(16, 16))
    found = module.half()(q.half(), k.half(), v.half(), grid=(16, 16))
    torch.testing.assert_close(found.float(), expected, atol=2e-2, rtol=2e-2)


def test_weights_of_softmax_rows_start_where_they_can_learn() -> None:
    module, _, _ = make_module(MHLAConfig(blocks=(2, 2), constraint="softmax"))
    assert isinstance(module.mixing, Tensor)
    assert module.mixing.isfinite().all()


def test_hidden_keys_are_not_of_the_centre() -> None:
    module, (q, k, _), _ = make_module(MHLAConfig(blocks=4, center_keys=True))
    mask = torch.rand(24) > 0.4
    _, found = module.features(q, k, mask.expand(2, 24))
    torch.testing.assert_close(found, k - k[:, :, mask].mean(2, keepdim=True))
