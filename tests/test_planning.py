"""Planned FLOPs against formulas, published numbers, and what torch counts in stock and in MHLA models."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel, QwenImageTransformer2DModel, WanTransformer3DModel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mhla_diffusion import (
    MHLAConfig,
    MHLADiTTransformer2DModel,
    MHLAQwenImageTransformer2DModel,
    MHLAWanTransformer3DModel,
)
from mhla_diffusion.backbones import (
    BACKBONES,
    MHLAWanVACETransformer3DModel,
    backbone_named,
    load_transformer,
)
from mhla_diffusion.ops import BlockLayout, choose_blocks, locality_mixing, mhla, window_attention
from mhla_diffusion.planning import PRESETS, grid_of_pixels, load_model_config, plan

ROOT = Path(__file__).parents[1]

DIT: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8, "num_layers": 3,
    "sample_size": 16, "patch_size": 2, "num_embeds_ada_norm": 5,
}  # fmt: skip
WAN: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 3, "out_channels": 4, "num_layers": 2,
    "text_dim": 10, "freq_dim": 16, "ffn_dim": 40,
}  # fmt: skip
QWEN: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 12, "out_channels": 3, "num_layers": 3,
    "joint_attention_dim": 10, "axes_dims_rope": (4, 4, 4),
}  # fmt: skip
WAN_IMAGE: dict[str, Any] = {**WAN, "in_channels": 5, "image_dim": 6, "added_kv_proj_dim": 24}


@torch.no_grad()
def count_flops(call: Callable[[], Any]) -> int:
    """Products of matrices, convolutions and softmax attention, on a CPU counted as products alone."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def save_config(model: Any, folder: Path) -> str:
    model.save_config(folder)
    return str(folder)


