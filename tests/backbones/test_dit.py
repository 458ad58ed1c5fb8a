from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from diffusers.models.attention_processor import Attention
from torch import Tensor

from mhla_diffusion import MHLAAttnProcessor, MHLAConfig, MHLADiTTransformer2DModel
from mhla_diffusion.backbones import processors
from mhla_diffusion.backbones.families import square_grid
from mhla_diffusion.backbones.layer_plan import check_blocks
from mhla_diffusion.ops import BlockLayout, mhla_reference, recommended_layout

AssertClose = Callable[..., None]
MakeModel = Callable[..., MHLADiTTransformer2DModel]
MakeStock = Callable[..., DiTTransformer2DModel]
MakeInputs = Callable[..., dict[str, Tensor]]

# Latent sizes: square, wide, tall, four blocks on uneven axes (3 x 5 tokens), larger than the model's own.
SIZES = [(8, 8), (4, 16), (8, 12), (12, 8), (6, 10), (16, 16)]

LAYERS: dict[str, dict[str, Any]] = {
    "mhla": {"attention": "mhla"},
    "linear": {"attention": "linear"},
    "softmax": {"attention": "softmax"},
    "hybrid": {"attention": ["softmax", "mhla"]},
    "hybrid by layers": {"mhla_config": {"blocks": 4, "layers": [0]}},
    "every part": {"mhla_config": {"blocks": [2, 2], "cpe": "zero", "gate": True, "output_norm": True}},
    "per head": {"mhla_config": {"blocks": 2, "mixing_per_head": True, "constraint": "softmax"}},
}


