from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mhla_diffusion import MHLA, MHLAConfig
from mhla_diffusion.ops import (
    BlockLayout,
    apply_rotary_emb,
    initial_mixing,
    mhla_local_reference,
    mhla_reference,
    relative_mixing,
    resize_mixing,
    routing,
)

AssertClose = Callable[..., None]


def make_module(
    config: MHLAConfig, grid: tuple[int, ...] = (4, 6)
) -> tuple[MHLA, tuple[Tensor, ...], Tensor]:
    module = MHLA(config, heads=2, head_dim=6, grid=grid)
    tokens = BlockLayout(grid, module.blocks).num_tokens
    q, k, v = (torch.randn(2, 2, tokens, 6) for _ in range(3))
    return module, (q, k, v), torch.randn(2, tokens, 12)


@pytest.mark.parametrize("grid", [(4, 6), (3, 4, 5)], ids=str)
def test_all_flags_together_by_hand(assert_close: AssertClose, grid: tuple[int, ...]) -> None:
    config = MHLAConfig.paper(blocks=(2,) * len(grid), cpe="identity", gate=True, output_norm=True)
    module, (q, k, v), x = make_module(config, grid)
    assert module.cpe is not None
    assert module.gate is not None
    assert module.norm is not None
    for parameter in module.parameters():
        torch.nn.init.uniform_(parameter, 0.1, 1)
    dense = mhla_reference(q, k, v, module.mixing_matrix(), BlockLayout(grid, module.blocks))
    normed = dense * (dense.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * module.norm.weight.double()
    images = v.double().permute(0, 1, 3, 2).reshape(2, 12, *grid)
    conv = F.conv2d if len(grid) == 2 else F.conv3d
    cpe = conv(images, module.cpe.weight.double(), module.cpe.bias.double(), padding=1, groups=12)
    gate = F.silu(x.double() @ module.gate.weight.double().T + module.gate.bias.double())
    expected = normed.transpose(1, 2).reshape(2, -1, 12) * gate + cpe.flatten(2).transpose(1, 2)
    assert_close(module(q, k, v, grid=grid, hidden_states=x), expected, torch.float32)


@pytest.mark.parametrize("addition", [{"gate": True}, {"cpe": "zero"}, {"qk_conv": True}], ids=str)
def test_parts_for_fine_tuning_start_as_no_change(addition: dict[str, Any]) -> None:
    plain, (q, k, v), x = make_module(MHLAConfig.paper(blocks=4))
    extended, _, _ = make_module(MHLAConfig.paper(blocks=4, **addition))
    arguments: dict[str, Any] = {"grid": (4, 6), "hidden_states": x}
    torch.testing.assert_close(extended(q, k, v, **arguments), plain(q, k, v, **arguments))


@pytest.mark.parametrize("local", ["shared", "gate"])
def test_learned_features_centred_keys_and_a_window_by_hand(assert_close: AssertClose, local: str) -> None:
    config = MHLAConfig(
        blocks=(2, 2), feature_map="hedgehog", center_keys=True, local=local, mixing_relative=True,
        mixing_per_head=True, qk_norm=True,
    )  # fmt: skip
    module, (q, k, v), _ = make_module(config)
    assert module.feature_q is not None
    assert module.feature_k is not None
    assert module.local is not None
    for parameter in module.parameters():
        torch.nn.init.uniform_(parameter, 0.1, 1)
    angles = torch.rand(24, 3)
    rotary = (angles.cos(), angles.sin())
    q0, k0 = (x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
    q0, k0 = q0 * module.norm_q.weight.double(), k0 * module.norm_k.weight.double()  # type: ignore[union-attr]
    centred = k0 - k0.mean(2, keepdim=True)
    features = []
    for x, part in ((q0, module.feature_q), (centred, module.feature_k)):
        y = torch.einsum("bhnd,hed->bhne", x, part.weight.double())
        features.append(torch.cat((y.softmax(-1), (-y).softmax(-1)), -1))
    assert module.mixing is not None
    assert module.mixing.shape == (2, 9)
    doubled = (torch.cat((rotary[0],) * 2, -1), torch.cat((rotary[1],) * 2, -1))
    expected = mhla_local_reference(
        *features, v, relative_mixing(module.mixing, (2, 2)), BlockLayout((4, 6), (2, 2)),
        window=(apply_rotary_emb(q0, rotary), apply_rotary_emb(k0, rotary)), weight=module.local, form=local,
        rotary_emb=doubled,
    )  # fmt: skip
    out = module(q, k, v, grid=(4, 6), rotary_emb=rotary)
    assert_close(out, expected.transpose(1, 2).flatten(2), torch.float32)


@pytest.mark.parametrize(
    ("settings", "extra"),
    [
        ({"local": None}, None), ({"local": "shared"}, None), ({"local": "only"}, None),
        ({"local": None, "extra_block": True}, (1, 2)), ({"local": "shared", "extra_block": True}, (1, 2)),
    ],
    ids=str,
)  # fmt: skip
def test_convolutions_of_queries_and_keys_by_hand(
    settings: dict[str, Any], extra: tuple[int, int] | None
) -> None:
    config = MHLAConfig(blocks=(2, 2), qk_conv=True, qk_norm=True, **settings)
    module, _, _ = make_module(config)
    plain, _, _ = make_module(dataclasses.replace(config, qk_conv=False))
    for parameter in module.parameters():
        torch.nn.init.uniform_(parameter, 0.1, 1)
    plain.load_state_dict({n: w for n, w in module.state_dict().items() if not n.startswith("conv_")})
    before, behind = extra or (0, 0)
    q, k, v = torch.randn(3, 2, 2, 24 + before + behind, 6)
    convolved = []
    for x, name in ((q, "conv_q"), (k, "conv_k")):
        conv, out = getattr(module, name), x.clone()
        images = x[:, :, before : before + 24].permute(0, 1, 3, 2).reshape(2, 12, 4, 6)
        added = F.conv2d(images, conv.weight, conv.bias, padding=1, groups=12)
        out[:, :, before : before + 24] += added.reshape(2, 2, 6, 24).mT
        convolved.append(out)
    arguments: dict[str, Any] = {"grid": (4, 6), "extra": extra}
    found = module(q, k, v, **arguments)
    torch.testing.assert_close(found, plain(*convolved, v, **arguments))
    assert not torch.allclose(found, plain(q, k, v, **arguments), atol=1e-2)


@pytest.mark.parametrize("feature_map", ["hedgehog", "softmax"])
def test_a_window_starts_as_a_mean_over_all_tokens_where_nothing_is_preferred(feature_map: Any) -> None:
    config = MHLAConfig(blocks=4, feature_map=feature_map, local="shared", mixing_init="uniform")
    module, (q, k, v), _ = make_module(config)
    out = module(0 * q, 0 * k, v, grid=(4, 6))
    mean = v.mean(2, keepdim=True).expand_as(v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(out, mean, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("feature_map", ["relu", "crelu", "elu", "power"])
def test_a_window_starts_with_the_weight_that_a_key_of_chance_has_beside_it(feature_map: Any) -> None:
    """One of the softmax weighs about 1, one of MHLA the product of two features over M."""
    settings: dict[str, Any] = {"blocks": 4, "feature_map": feature_map, "mixing_init": "uniform"}
    configs = MHLAConfig(local="shared", **settings), MHLAConfig.paper(normalizer="none", **settings)
    beside, alone = (MHLA(config, heads=1, head_dim=64, grid=(4, 6)) for config in configs)
    assert beside.local is not None
    q, k = torch.randn(2, 20, 1, 24, 64)
    with torch.no_grad():
        products = alone(q, k, torch.ones_like(q), grid=(4, 6)).mean() / 24  # over M already
    assert float(-beside.local) == pytest.approx(float(products.log()), abs=0.1)


def test_centred_keys_leave_out_what_is_masked() -> None:
    module, (q, k, v), _ = make_module(MHLAConfig.paper(blocks=4, center_keys=True))
    mask = torch.rand(2, 24) < 0.7
    out = module(q, k, v, grid=(4, 6), key_mask=mask)
    shifted = torch.where(mask[:, None, :, None], k + 3, torch.nan)
    torch.testing.assert_close(module(q, shifted, v, grid=(4, 6), key_mask=mask), out, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"local": "shared"}, {"local": "auto"}, {"local": "only"}, {"local": "gate", "routed_blocks": 1},
        {"local": "shared", "routed_blocks": 1, "exact_routing": True},
        {"local": "only", "blocks": 1}, {"local": None}, {"local": None, "mixing_content": True},
        {"cpe": "identity"}, {"cpe": "identity", "local": None}, {"feature_map": "hedgehog"},
        {"feature_map": "power"},
        {"qk_conv": True}, {"qk_conv": True, "local": None}, {"qk_norm": True}, {"center_keys": True},
        {"normalizer": "none", "output_norm": True},
    ],
    ids=str,
)  # fmt: skip
def test_what_masked_keys_hold_does_not_matter(settings: dict[str, Any]) -> None:
    module, (q, k, v), _ = make_module(MHLAConfig(**{"blocks": 4, **settings}))
    for name, parameter in module.named_parameters():
        if "conv_" in name or name == "strength":  # start at 0
            torch.nn.init.uniform_(parameter, 0.1, 1)
    mask = torch.rand(2, 24) < 0.7
    for_keys = mask[:, None, :, None]

    def attend(k: Tensor, v: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        inputs = tuple(x.detach().requires_grad_() for x in (q, k, v))
        out = module(*inputs, grid=(4, 6), key_mask=mask)
        wanted = (*inputs, *module.parameters())
        return out, torch.autograd.grad(out.square().sum(), wanted)

    out, gradients = attend(k, v)
    again = attend(k.where(for_keys, torch.nan), v.where(for_keys, torch.inf))
    torch.testing.assert_close(again, (out, gradients))
    assert not torch.allclose(module(q, k, v, grid=(4, 6)), out)


@pytest.mark.parametrize(
    "settings",
    [
        {"blocks": 4}, {"blocks": 4, "center_keys": True}, {"blocks": 4, "local": "gate", "local_margin": 1},
        {"blocks": 4, "local": "only", "local_margin": 1}, {"blocks": 1, "local": "only"},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("mask", [torch.ones(2, 24), torch.ones(2, 23) > 0, torch.ones(2, 1, 1, 24) > 0])
def test_a_mask_of_another_dtype_or_shape_is_refused_in_every_form(
    settings: dict[str, Any], mask: Tensor
) -> None:
    """Softmax would add one of floats to its scores."""
    module, (q, k, v), _ = make_module(MHLAConfig(**settings))
    with pytest.raises(ValueError, match=r"key_mask must be a bool tensor \[B, N\] = \[2, 24\]"):
        module(q, k, v, grid=(4, 6), key_mask=mask)


@pytest.mark.parametrize("constraint", ["clamp", "softmax", "none"])
def test_relative_mixing_starts_near_the_start_and_is_resized(constraint: str) -> None:
    config = MHLAConfig(blocks=(3, 4), mixing_relative=True, constraint=constraint)
    module, (q, k, v), _ = make_module(config, (6, 8))
    start = initial_mixing(BlockLayout((3, 4), (3, 4)), "locality")
    assert module.mixing is not None
    assert module.mixing.shape == (35,)
    matrix = module.mixing_matrix()
    assert (matrix - start).norm() < 0.5 * start.norm()
    assert module(q, k, v, grid=(6, 8)).isfinite().all()
    other = MHLA(MHLAConfig(blocks=(2, 2), mixing_relative=True), heads=2, head_dim=6, grid=(6, 8))
    other.take_mixing(module)
    resized = resize_mixing(matrix, BlockLayout((3, 4), (3, 4)), BlockLayout((2, 2), (2, 2)))
    torch.testing.assert_close(other.mixing_matrix().diagonal(), resized.diagonal().mean().expand(4))


@pytest.mark.parametrize("window", [None, "gate", "shared"])
@pytest.mark.parametrize("constraint", ["clamp", "softmax"])
def test_another_constraint_keeps_the_function_with_a_window_too(window: Any, constraint: str) -> None:
    """Of rows with one sum, which both constraints divide by one number."""
    settings: dict[str, Any] = {"blocks": (2, 2), "local": window, "local_margin": int(window is not None)}
    module, (q, k, v), _ = make_module(MHLAConfig(**settings))
    with torch.no_grad():
        module.mixing.copy_(6 * initial_mixing(BlockLayout((2, 2), (2, 2)), "locality"))
        if window is not None:
            module.local.fill_(0.3)
    other, _, _ = make_module(MHLAConfig(**settings, constraint=constraint))
    other.take_mixing(module)
    before, after = (its(q, k, v, grid=(4, 6)) for its in (module, other))
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)
    if window == "shared":
        torch.nn.init.constant_(other.local, 0.3)
        assert not torch.allclose(other(q, k, v, grid=(4, 6)), before, rtol=1e-2, atol=1e-2)


def test_with_other_blocks_all_others_weigh_what_they_did_against_the_window() -> None:
    module, _, _ = make_module(MHLAConfig(blocks=(2, 2), local="shared", mixing_init="uniform"))
    other, _, _ = make_module(MHLAConfig(blocks=(4, 2), local="shared"))
    assert module.local is not None
    torch.nn.init.constant_(module.local, 0.3)
    other.take_mixing(module)
    # A weight of W, which is 1 / M, times e^w.
    weights = [its.mixing_matrix()[0, -1] * its.local.exp() for its in (module, other)]
    torch.testing.assert_close(weights[1], weights[0])


def test_identity_cpe_adds_v() -> None:
    plain, (q, k, v), _ = make_module(MHLAConfig(blocks=4))
    extended, _, _ = make_module(MHLAConfig(blocks=4, cpe="identity"))
    added = extended(q, k, v, grid=(4, 6)) - plain(q, k, v, grid=(4, 6))
    torch.testing.assert_close(added, v.transpose(1, 2).flatten(2))


def test_softmax_constraint_starts_at_the_start_and_sums_to_one() -> None:
    module, _, _ = make_module(MHLAConfig(blocks=(2, 3), constraint="softmax"))
    expected = initial_mixing(BlockLayout((4, 6), (2, 3)), "locality")
    torch.testing.assert_close(module.mixing_matrix(), expected, atol=2e-3, rtol=0)
    assert module.mixing is not None
    torch.nn.init.normal_(module.mixing, std=5)
    torch.testing.assert_close(module.mixing_matrix().sum(-1), torch.ones(6))


def test_one_block_has_no_mixing_matrix_and_is_linear_attention(assert_close: AssertClose) -> None:
    module, (q, k, v), _ = make_module(MHLAConfig(blocks=1))
    assert not list(module.parameters())
    expected = mhla_reference(q, k, v, torch.ones(1, 1), BlockLayout((4, 6), (1, 1)))
    assert_close(module(q, k, v, grid=(4, 6)), expected.transpose(1, 2).flatten(2), torch.float32)


def test_a_grid_smaller_than_the_blocks_takes_each_token_for_a_block(assert_close: AssertClose) -> None:
    module, _, _ = make_module(MHLAConfig.paper(blocks=(4, 3), constraint="none"))
    q, k, v = torch.randn(3, 1, 2, 10, 6)
    layout = BlockLayout((2, 5), (2, 3))
    mixing = resize_mixing(module.mixing_matrix(), BlockLayout((4, 6), (4, 3)), layout)
    expected = mhla_reference(q, k, v, mixing, layout).transpose(1, 2).flatten(2)
    out = module(q, k, v, grid=(2, 5))
    assert_close(out, expected)
    assert module.mixing is not None
    assert torch.autograd.grad(out.sum(), module.mixing)[0].isfinite().all()
    with pytest.raises(
        ValueError, match=r"grid \(10,\) and blocks \(4, 3\) must have the same number of axes"
    ):
        module(q, k, v, grid=(10,))


def test_qk_norm_is_that_of_each_head(assert_close: AssertClose) -> None:
    module, (q, k, v), _ = make_module(MHLAConfig.paper(blocks=4, qk_norm=True))
    assert module.norm_q is not None
    assert module.norm_k is not None
    for norm in (module.norm_q, module.norm_k):
        torch.nn.init.uniform_(norm.weight, 0.5, 2)
    normed = [
        x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.weight.double()
        for x, norm in ((q, module.norm_q), (k, module.norm_k))
    ]
    dense = mhla_reference(*normed, v, module.mixing_matrix(), BlockLayout((4, 6), module.blocks))
    assert_close(module(q, k, v, grid=(4, 6)), dense.transpose(1, 2).flatten(2), torch.float32)


def test_norms_leave_heads_side_by_side_in_memory_and_change_no_bit() -> None:
    """What projections give is not copied to put heads before tokens."""
    module, tensors, _ = make_module(MHLAConfig.paper(blocks=4, qk_norm=True))
    for norm in (module.norm_q, module.norm_k):
        assert norm is not None
        torch.nn.init.uniform_(norm.weight, 0.5, 2)
    q, k, _ = (x.contiguous() for x in tensors)
    as_projected = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    for apart, inside, projected in zip(
        module.normed(q, k), module.normed(*as_projected), as_projected, strict=True
    ):
        assert torch.equal(apart, inside)
        assert apart.is_contiguous()
        assert inside.stride() == projected.stride()


@pytest.mark.parametrize("per_head", [False, True], ids=["shared", "per head"])
def test_cross_attention_starts_plain_and_learns(assert_close: AssertClose, per_head: bool) -> None:
    config = MHLAConfig(blocks=(2, 3), key_blocks=2, mixing_per_head=per_head)
    module = MHLA(config, heads=2, head_dim=6, grid=(4, 6), key_grid=(7,))
    q, k, v = torch.randn(1, 2, 24, 6), torch.randn(1, 2, 7, 6), torch.randn(1, 2, 7, 6)
    layout, key_layout = BlockLayout((4, 6), (2, 3)), BlockLayout((7,), (2,))
    mask = torch.tensor([[True] * 5 + [False] * 2])
    plain = mhla_reference(
        q,
        k,
        v,
        torch.ones(1, 1),
        BlockLayout((4, 6), (1, 1)),
        key_layout=BlockLayout((7,), (1,)),
        key_mask=mask,
    )
    out = module(q, k, v, grid=(4, 6), key_grid=(7,), key_mask=mask)
    assert_close(out, plain.transpose(1, 2).flatten(2))
    assert module.mixing is not None
    torch.nn.init.uniform_(module.mixing)
    expected = mhla_reference(q, k, v, module.mixing_matrix(), layout, key_layout=key_layout)
    assert_close(module(q, k, v, grid=(4, 6), key_grid=(7,)), expected.transpose(1, 2).flatten(2))
    # One key alone is one block.
    single = module(q, k[:, :, :1], v[:, :, :1], grid=(4, 6), key_grid=(1,))
    torch.testing.assert_close(single, v[:, :, :1].expand(1, 2, 24, 6).transpose(1, 2).flatten(2))


def test_cross_attention_that_lacks_a_part_is_refused() -> None:
    arguments: dict[str, Any] = {"heads": 2, "head_dim": 6, "grid": (4, 6)}
    for config, grid in ((MHLAConfig(key_blocks=2), None), (MHLAConfig(), (7,))):
        with pytest.raises(ValueError, match=r"key_blocks .* and key_grid"):
            MHLA(config, **arguments, key_grid=grid)
    for settings in ({"cpe": "zero"}, {"qk_conv": True}):
        with pytest.raises(ValueError, match=r"convolutions are for self-attention"):
            MHLA(MHLAConfig(key_blocks=2, **settings), **arguments, key_grid=(7,))
    module, (q, k, v), _ = make_module(MHLAConfig(blocks=4))
    with pytest.raises(ValueError, match=r"key_blocks None and key_grid \(24,\)"):
        module(q, k, v, grid=(4, 6), key_grid=(24,))


GOLDEN = Path(__file__).parents[2] / "shared" / "golden"


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="reference outputs are not at hand")
@pytest.mark.parametrize(
    "name",
    [
        "dit_lepe_normalized",
        "wan_gated_normalized_lepe",
        "wan_gated_unnormalized",
        "wan_ungated_unnormalized",
    ],
)
def test_reference_modules_are_reproduced(name: str) -> None:
    """Layers of the public reference code, by loading their weights: the convention ``official``."""
    path = GOLDEN / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        facts = {key: json.loads(value) for key, value in file.metadata().items()}
    tensors = load_file(path)
    weights = {
        key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")
    }
    x, heads, grid = tensors["input"], facts["heads"], tuple(facts["grid"])
    q, k, v, hidden_states = _project(x, weights)
    rotary_emb = (tensors["rotary_cos"], tensors["rotary_sin"]) if "rotary_cos" in tensors else None
    mixing = next(value for key, value in weights.items() if key.endswith("_attn.conv.weight"))[..., 0, 0]
    module = MHLA(
        MHLAConfig(
            blocks=tuple(facts.get("block_layout", (4, 4))),
            normalizer="official" if facts["normalize"] else "none",
            constraint="none",
            cpe="zero" if facts["lepe"] else None,
            gate="g.weight" in weights,
            output_norm="g_norm.weight" in weights,
            eps=facts["eps"],
        ),
        heads=heads, head_dim=facts["dim"] // heads, grid=grid,
    )  # fmt: skip
    names = {"lepe": "cpe", "g": "gate", "g_norm": "norm"}
    state = {
        f"{names[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}": value
        for key, value in weights.items()
        if key.rpartition(".")[0] in names
    }
    module.load_state_dict({"mixing": mixing, **state})
    q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in (q, k, v))
    out = module(q, k, v, grid=grid, hidden_states=hidden_states, rotary_emb=rotary_emb)
    last = "o" if "o.weight" in weights else "to_out.0"
    out = F.linear(out, weights[f"{last}.weight"], weights[f"{last}.bias"])
    error = (out - tensors["output"]).norm() / tensors["output"].norm()
    assert error < 1e-5


def _project(x: Tensor, weights: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and what the gate reads, as the two kinds of reference layer make them."""
    dim = (x.shape[-1],)
    if "to_qkv.weight" in weights:
        x = F.layer_norm(x, dim, weights["norm.weight"], weights["norm.bias"])
        q, k, v = F.linear(x, weights["to_qkv.weight"], weights["to_qkv.bias"]).chunk(3, -1)
        return q, k, v, x
    q, k, v = (F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"]) for name in "qkv")
    q, k = (
        F.rms_norm(q, dim, weights["norm_q.weight"], 1e-6),
        F.rms_norm(k, dim, weights["norm_k.weight"], 1e-6),
    )
    return q, k, v, x


@pytest.mark.parametrize(
    "addition", [{"output_norm": True}, {"normalizer": "paper"}, {"dtype": "bfloat16"}], ids=str
)
def test_sums_that_float16_cannot_hold_are_refused(addition: dict[str, Any]) -> None:
    """Without a denominator and a norm that sees the sums before they are rounded."""
    dtype = getattr(torch, addition.get("dtype", "float16"))
    settings_added = {key: value for key, value in addition.items() if key != "dtype"}
    grid, settings = (1, 130, 128), {"blocks": (1, 2, 2), "normalizer": "none"}
    x = 8 * torch.rand(1, 1, 130 * 128, 4)

    def attend(dtype: torch.dtype, **values: Any) -> torch.Tensor:
        module = MHLA(MHLAConfig(**{**settings, **values}), heads=1, head_dim=4, grid=grid).to(dtype)
        return module(x.to(dtype), x.to(dtype), x.to(dtype), grid=grid)

    with pytest.raises(ValueError, match=r"16384 tokens or more.*use bfloat16 or float32"):
        attend(torch.float16)
    assert attend(dtype, **settings_added).isfinite().all()


class OwnAttention(torch.nn.Module):
    """The module in somebody's own model, whose grid is that of its input."""

    def __init__(self, config: MHLAConfig, grid: tuple[int, int], dim: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = torch.nn.Linear(dim, 3 * dim), torch.nn.Linear(dim, dim)
        self.mhla = MHLA(config, heads=heads, head_dim=dim // heads, grid=grid)

    def forward(self, x: Tensor) -> Tensor:  # [B, H, W, D]
        tokens = x.flatten(1, 2)
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(self.mhla(q, k, v, grid=x.shape[1:3], hidden_states=tokens)).reshape(x.shape)


@pytest.mark.parametrize("fullgraph", [False, True], ids=["", "fullgraph"])
def test_a_compiled_model_takes_its_grid_off_the_shape_of_its_input(fullgraph: bool) -> None:
    model = OwnAttention(MHLAConfig(blocks=(2, 2), cpe="identity", gate=True), (8, 8))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=fullgraph, backend="aot_eager")
    for height, width in ((8, 8), (6, 10), (5, 7)):
        x = torch.randn(2, height, width, 16)
        torch.testing.assert_close(compiled(x), model(x))
        compiled(x).sum().backward()


@pytest.mark.parametrize("local", [None, "auto", "only", "gate"])
def test_an_empty_batch_and_mixed_dtypes_are_taken_with_a_window_too(
    local: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routing, "_WIDE_DEVICES", ())  # as on a GPU
    module, (q, k, v), _ = make_module(MHLAConfig(blocks=4, local=local))
    assert module(q[:0], k[:0], v[:0], grid=(4, 6)).shape == (0, 24, 12)
    assert module(q, k, v.bfloat16(), grid=(4, 6)).dtype == torch.bfloat16
    with torch.no_grad():
        out = module(q, k.double(), v, grid=(4, 6))
    torch.testing.assert_close(out, module(q, k, v, grid=(4, 6)))


def test_convolutions_compute_in_the_dtype_of_v() -> None:
    """Queries and keys may be wider, behind norms or rotary positions in float32."""
    module, (q, k, v), _ = make_module(MHLAConfig(blocks=4, qk_conv=True, cpe="identity"))
    for conv in (module.conv_q, module.conv_k):
        torch.nn.init.uniform_(conv.weight, 0.1, 0.2)  # type: ignore[union-attr]
    expected = module(q, k, v, grid=(4, 6))
    out = module.bfloat16()(q, k, v.bfloat16(), grid=(4, 6))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("local", [None, "auto"])
def test_transforms_of_torch_func_are_taken(local: str | None) -> None:
    """Gradients, those of each sample, derivatives along a direction, and second ones."""
    module, tensors, _ = make_module(MHLAConfig(blocks=4, local=local, feature_map="softmax"))  # smooth
    module, (q, k, v) = module.double(), (x.double() for x in tensors)
    weights = {name: weight.detach() for name, weight in module.named_parameters()}

    def loss(weights: dict[str, Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.func.functional_call(module, weights, (q, k, v), {"grid": (4, 6)}).square().mean()

    loss(dict(module.named_parameters()), q, k, v).backward()
    expected = {name: weight.grad for name, weight in module.named_parameters()}
    torch.testing.assert_close(torch.func.grad(loss)(weights, q, k, v), expected)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0, 0))
    samples = each(weights, *(x[:, None] for x in (q, k, v)))
    torch.testing.assert_close({name: grad.mean(0) for name, grad in samples.items()}, expected)
    along = torch.randn_like(q)
    _, slope = torch.func.jvp(lambda q: loss(weights, q, k, v), (q,), (along,))
    gradient = torch.func.grad(loss, 1)(weights, q, k, v)
    torch.testing.assert_close(slope, (gradient * along).sum())
    _, bend = torch.func.jvp(lambda q: torch.func.grad(loss, 1)(weights, q, k, v), (q,), (along,))
    step = 1e-4 * along
    near = [torch.func.grad(loss, 1)(weights, q + sign * step, k, v) for sign in (1, -1)]
    torch.testing.assert_close(bend, (near[0] - near[1]) / 2e-4, atol=1e-6, rtol=1e-4)


def test_second_gradients_through_a_window_are_there_where_torch_has_them() -> None:
    module, (q, k, v), _ = make_module(MHLAConfig(blocks=4, feature_map="softmax"))
    module, (q, k, v) = module.double(), (x.double().requires_grad_() for x in (q, k, v))
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(lambda *x: module(*x, grid=(4, 6)), (q, k, v), fast_mode=True)
