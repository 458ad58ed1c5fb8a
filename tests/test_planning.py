"""Planned FLOPs against those that torch counts in real models, and against the published numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, WanTransformer3DModel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mhla_diffusion import MHLADiTTransformer2DModel
from mhla_diffusion.ops import BlockLayout, locality_mixing, mhla, recommended_layout
from mhla_diffusion.planning import PRESETS, load_model_config, plan, token_grid

ROOT = Path(__file__).parents[1]

DIT: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8, "num_layers": 3,
    "sample_size": 16, "patch_size": 2, "num_embeds_ada_norm": 5,
}  # fmt: skip
WAN: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 3, "out_channels": 4, "num_layers": 2,
    "text_dim": 10, "freq_dim": 16, "ffn_dim": 40,
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


def run_dit(model: nn.Module, height: int, width: int, device: str = "cpu") -> Callable[[], Any]:
    latents = torch.zeros(1, 4, height // 8, width // 8, device=device)
    label = torch.zeros(1, dtype=torch.int64, device=device)
    return lambda: model(latents, timestep=label, class_labels=label)


def run_wan(model: Any, *latent: int, device: str = "cpu") -> Callable[[], Any]:
    config = model.config
    images = None
    if config.image_dim is not None:
        # With positions there are two images, the first frame and the last, whose tokens are one sequence.
        tokens = config.pos_embed_seq_len
        shape = (1, 257) if tokens is None else (2, tokens // 2)
        images = torch.zeros(*shape, config.image_dim, device=device)
    return lambda: model(
        torch.zeros(1, config.in_channels, *latent, device=device),
        timestep=torch.zeros(1, device=device),
        encoder_hidden_states=torch.zeros(1, 512, config.text_dim, device=device),
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
    found = plan(model, *size, blocks=blocks, gate=gate)
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
    planned = plan(save_config(DiTTransformer2DModel(**config), tmp_path), 128, 64, blocks=blocks)
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
        ("mhla", MHLA_16, 3),
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
    assert linear_layers in (0, planned.shape.linear_layers)
    counted = count_flops(run_dit(model, *size))
    remainder = linear_layers * (planned.operator_flops(kind) / 16 + 3 * 2 * 16 * 32)
    assert 0 <= counted - planned.model_flops(kind) <= remainder


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


@pytest.mark.parametrize("name", ["DiT-S/2", "DiT-XL/2", "Wan2.1-1.3B"])
def test_presets_do_what_is_planned(name: str) -> None:
    """In full size, without memory: on torch's meta device."""
    with torch.device("meta"):
        if name.startswith("DiT"):
            config = {key: value for key, value in PRESETS[name].items() if key != "_class_name"}
            dit = DiTTransformer2DModel(**config)
            size, call = (512, 512), run_dit(dit, 512, 512, device="meta")
        else:
            config = {key: value for key, value in PRESETS[name].items() if key != "_class_name"}
            wan = WanTransformer3DModel(**config)
            size, call = (480, 832, 81), run_wan(wan, 21, 60, 104, device="meta")
    assert plan(name, *size).model_flops("softmax") == count_flops(call)


@pytest.mark.parametrize(
    "grid",
    [
        (16, 16),
        (32, 32),
        (64, 64),
        (21, 30, 50),
        (21, 30, 52),
        (1, 30, 52),
        (7, 11),
        (1, 1),
        (2, 1),
        (97, 101),
    ],
)
def test_recommended_blocks_keep_mixing_cheap(grid: tuple[int, ...]) -> None:
    layout = recommended_layout(grid)
    tokens, blocks = layout.num_tokens, layout.num_blocks
    assert blocks <= max(1, (tokens / 2) ** 0.5)
    assert blocks == 1 or 2 * blocks**2 / (4 * tokens + 2 * blocks**2) <= 0.2
    # Never far from as many as are allowed.
    assert blocks >= 0.2 * (tokens / 2) ** 0.5 or tokens < 100


def test_recommended_blocks_are_known_for_common_grids() -> None:
    assert recommended_layout((32, 32)).blocks == (4, 4)
    assert recommended_layout((128, 128)).blocks == (8, 8)
    assert recommended_layout((21, 30, 50)).is_even


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("DiT-S/2", 250, 256), r"height 250 does not divide into tokens of 16 .* nearest .* is 240 or 256"),
        (("DiT-S/2", 256, 8), r"width 8 .* nearest .* is 16"),
        (("DiT-S/2", 256, 256, 5), "an image model has no frames, got frames=5"),
        (("Wan2.1-1.3B", 480, 832), "a video model needs frames"),
        (("Wan2.1-1.3B", 480, 832, 80), r"frames 80 .* nearest .* is 77 or 81"),
        (("DiT-M/2", 256, 256), r"'DiT-M/2' is no folder or hub id .* none of DiT-S/2"),
    ],
    ids=str,
)
def test_what_cannot_be_planned_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        plan(*arguments)


def test_layers_and_classes_that_cannot_be_planned_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="linear_layers must lie between 1 and 12, got 13"):
        plan("DiT-S/2", 256, 256, linear_layers=13)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "PixArtTransformer2DModel"}))
    with pytest.raises(ValueError, match="is a PixArtTransformer2DModel; planned can be DiT"):
        load_model_config(str(tmp_path))


def test_the_grid_is_that_of_the_autoencoder_and_the_patches() -> None:
    assert token_grid((2, 2), 512, 256) == (32, 16)
    assert token_grid((1, 2, 2), 480, 832, 81) == (21, 30, 52)


def test_the_script_prints_a_table_of_at_most_100_columns() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "plan.py"), "--model"]
    size = ["--height", "720", "--width", "1280", "--frames", "81", "--gate", "true"]
    table = subprocess.run([*command, "Wan2.1-14B", *size], capture_output=True, text=True, check=True).stdout
    assert "21 x 45 x 80 = 75,600 tokens" in table
    assert "whole model" in table
    assert max(map(len, table.splitlines())) <= 100
    wrong = subprocess.run([*command, "DiT-S/2", *size], capture_output=True, text=True, check=False)
    assert wrong.returncode == 1
    assert wrong.stderr.endswith("error: an image model has no frames, got frames=81; leave it out\n")