def run_dit(model: nn.Module, height: int, width: int) -> Callable[[], Any]:
    latents = torch.zeros(1, 4, height // 8, width // 8)
    label = torch.zeros(1, dtype=torch.int64)
    return lambda: model(latents, timestep=label, class_labels=label)


def run_wan(model: Any, *latent: int) -> Callable[[], Any]:
    config = model.config
    images = None
    if config.image_dim is not None:
        # With positions there are two images, the first frame and the last, whose tokens are one sequence.
        tokens = config.pos_embed_seq_len
        shape = (1, 257) if tokens is None else (2, tokens // 2)
        images = torch.zeros(*shape, config.image_dim)
    return lambda: model(
        torch.zeros(1, config.in_channels, *latent),
        timestep=torch.zeros(1),
        encoder_hidden_states=torch.zeros(1, 512, config.text_dim),
        encoder_hidden_states_image=images,
    )


@pytest.mark.parametrize(
    ("model", "size", "blocks", "gate", "softmax", "mhla_", "operator", "layer"),
    [
        ("DiT-S/2", (512, 512), 16, False, 1.61, 0.113, 14, 1.40),
        ("DiT-XL/2", (1024, 1024), 16, False, 77.3, 1.40, 55, 1.58),
        ("DiT-XL/2", (2048, 2048), 64, False, 1237, 6.12, 202, 3.33),
        ("DiT-XL/2", (4096, 4096), 256, False, 19791, 32.6, 607, 10.3),
        ("Wan2.1-1.3B", (480, 800, 81), (3, 5, 10), True, 6096, 33.6, 181, 3.03),
        ("Wan2.1-14B", (720, 1280, 81), (3, 5, 10), True, 117051, 228, 514, 3.25),
    ],
)
def test_known_numbers(
    model: str,
    size: Any,
    blocks: Any,
    gate: bool,
    softmax: float,
    mhla_: float,
    operator: float,
    layer: float,
) -> None:
    """GFLOPs of the operator, its ratio and that of a layer, to the digits they are known to."""
    found = plan(model, *size, blocks=blocks, gate=gate, local=False)
    assert found.operator_flops("softmax") / 1e9 == pytest.approx(softmax, rel=4e-3)
    assert found.operator_flops("mhla") / 1e9 == pytest.approx(mhla_, rel=4e-3)
    assert found.speedups("mhla")["operator"] == pytest.approx(operator, abs=0.6)
    assert found.speedups("mhla")["one layer"] == pytest.approx(layer, rel=5e-3)


@pytest.mark.parametrize("blocks", [(1, 1), (2, 2), (2, 4), (4, 4)], ids=str)
def test_the_operator_does_what_is_planned(blocks: tuple[int, ...], tmp_path: Path) -> None:
    """H d^2 (4 N + 2 M^2) without a denominator; with it at most d + 1 columns in place of d."""
    layout = BlockLayout((8, 4), blocks)
    heads, d = 3, 16
    config = {**DIT, "num_attention_heads": heads, "attention_head_dim": d}
    folder = save_config(DiTTransformer2DModel(**config), tmp_path)
    planned = plan(folder, 128, 64, blocks=blocks, local=False)
    assert planned.layout == layout
    q, k, v = (torch.zeros(1, heads, 32, d) for _ in range(3))
    mixing = locality_mixing(layout)
    flops = planned.operator_flops("mhla")
    # One block: multiplying the only summary by W, or not.
    single = 2 * heads * d * d * (layout.num_blocks == 1)
    bare = count_flops(lambda: mhla(q, k, v, mixing, layout, normalizer="none"))
    assert bare in (flops, flops + single)
    whole = count_flops(lambda: mhla(q, k, v, mixing, layout))
    assert flops <= whole <= (flops + single) * (d + 1) / d


MHLA_16 = {"blocks": 16, "gate": True, "cpe": "zero"}


@pytest.mark.parametrize("size", [(256, 256), (128, 512)], ids=str)
@pytest.mark.parametrize(
    ("attention", "mhla_config", "linear_layers"),
    [
        ("softmax", None, 0),
        ("linear", None, 3),
        ("linear", {"gate": True, "layers": [1]}, 1),
        ("mhla", {"blocks": 4}, 3),
        ("mhla", {"blocks": 4, "feature_map": "crelu"}, 3),
        ("linear", {"feature_map": "crelu"}, 3),
        ("mhla", MHLA_16, 3),
        ("mhla", {"blocks": 4, "qk_conv": True}, 3),
        ("linear", {"cpe": "zero", "qk_conv": True}, 3),
        ("mhla", {**MHLA_16, "layers": [0, 2]}, 2),
        (["mhla", "softmax", "softmax"], MHLA_16, 1),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*blocks on .* tokens:UserWarning")
def test_dit_does_what_is_planned(
    attention: Any, mhla_config: Any, linear_layers: int, size: tuple[int, int], tmp_path: Path
) -> None:
    """Equal for softmax; else but for the denominators, which are under a 1 / d of the operator."""
    model = MHLADiTTransformer2DModel(**DIT, attention=attention, mhla_config=mhla_config)
    planned = plan(save_config(model, tmp_path), *size)
    kind = attention if isinstance(attention, str) else "mhla"
    assert linear_layers in (0, planned.linear_layers)
    counted = count_flops(run_dit(model, *size))
    remainder = linear_layers * (planned.operator_flops(kind) / 16 + 3 * 2 * 16 * 32)
    assert 0 <= counted - planned.model_flops(kind) <= remainder


def test_stock_layers_of_sana_have_features_of_their_own() -> None:
    plain = plan("Sana-0.6B", 512, 512, linear_layers=4, local=False)
    learned = plan("Sana-0.6B", 512, 512, linear_layers=4, local=False, hedgehog=True)
    more = learned.operator_flops("mhla") - plain.operator_flops("mhla")
    assert learned.model_flops("mhla") - plain.model_flops("mhla") == 4 * more > 0


def test_parts_of_a_dit_layer_are_those_of_the_formulas() -> None:
    tokens, width = 32 * 16, 384
    assert plan("DiT-S/2", 512, 256).layer_flops("softmax") == {
        "attention operator": 4 * tokens**2 * width,
        "projections q, k, v, out": 8 * tokens * width**2,
        "gate and convolution": 0,
        # Embedding of 256 sines, and six vectors out of it.
        "modulation": 2 * (256 * width + width**2) + 12 * width**2,
        "feed-forward": 16 * tokens * width**2,
    }


def test_parts_of_a_wan_layer_are_those_of_the_formulas(tmp_path: Path) -> None:
    config = {**WAN_IMAGE, "_class_name": "WanTransformer3DModel"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokens, width = 3 * 3 * 5, 24
    queries, text, image = (4 * n * width**2 for n in (tokens, 512, 257))
    scores = 4 * tokens * (512 + 257) * width
    found = plan(str(tmp_path / "config.json"), 48, 80, 9, gate=True, cpe=True).layer_flops("mhla")
    assert found["projections q, k, v, out"] == 8 * tokens * width**2
    assert found["gate and convolution"] == tokens * width * (2 * width + 2 * 27)
    assert found["cross-attention"] == queries + text + image + scores
    assert found["feed-forward"] == 4 * tokens * width * 40
    assert "modulation" not in found  # a table, not a layer


def test_learned_features_and_windows_are_counted() -> None:
    plain = plan("DiT-XL/2", 512, 512, blocks=16, local=False)
    tokens, heads, d = 32 * 32, 16, 72
    base = (4 * tokens + 2 * 16**2) * d**2 * heads
    assert plain.operator_flops("mhla") == base
    learned = plain.with_config(MHLAConfig.paper(feature_map="hedgehog"))
    assert learned.operator_flops("mhla") == 2 * base + 4 * tokens * d**2 * heads
    windowed = plain.with_config(MHLAConfig(blocks=16, local="shared"))
    assert windowed.operator_flops("mhla") == base + 4 * tokens * 64 * d * heads
    new = plan("DiT-XL/2", 512, 512, blocks=16)
    assert new == plan("DiT-XL/2", 512, 512, blocks=16, local=True) == plain.with_config(MHLAConfig())
    # Blocks of 8 x 8 with a margin of a quarter, 2 tokens.
    assert new.operator_flops("mhla") == base + 4 * tokens * 12**2 * d * heads
    assert plan("DiT-XL/2", 512, 512, blocks=1).operator_flops("mhla") == 4 * tokens * d**2 * heads
    assert windowed.operator_flops("linear") == plain.operator_flops("linear")
    mixing = 2 * 16**2 * d**2 * heads
    assert plain.mixing_share == mixing / base
    assert windowed.mixing_share == mixing / windowed.operator_flops("mhla")
    assert learned.mixing_share == 2 * mixing / learned.operator_flops("mhla")
    wide = plain.with_config(MHLAConfig.paper(feature_map="crelu"))
    assert wide.operator_flops("mhla") == 2 * base
    assert wide.operator_flops("linear") == 8 * tokens * d**2 * heads
    # Summaries, and sums of the features, have as many rows as there are features.
    assert wide.exchange_bytes("mhla") == 2 * plain.exchange_bytes("mhla") == learned.exchange_bytes("mhla")
    # Without a denominator there are no such sums; the official one needs the features of all tokens.
    bare = plain.with_config(MHLAConfig.paper(normalizer="none"))
    assert bare.exchange_bytes("mhla") == 4 * heads * 16 * d * d
    official = plain.with_config(MHLAConfig.paper(normalizer="official"))
    assert official.exchange_bytes("mhla") == official.operator_bytes
    # One summary has nothing to weigh by content.
    for blocks, exchanged in ((16, official.operator_bytes), (1, plain.exchange_bytes("linear"))):
        content = plain.with_config(MHLAConfig.paper(blocks=blocks, mixing_content=True))
        assert content.exchange_bytes("mhla") == exchanged


def test_the_heading_names_the_form_that_is_counted() -> None:
    form = {"gate": True, "local": "shared", "local_margin": 2, "routed_blocks": 3, "feature_map": "hedgehog"}
    counted = str(plan("DiT-S/2", 256, 256).with_config(MHLAConfig(blocks=4, **form)))
    expected = "with a softmax window (shared, margin 2), 3 routed blocks, features hedgehog, a gate"
    assert f"\nMHLA {expected}\n" in counted
    plain = str(plan("DiT-S/2", 256, 256, local=False))
    assert "\nMHLA without window, gate and convolution\n" in plain


def test_all_blocks_but_the_own_are_all_that_can_be_chosen() -> None:
    def flops(routed_blocks: int) -> int:
        config = MHLAConfig(blocks=(4, 4), local="shared", routed_blocks=routed_blocks)
        return plan("DiT-S/2", 256, 256).with_config(config).operator_flops("mhla")

    assert flops(14) < flops(15) == flops(16)


def test_tokens_of_text_are_a_window_of_their_own() -> None:
    planned = plan("Qwen-Image", 256, 256, extra_tokens=9)
    alone = planned.with_config(MHLAConfig(blocks=(2, 2), local="only"))
    assert alone.operator_flops("mhla") == 4 * (256 * 64 + 9**2) * alone.head_dim * alone.heads


def test_attention_over_each_frame_is_counted_for_each_frame() -> None:
    planned = plan("Latte-1", 256, 256)
    one = dataclasses.replace(planned, grids=1)
    assert planned.grids > 1
    assert planned.operator_flops("mhla") == planned.grids * one.operator_flops("mhla")
    assert planned.operator_bytes == planned.grids * one.operator_bytes


@pytest.mark.parametrize(("blocks", "seen"), [(4, 16), (1, 64)])
def test_a_window_alone_is_softmax_in_blocks_and_nothing_else(blocks: int, seen: int, tmp_path: Path) -> None:
    """Counted are some columns more, as the window's kernel pads them, and no summaries."""
    config = {"blocks": blocks, "local": "only", "gate": True, "cpe": "zero"}
    model = MHLADiTTransformer2DModel(**DIT, mhla_config=config)
    planned = plan(save_config(model, tmp_path), 128, 128)
    heads, d = 2, 16
    operator = planned.operator_flops("mhla")
    assert operator == 4 * 64 * seen * d * heads
    assert planned.mixing_share == 0
    assert planned.layer_flops("mhla")["gate and convolution"] == 64 * 32 * (2 * 32 + 2 * 9)
    beside = planned.model_flops("mhla") - 3 * operator
    counted = count_flops(run_dit(model, 128, 128)) - beside
    assert 3 * operator <= counted <= 2 * 3 * operator
    text = plan("Qwen-Image", 256, 256, blocks=1, extra_tokens=9)
    alone = text.with_config(MHLAConfig(blocks=1, local="only"))
    assert alone.operator_flops("mhla") == text.operator_flops("softmax")


@pytest.mark.parametrize("activation", ["gelu-approximate", "geglu"])
def test_stock_dit_does_what_is_planned(activation: str, tmp_path: Path) -> None:
    model = DiTTransformer2DModel(**DIT, activation_fn=activation)
    planned = plan(save_config(model, tmp_path), 256, 256)
    assert planned.model_flops("softmax") == count_flops(run_dit(model, 256, 256))


@pytest.mark.parametrize("config", [WAN, WAN_IMAGE, {**WAN_IMAGE, "pos_embed_seq_len": 20}], ids=str)
def test_wan_does_what_is_planned(config: dict[str, Any], tmp_path: Path) -> None:
    model = WanTransformer3DModel(**config)
    planned = plan(save_config(model, tmp_path), 48, 80, 9)
    assert planned.layout.grid == (3, 3, 5)
    assert planned.model_flops("softmax") == count_flops(run_wan(model, 3, 6, 10))


def test_branches_beside_the_layers_are_planned(tmp_path: Path) -> None:
    config = {**WAN, "num_layers": 4, "vace_layers": [0, 2], "vace_in_channels": 5}
    model = MHLAWanVACETransformer3DModel(**config, attention="softmax", sample_grid=(3, 3, 5))
    planned = plan(save_config(model, tmp_path), 48, 80, 9)
    assert (planned.num_layers, planned.operators) == (4, 6)
    assert planned.model_flops("softmax") == count_flops(lambda: model(**model.example_inputs((3, 3, 5))))


def test_wan_with_mhla_does_what_is_planned(tmp_path: Path) -> None:
    """But for the denominators, which are under a 1 / d of the operator."""
    config = {"blocks": 5, "layers": [1], "gate": True}
    model = MHLAWanTransformer3DModel(**WAN, mhla_config=config, sample_grid=(3, 3, 5))
    planned = plan(save_config(model, tmp_path), 48, 80, 9)
    assert (planned.linear_layers, planned.layout.num_blocks) == (1, 5)
    counted = count_flops(run_wan(model, 3, 6, 10))
    assert 0 <= counted - planned.model_flops("mhla") <= planned.operator_flops("mhla") / 12


def run_qwen(model: Any, text: int) -> Callable[[], Any]:
    """On 8 x 4 tokens and a text."""
    return lambda: model(
        torch.zeros(1, 32, 12), torch.zeros(1, text, 10), timestep=torch.zeros(1), img_shapes=[[(1, 8, 4)]]
    )


@pytest.mark.parametrize("text", [None, 7])
def test_text_in_joint_attention_is_planned(text: int | None, tmp_path: Path) -> None:
    model = QwenImageTransformer2DModel(**QWEN)
    planned = plan(
        save_config(model, tmp_path),
        128,
        64,
        extra_tokens=text,
        blocks=(2, 2),
        gate=True,
        cpe=True,
        local=False,
    )
    tokens = 32 + (text or 128)
    assert planned.layout == BlockLayout((8, 4), (2, 2), (text or 128, 0))
    assert planned.model_flops("softmax") == count_flops(run_qwen(model, text or 128))
    parts, width = planned.layer_flops("mhla"), 24
    assert parts["attention operator"] == 2 * 12**2 * (4 * tokens + 2 * 5**2)
    assert parts["projections q, k, v, out"] == 8 * tokens * width**2
    assert parts["gate and convolution"] == 2 * tokens * width**2 + 32 * width * 2 * 9
    assert parts["feed-forward of text"] == 16 * (text or 128) * width**2
    assert planned.operator_bytes == 4 * tokens * width * 2
    # The convolution needs the tokens of other ranks, and adds to the output; else they exchange summaries.
    assert planned.exchange_bytes("mhla") == 5 * planned.operator_bytes / 4
    assert dataclasses.replace(planned, mhla=MHLAConfig.paper()).exchange_bytes("mhla") == 5 * 2 * 12 * 13 * 4


def test_joint_attention_with_mhla_does_what_is_planned(tmp_path: Path) -> None:
    """But for the denominators; with the blocks and the flags that the config has."""
    config = {"blocks": 4, "layers": [0, 2], "gate": True}
    model = MHLAQwenImageTransformer2DModel(**QWEN, mhla_config=config, sample_grid=(8, 4))
    planned = plan(save_config(model, tmp_path), 128, 64, extra_tokens=5)
    assert (planned.linear_layers, planned.layout.num_blocks) == (2, 5)
    counted = count_flops(run_qwen(model, 5))
    assert 0 <= counted - planned.model_flops("mhla") <= 2 * planned.operator_flops("mhla") / 12
    assert "8 x 4 = 32 tokens and 5 of text" in str(planned)
    assert "each of 2 x 4 tokens and one of text" in str(planned).replace("4 x 2", "2 x 4")


@pytest.mark.parametrize(
    ("model", "message"),
    [("DiT-S/2", "which it is not in DiT-S/2; got 9"), ("Qwen-Image", "1 or more.* got 0")],
)
def test_text_where_there_is_none_is_not_planned(model: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(model, 256, 256, extra_tokens=0 if model == "Qwen-Image" else 9)


def test_a_config_of_the_time_when_dit_had_no_class_is_that_of_dit(tmp_path: Path) -> None:
    config = {**DIT, "_class_name": "Transformer2DModel", "norm_type": "ada_norm_zero", "attention_type": "x"}
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline"}))
    model = DiTTransformer2DModel(**DIT)
    assert plan(str(tmp_path), 256, 256).model_flops("softmax") == count_flops(run_dit(model, 256, 256))


# Millions: DiT's of its Table 1, the others' of their names or their authors. Those of VACE, Wan Animate and
# ChronoEdit have the names of the Wan that they were made of.
WEIGHTS = {
    "DiT-S/2": 33, "DiT-XL/2": 675, "PixArt-Sigma-XL/2": 600, "Sana-0.6B": 590, "Sana-1.6B": 1604,
    "Sana-Video-2B": 2000, "Latte-1": 1056, "Lumina-Next-2B": 1750, "HunyuanDiT-v1.2": 1500,
    "LTX-Video-2B": 1900, "Cosmos1.0-7B": 7200, "Cosmos-Predict2-2B": 1960, "Allegro-3B": 2800,
    "Wan2.1-1.3B": 1300, "AnyFlow-14B": 14000, "SkyReels-V2-1.3B": 1400,
}  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTS)
def test_presets_have_as_many_weights_as_published(name: str) -> None:
    config = {key: value for key, value in PRESETS[name].items() if key != "_class_name"}
    ours = backbone_named(PRESETS[name]["_class_name"])
    assert ours is not None
    with torch.device("meta"):
        model = ours.stock(**config)
    # Diffusers' DiT embeds time and class anew in each layer: not counted.
    own = [p.numel() for key, p in model.named_parameters() if "norm1.emb" not in key]
    assert sum(own) / 1e6 == pytest.approx(WEIGHTS[name], rel=0.1)


def test_every_backbone_has_a_published_size() -> None:
    assert all(ours.presets for ours in BACKBONES.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("DiT-S/2", 250, 256), r"height 250 does not divide into tokens of 16 .* nearest .* is 240 or 256"),
        (("DiT-S/2", 256, 8), r"width 8 .* nearest .* is 16"),
        (("DiT-S/2", 256, 256, 5), "an image model has no frames, got frames=5"),
        (("Wan2.1-1.3B", 480, 832), "a video model needs frames"),
        (("Wan2.1-1.3B", 480, 832, 80), r"frames 80 .* nearest .* is 77 or 81"),
        (("Wan2.1-1.3B", 480, 832, -3), r"frames -3 .* nearest .* is 1$"),
        (("DiT-S/2", 0, 256), r"height 0 .* nearest .* is 16$"),
        (("DiT-M/2", 256, 256), r"unknown preset 'DiT-M/2', did you mean DiT-\w+/2"),
        (("dit-xl/2", 256, 256), r"unknown preset 'dit-xl/2', did you mean DiT-XL/2\?"),
        (("Diffusion", 256, 256), r"'Diffusion' is no folder or hub id .* none of .*DiT-S/2"),
    ],
    ids=str,
)
def test_what_cannot_be_planned_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        plan(*arguments)


def test_layers_and_blocks_that_are_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match="16 tokens and cannot hold 32 blocks"):
        plan("DiT-S/2", 256, 256, blocks=(32, 1))
    with pytest.raises(ValueError, match=r"several blocks, .*; got blocks 1 x 1 and normalizer 'paper'"):
        plan("DiT-S/2", 256, 256, blocks=1, local=True)
    with pytest.raises(ValueError, match="dtype must be one of bfloat16, float16, float32, got 'int8'"):
        plan("DiT-S/2", 256, 256, dtype="int8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="does not run on 16 x 16 tokens and 9999 of text: take fewer"):
        plan("Qwen-Image", 256, 256, extra_tokens=9999)
    with pytest.raises(ValueError, match="linear_layers must lie between 1 and 12, got 13"):
        plan("DiT-S/2", 256, 256, linear_layers=13)
    with pytest.raises(ValueError, match="linear_layers must lie between 1 and 12, got 0"):
        plan("DiT-S/2", 256, 256, linear_layers=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"_class_name": "FluxTransformer2DModel"}', "is a FluxTransformer2DModel; planned can be .*DiT"),
        ('{"_class_name": "Transformer2DModel", "norm_type": "layer_norm"}', "is a Transformer2DModel; "),
        ("{}", "is no config with a _class_name; planned can be .*DiT"),
        ("[1]", "is no config with a _class_name; planned can be .*DiT"),
        ("{", "is no folder or hub id with a config.json, and none of .*DiT-S/2, .* not a valid JSON"),
        (None, "is no folder or hub id with a config.json, and none of .*DiT-S/2, "),
    ],
    ids=str,
)
def test_configs_that_cannot_be_planned_are_refused(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    for path in (tmp_path, tmp_path / "config.json"):
        said = message if path.exists() else "does not exist; on the hub models are called OWNER/NAME"
        with pytest.raises(ValueError, match=f"(?s)^'?{path}'? {said}"):
            load_model_config(str(path))


def test_a_mistyped_folder_may_be_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    told = "^teacher/nopipe is no folder here, and could not be read from the hub: "
    with pytest.raises(OSError, match=told):
        load_transformer("teacher/nopipe")
    (tmp_path / "teacher/nopipe").mkdir(parents=True)
    with pytest.raises(OSError, match=r"no file named config\.json"):
        load_transformer("teacher/nopipe")


def write_autoencoder(folder: Path, stages: int) -> None:
    blocks = {
        "down_block_types": ["DownEncoderBlock2D"] * stages, "up_block_types": ["UpDecoderBlock2D"] * stages
    }  # fmt: skip
    AutoencoderKL(block_out_channels=[4] * stages, norm_num_groups=2, **blocks).save_config(folder)


def test_a_pipeline_is_planned_with_its_own_autoencoder(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(PRESETS["DiT-S/2"]))
    write_autoencoder(tmp_path / "vae", stages=2)
    index = {"transformer": ["diffusers", "x"], "vae": ["diffusers", "AutoencoderKL"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert plan(str(tmp_path), 32, 32).layout.num_tokens == 64
    assert plan(str(tmp_path / "transformer"), 32, 32).layout.num_tokens == 4, "the stock model's"


@pytest.mark.parametrize(
    ("vae", "tokens"), [({}, 64), ({"vae": [None, None]}, 64), ({"vae": ["diffusers", "AutoencoderKL"]}, 1)]
)
def test_a_pipeline_without_an_autoencoder_is_planned_on_pixels(
    vae: dict[str, object], tokens: int, tmp_path: Path
) -> None:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(PRESETS["DiT-S/2"]))
    (tmp_path / "model_index.json").write_text(json.dumps({"transformer": ["diffusers", "x"], **vae}))
    write_autoencoder(tmp_path / "vae", stages=4)
    assert plan(str(tmp_path), 16, 16).layout.num_tokens == tokens
    if tokens == 64:
        assert plan(str(tmp_path), 16, 16, vae_stride=8).layout.num_tokens == 1
    else:
        with pytest.raises(ValueError, match="of pixels alone vae_stride is 1"):
            plan(str(tmp_path), 18, 18)


def test_a_config_that_names_no_attention_has_the_default_blocks(tmp_path: Path) -> None:
    config = {**DIT, "_class_name": "MHLADiTTransformer2DModel"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert plan(str(tmp_path), 256, 256).layout.blocks == (4, 4)


def test_a_folder_and_its_config_are_the_same_model(tmp_path: Path) -> None:
    folder = save_config(DiTTransformer2DModel(**DIT), tmp_path)
    assert load_model_config(folder) == load_model_config(str(tmp_path / "config.json"))
    assert load_model_config(folder)["num_layers"] == 3


def test_the_grid_is_that_of_the_autoencoder_and_the_patches() -> None:
    assert grid_of_pixels((2, 2), 512, 256) == (32, 16)
    assert grid_of_pixels((1, 2, 2), 480, 832, 81) == (21, 30, 52)
    assert grid_of_pixels((1, 2, 2), 704, 1280, 121, vae_stride=16) == (31, 22, 40)
    assert grid_of_pixels((2, 2, 2), 64, 64, 5) == (1, 4, 4)
    with pytest.raises(ValueError, match="vae_stride must be at least 1 pixel for a latent, got 0"):
        grid_of_pixels((2, 2), 512, 256, vae_stride=0)
    with pytest.raises(ValueError, match=r"frames 9 does not divide into tokens of 8 .* is 5 or 13"):
        grid_of_pixels((2, 2, 2), 64, 64, 9)


def test_ranks_exchange_what_they_send_and_bytes_follow_the_dtype() -> None:
    half, full = (plan("DiT-S/2", 512, 512, blocks=16, local=False, dtype=d) for d in ("bfloat16", "float32"))
    assert half.operator_bytes == 4 * 1024 * 384 * 2
    assert full.operator_bytes == 2 * half.operator_bytes == full.exchange_bytes("softmax")
    # Summaries are float32 whatever the model is.
    assert half.exchange_bytes("mhla") == full.exchange_bytes("mhla") == 16 * 6 * 64 * 65 * 4
    assert half.exchange_bytes("linear") * 16 == half.exchange_bytes("mhla")
    # A window needs the tokens of other ranks.
    assert plan("DiT-S/2", 512, 512, blocks=16).exchange_bytes("mhla") == half.operator_bytes


def test_speedups_of_the_model_stay_below_the_limit() -> None:
    found = plan("DiT-S/2", 512, 512, linear_layers=6)
    whole = found.speedups("mhla")["whole model"]
    assert 1 < whole < found.speedups("linear")["whole model"] < found.speedup_limit
    assert whole < plan("DiT-S/2", 512, 512).speedups("mhla")["whole model"]
    assert found.speedups("softmax") == dict.fromkeys(found.speedups("softmax"), 1)


@pytest.mark.parametrize(("margin", "seen"), [(0, 16), (1, 36), ((0, 2), 32)])
def test_a_margin_is_counted_as_torch_counts_its_products(margin: int | tuple[int, ...], seen: int) -> None:
    config = MHLAConfig(blocks=(4, 4), local="only", local_margin=margin)
    counted = plan("DiT-S/2", 256, 256).with_config(config).operator_flops("mhla")
    assert counted == 4 * 256 * seen * 64 * 6
    q = torch.randn(1, 1, 256, 62)  # 64 with the channels of what lies elsewhere
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        window_attention(q, q, q, BlockLayout((16, 16), (4, 4)), margin=margin)
    keys = seen + (margin != 0)  # the one more of queries that may see none
    assert counter.get_total_flops() == 4 * 256 * keys * 64


@pytest.mark.parametrize("exact", [False, True])
def test_routed_blocks_are_counted_as_torch_counts_their_products(exact: bool) -> None:
    tokens, heads, d = 256, 6, 64
    q = torch.randn(1, 1, tokens, d)
    with FlopCounterMode(display=False) as counter:
        choose_blocks(q, q, BlockLayout((16, 16), (4, 4)), 3, exact=exact)
    near, routed = (
        plan("DiT-S/2", 256, 256).with_config(MHLAConfig(blocks=(4, 4), local="shared", **routes))
        for routes in ({}, {"routed_blocks": 3, "exact_routing": exact})
    )
    more = routed.operator_flops("mhla") - near.operator_flops("mhla")
    assert more == (4 * tokens * 3 * 16 * d + counter.get_total_flops()) * heads
    plain = plan("DiT-S/2", 256, 256).with_config(MHLAConfig.paper(blocks=(4, 4)))
    assert plain.operator_flops("mhla") < near.operator_flops("mhla")