def reference_dit(
    model: MHLADiTTransformer2DModel, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor
) -> Tensor:
    """DiT written out in float64 from the state dict, attention as a dense N x N matrix."""
    weights = {key: value.double() for key, value in model.state_dict().items()}
    config, (height, width) = model.config, hidden_states.shape[-2:]
    p, heads, dim = config.patch_size, config.num_attention_heads, model.inner_dim
    grid = (height // p, width // p)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def embed(name: str) -> Tensor:
        angles = timestep[:, None] * torch.exp(-torch.arange(128) * torch.log(torch.tensor(1e4)) / 127)
        angles = angles.float().double()
        x = torch.cat([angles.cos(), angles.sin()], -1)
        x = linear(
            F.silu(linear(x, f"{name}.timestep_embedder.linear_1")), f"{name}.timestep_embedder.linear_2"
        )
        return x + weights[f"{name}.class_embedder.embedding_table.weight"][class_labels]

    patches = F.unfold(hidden_states.double(), p, stride=p).transpose(1, 2)  # [B, N, C p p]
    x = patches @ weights["pos_embed.proj.weight"].flatten(1).T + weights["pos_embed.proj.bias"]
    x = x + position_embedding(grid, dim, base=config.sample_size // p)
    for i, kind in enumerate(model.layer_attention):
        name = f"transformer_blocks.{i}"
        modulation = linear(F.silu(embed(f"{name}.norm1.emb")), f"{name}.norm1.linear")[:, None].chunk(6, -1)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation
        y = F.layer_norm(x, (dim,), eps=1e-6) * (1 + scale_attn) + shift_attn
        q, k, v = (
            linear(y, f"{name}.attn1.to_{part}").unflatten(-1, (heads, -1)).transpose(1, 2) for part in "qkv"
        )
        if kind == "softmax":
            out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        else:
            processor = model.transformer_blocks[i].attn1.processor
            out = dense_mhla(processor, weights, f"{name}.attn1.processor", q, k, v, y, grid)
        x = x + gate_attn * linear(out, f"{name}.attn1.to_out.0")
        y = F.layer_norm(x, (dim,), eps=config.norm_eps) * (1 + scale_mlp) + shift_mlp
        y = F.gelu(linear(y, f"{name}.ff.net.0.proj"), approximate="tanh")
        x = x + gate_mlp * linear(y, f"{name}.ff.net.2")
    shift, scale = linear(F.silu(embed("transformer_blocks.0.norm1.emb")), "proj_out_1")[:, None].chunk(2, -1)
    x = linear(F.layer_norm(x, (dim,), eps=1e-6) * (1 + scale) + shift, "proj_out_2")
    # A patch is stored as (row, column, channel); fold wants (channel, row, column).
    x = x.unflatten(-1, (p, p, -1)).permute(0, 4, 2, 3, 1).flatten(1, 3)
    return F.fold(x, (height, width), p, stride=p)


def dense_mhla(
    processor: MHLAAttnProcessor,
    weights: dict[str, Tensor],
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    x: Tensor,
    grid: tuple[int, int],
) -> Tensor:
    """``[B, N, H d]``: scores times the mixing of their blocks, rows divided by their sums, then the rest."""
    rows, columns = (
        torch.cat([torch.full_like(part, i) for i, part in enumerate(torch.arange(n).tensor_split(count))])
        for n, count in zip(grid, processor.blocks, strict=True)
    )
    block = (rows[:, None] * processor.blocks[1] + columns).flatten()
    mixing = weights.get(f"{name}.mixing", torch.ones(1, 1).double())
    if processor.config.constraint == "softmax":
        mixing = mixing.softmax(-1)
    eps = processor.config.eps
    scores = (F.relu(q) + eps) @ (F.relu(k) + eps).transpose(-1, -2) * mixing[..., block[:, None], block]
    out = scores / scores.sum(-1, keepdim=True) @ v
    if f"{name}.norm.weight" in weights:
        out = out * (out.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weights[f"{name}.norm.weight"]
    out = out.transpose(1, 2).flatten(2)
    if f"{name}.gate.weight" in weights:
        out = out * F.silu(F.linear(x, weights[f"{name}.gate.weight"], weights[f"{name}.gate.bias"]))
    if f"{name}.cpe.weight" in weights:
        images = v.transpose(-1, -2).reshape(len(v), -1, *grid)
        kernel, bias = weights[f"{name}.cpe.weight"], weights[f"{name}.cpe.bias"]
        out = out + F.conv2d(images, kernel, bias, padding=1, groups=len(kernel)).flatten(2).transpose(1, 2)
    return out


def position_embedding(grid: tuple[int, int], dim: int, base: int) -> Tensor:
    """``[N, dim]``: sines and cosines of the column, then of the row, in units of the model's own grid."""
    frequencies = 1e4 ** (-torch.arange(dim // 4).double() / (dim // 4))
    row, column = (torch.arange(n).double() / (n / base) for n in grid)
    angles = [column.repeat(grid[0]), row.repeat_interleave(grid[1])]
    tables = [position[:, None] * frequencies for position in angles]
    return torch.cat([f(table) for table in tables for f in (torch.sin, torch.cos)], dim=-1)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("layers", LAYERS)
def test_forward_equals_a_dense_reference_on_every_grid(
    make_model: MakeModel,
    make_inputs: MakeInputs,
    assert_close: AssertClose,
    layers: str,
    size: tuple[int, int],
) -> None:
    model, inputs = make_model(**LAYERS[layers]), make_inputs(size)
    with torch.no_grad():
        output = model(**inputs).sample
    assert output.shape == (2, 6, *size)
    assert_close(output, reference_dit(model, **inputs), dtype=torch.float32)


def test_linear_is_mhla_with_one_block(make_model: MakeModel, make_inputs: MakeInputs) -> None:
    linear, one_block = make_model(attention="linear"), make_model(mhla_config={"blocks": 1})
    one_block.load_state_dict(linear.state_dict())
    assert torch.equal(linear(**make_inputs()).sample, one_block(**make_inputs()).sample)


def test_linear_is_mhla_that_mixes_evenly(
    make_model: MakeModel, make_inputs: MakeInputs, assert_close: AssertClose
) -> None:
    linear, mhla = make_model(attention="linear"), make_model()
    mhla.load_state_dict(linear.state_dict(), strict=False)
    for block in mhla.transformer_blocks:
        torch.nn.init.constant_(block.attn1.processor.mixing, 0.5)
    assert_close(mhla(**make_inputs((8, 12))).sample, linear(**make_inputs((8, 12))).sample)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ["mhla"] * 3),
        ({"attention": "linear"}, ["linear"] * 3),
        ({"attention": ("mhla", "softmax", "linear")}, ["mhla", "softmax", "linear"]),
        ({"mhla_config": MHLAConfig(blocks=4, layers=(0, 2))}, ["mhla", "softmax", "mhla"]),
        ({"attention": "linear", "mhla_config": {"layers": [1]}}, ["softmax", "linear", "softmax"]),
        ({"mhla_config": {"layers": []}}, ["softmax"] * 3),
    ],
    ids=str,
)
def test_each_layer_gets_the_attention_asked_for(
    make_model: MakeModel, settings: dict[str, Any], expected: list[str]
) -> None:
    model = make_model(num_layers=3, **settings)
    assert model.layer_attention == expected
    processors = [block.attn1.processor for block in model.transformer_blocks]
    found = [
        ("mhla" if p.mixing is not None else "linear") if isinstance(p, MHLAAttnProcessor) else "softmax"
        for p in processors
    ]
    assert found == expected
    assert model.mixing_blocks == ((2, 2) if "mhla" in expected else (1, 1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention": "flash"}, r"attention must be one of mhla, linear, softmax, got 'flash'"),
        ({"attention": ["mhla"]}, r"attention names 1 layers, but the model has 2"),
        ({"attention": ["mhla", "sofmax"]}, r"got 'sofmax'"),
        ({"mhla_config": {"layers": [2]}}, r"names layer 2, but the layers are 0 to 1"),
        (
            {"attention": ["mhla", "softmax"], "mhla_config": {"layers": [0]}},
            r"attention as a list or mhla_config.layers, not both",
        ),
        ({"mhla_config": {"block": 4}}, r"unknown MHLA setting block; the known ones are blocks"),
        ({"mhla_config": {"blocks": 7}}, r"7 blocks do not divide over the grid \(4, 4\); .*\[6, 8, 9\]"),
        ({"mhla_config": {"blocks": [8, 1]}}, r"has 4 tokens and cannot hold 8 blocks"),
        ({"norm_type": "layer_norm"}, r"'layer_norm'"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused(
    make_model: MakeModel, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, NotImplementedError), match=message):
        make_model(**settings)


def test_blocks_that_cost_more_than_attention_are_warned_of(make_model: MakeModel) -> None:
    with pytest.warns(
        UserWarning, match=r"8 blocks on 16 tokens: mixing costs M\^2 = 64 > N .* blocks=\(1, 2\)"
    ):
        make_model(mhla_config={"blocks": 8})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_model(mhla_config={"blocks": 4})


@pytest.mark.parametrize(("patch_size", "side"), [(1, 32), (2, 16), (4, 8)])
def test_a_square_grid_is_of_the_patches_of_the_config(patch_size: int, side: int) -> None:
    assert square_grid({"sample_size": 32, "patch_size": patch_size}) == (side, side)


def test_windows_that_grow_with_the_picture_are_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"softmax windows of 2304 tokens, whose cost is no longer linear"):
        check_blocks(MHLAConfig(blocks=(2, 2)), (64, 64))
    large = (1024, 1024)  # where the recommended blocks have as many keys, and these twice as many
    assert recommended_layout(large).blocks == (16, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_blocks(MHLAConfig(blocks=(16, 32)), large)
        check_blocks(MHLAConfig(blocks=(16, 16)), large)
        check_blocks(MHLAConfig(blocks=(2, 2), local=None), (64, 64))


def test_a_size_with_fewer_tokens_than_blocks_runs(make_model: MakeModel, make_inputs: MakeInputs) -> None:
    assert make_model()(**make_inputs((2, 8))).sample.isfinite().all()


def test_processor_attends_to_other_tokens() -> None:
    attn = Attention(16, cross_attention_dim=10, heads=2, dim_head=8)
    config = MHLAConfig(blocks=(2, 2), key_blocks=3)
    processor = MHLAAttnProcessor(config, heads=2, head_dim=8, grid=(4, 4), key_grid=(7,))
    torch.nn.init.uniform_(processor.mixing)
    attn.set_processor(processor)
    x, text = torch.randn(2, 16, 16), torch.randn(2, 7, 10)
    mask = torch.rand(2, 7) > 0.3
    q, k, v = (
        project(y).unflatten(-1, (2, 8)).transpose(1, 2)
        for project, y in ((attn.to_q, x), (attn.to_k, text), (attn.to_v, text))
    )
    layouts = BlockLayout((4, 4), (2, 2)), BlockLayout((7,), (3,))
    out = mhla_reference(q, k, v, processor.mixing, layouts[0], key_layout=layouts[1], key_mask=mask)
    expected = attn.to_out[0](out.transpose(1, 2).flatten(2).float())
    found = attn(x, encoder_hidden_states=text, grid=(4, 4), key_mask=mask)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="no encoder_hidden_states"):
        attn(x, grid=(4, 4))


def test_processor_adds_and_scales_as_the_layer_says() -> None:
    attn, x = Attention(16, heads=2, dim_head=8), torch.randn(2, 16, 16)
    attn.set_processor(MHLAAttnProcessor(MHLAConfig(blocks=(2, 2)), heads=2, head_dim=8, grid=(4, 4)))
    plain = attn(x, grid=(4, 4))
    attn.residual_connection, attn.rescale_output_factor = True, 2.0
    torch.testing.assert_close(attn(x, grid=(4, 4)), (plain + x) / 2)


def test_processor_refuses_what_linear_attention_has_no_form_of(make_model: MakeModel) -> None:
    attn, x = make_model().transformer_blocks[0].attn1, torch.randn(1, 16, 16)
    for arguments, message in [
        ({}, "needs the grid of its tokens"),
        ({"grid": (4, 4), "encoder_hidden_states": x}, "cross-attention needs key_blocks"),
        ({"grid": (4, 4), "attention_mask": torch.zeros(1, 1, 16, 16)}, "takes no additive mask"),
        ({"grid": (4, 5)}, r"hold 16 tokens, but the grid \(4, 5\) has 20"),
    ]:
        with pytest.raises(ValueError, match=message):
            attn(x, **arguments)


def test_a_new_model_starts_as_dit_does(make_inputs: MakeInputs) -> None:
    model = MHLADiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=3, num_layers=1, sample_size=8,
        num_embeds_ada_norm=5, mhla_config={"blocks": 4},
    )  # fmt: skip
    assert not model(**make_inputs()).sample.any(), "zero output layer"
    block = model.transformer_blocks[0]
    assert not block.norm1.linear.weight.any(), "blocks start as the identity"
    assert not model.proj_out_1.weight.any()
    torch.testing.assert_close(block.attn1.processor.mixing.sum(-1), torch.ones(4))
    assert block.norm1.emb.class_embedder.embedding_table.weight.std() > 0.5, "classes are heard at once"


def test_training_mode_drops_no_labels(make_model: MakeModel, make_inputs: MakeInputs) -> None:
    model = make_model()
    assert torch.equal(model.train()(**make_inputs()).sample, model.eval()(**make_inputs()).sample)


def test_a_cast_keeps_positions_exact(make_model: MakeModel, make_inputs: MakeInputs) -> None:
    """The model's own grid reads a table, others compute it: a cast must not tell them apart."""
    model = make_model()
    table = model.pos_embed.pos_embed.clone()
    model.to(torch.bfloat16).to(torch.float64)
    assert torch.equal(model.pos_embed.pos_embed, table)
    assert model(**make_inputs(dtype=torch.float64)).sample.dtype == torch.float64


@pytest.mark.parametrize("feature_map", ["relu", "power", "hedgehog"])
def test_features_that_keep_much_are_computed_again(
    make_model: MakeModel, make_inputs: MakeInputs, monkeypatch: pytest.MonkeyPatch, feature_map: str
) -> None:
    model = make_model(mhla_config={"blocks": 4, "feature_map": feature_map})
    inputs, parameters = make_inputs(), list(model.parameters())
    calls, real = [], processors.checkpoint

    def counted(*args: Any, **settings: Any) -> Any:
        calls.append(1)
        return real(*args, **settings)

    def gradients(many_tokens: int) -> tuple[Tensor, ...]:
        monkeypatch.setattr(processors, "_MANY_TOKENS", many_tokens)
        return torch.autograd.grad(model(**inputs).sample.square().sum(), parameters, allow_unused=True)

    monkeypatch.setattr(processors, "checkpoint", counted)
    kept = gradients(1000)
    assert not calls
    torch.testing.assert_close(gradients(1), kept)
    assert len(calls) == (0 if feature_map == "relu" else len(model.layer_attention))
