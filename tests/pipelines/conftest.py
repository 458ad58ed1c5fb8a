"""Tiny pipelines of real parts, with weights that are nowhere zero."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import nn

from mhla_diffusion import MHLADiTPipeline, MHLADiTTransformer2DModel

TINY: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 2,
}


def _randomize(model: nn.Module) -> None:
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.3, 0.3)


@pytest.fixture
def make_vae() -> Callable[[], AutoencoderKL]:
    """``make_vae()``: 4 latent channels, images of twice the size."""

    def make() -> AutoencoderKL:
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(4, 8), latent_channels=4, norm_num_groups=2, sample_size=16,
        ).eval()  # fmt: skip

    return make


@pytest.fixture
def make_pipeline(make_vae: Callable[[], AutoencoderKL]) -> Callable[..., MHLADiTPipeline]:
    """``make_pipeline(channels=4, vae=True, scheduler=None, **others)``: classes cat (0), dog (1), fox (2).

    Other arguments are the transformer's, or ``training`` and ``prediction_type`` of the pipeline.
    """

    def make(
        *,
        channels: int = 4,
        vae: bool = True,
        scheduler: Any = None,
        training: dict[str, Any] | None = None,
        prediction_type: str | None = None,
        **settings: Any,
    ) -> MHLADiTPipeline:
        transformer = MHLADiTTransformer2DModel(
            **{
                **TINY,
                "in_channels": channels,
                "num_embeds_ada_norm": 3,
                "mhla_config": {"blocks": 4},
                **settings,
            }
        ).eval()
        _randomize(transformer)
        pipeline = MHLADiTPipeline(
            transformer, scheduler or DDIMScheduler(), vae=make_vae() if vae else None,
            id2label={0: "cat, kitten", 1: "dog", 2: "fox"}, training=training,
            prediction_type=prediction_type,
        )  # fmt: skip
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return make


@pytest.fixture
def make_stock_pipeline(make_vae: Callable[[], AutoencoderKL]) -> Callable[[], DiTPipeline]:
    """``make_stock_pipeline()``: a DiTPipeline, with the 1000 classes that its null class is made for."""

    def make() -> DiTPipeline:
        transformer = DiTTransformer2DModel(**TINY, in_channels=4, out_channels=8).eval()
        _randomize(transformer)
        pipeline = DiTPipeline(
            transformer, vae=make_vae(), scheduler=DDIMScheduler(), id2label={0: "tench", 1: "goldfish"}
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return make


@pytest.fixture
def save_as_on_the_hub() -> Callable[[DiTPipeline, Path], None]:
    """Save as facebook/DiT-XL-2-256 is: a Transformer2DModel with the fields and the file of its time."""

    def save(pipeline: DiTPipeline, folder: Path) -> None:
        pipeline.save_pretrained(folder, safe_serialization=False)
        index = json.loads((folder / "model_index.json").read_text())
        index["transformer"] = ["diffusers", "Transformer2DModel"]
        index["id2label"] = {"0": "tench, Tinca tinca", "1": "goldfish"}
        (folder / "model_index.json").write_text(json.dumps(index))
        path = folder / "transformer" / "config.json"
        config = json.loads(path.read_text())
        old = dict.fromkeys(("cross_attention_dim", "num_vector_embeds"))
        old |= dict.fromkeys(("only_cross_attention", "use_linear_projection"), False)
        path.write_text(json.dumps({**config, **old, "_class_name": "Transformer2DModel"}))
        weights = folder / "transformer" / "diffusion_pytorch_model.bin"
        table = {"pos_embed.pos_embed": pipeline.transformer.pos_embed.pos_embed}
        torch.save({**torch.load(weights), **table}, weights)

    return save
