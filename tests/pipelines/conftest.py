"""Tiny pipelines of real parts, with weights that are nowhere zero."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    SanaImageToVideoPipeline,
    SanaPipeline,
    SanaTransformer2DModel,
    SanaVideoPipeline,
    SanaVideoTransformer3DModel,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

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


@pytest.fixture
def video_vae() -> AutoencoderKLWan:
    """As Wan's: 4 latent channels, one latent frame of the first and of every four, 8 pixels to one."""
    return AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True, True], latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    ).eval()  # fmt: skip


@pytest.fixture
def make_stock_video_pipeline(text_parts: dict[str, Any], video_vae: AutoencoderKLWan) -> Callable[..., Any]:
    """``make_stock_video_pipeline(name)``: wan, wan2.2, wan-image, sana_video, sana_video-image."""
    wan: dict[str, Any] = {
        "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
        "num_layers": 1, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32,
    }  # fmt: skip
    sana: dict[str, Any] = {
        "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
        "num_layers": 1, "num_cross_attention_heads": 2, "cross_attention_head_dim": 12,
        "cross_attention_dim": 24, "caption_channels": 16,
    }  # fmt: skip

    def make(name: str) -> Any:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        parts = {**text_parts, "vae": video_vae, "scheduler": scheduler}
        if name.startswith("sana_video"):
            parts["transformer"] = SanaVideoTransformer3DModel(**sana).eval()
            return (SanaImageToVideoPipeline if name.endswith("image") else SanaVideoPipeline)(**parts)
        if name == "wan-image":
            vision = CLIPVisionConfig(
                hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                image_size=16, patch_size=8,
            )  # fmt: skip
            size = {"height": 16, "width": 16}
            return WanImageToVideoPipeline(
                **parts,
                transformer=WanTransformer3DModel(
                    **{**wan, "in_channels": 12}, image_dim=16, added_kv_proj_dim=24
                ).eval(),
                image_encoder=CLIPVisionModel(vision).eval(),
                image_processor=CLIPImageProcessor(size=size, crop_size=size),
            )
        parts["transformer"] = WanTransformer3DModel(**wan).eval()
        if name == "wan2.2":
            parts |= {"transformer_2": WanTransformer3DModel(**wan).eval(), "boundary_ratio": 0.9}
        return WanPipeline(**parts)

    return make


@pytest.fixture
def sana_pipeline(text_parts: dict[str, Any]) -> SanaPipeline:
    """Images of texts, 4 latent channels, 4 pixels to one."""
    transformer = SanaTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, num_layers=1,
        num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=16,
        patch_size=1, sample_size=32,
    ).eval()  # fmt: skip
    blocks = ("ResBlock", "ResBlock", "ResBlock")
    vae = AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_types=blocks, decoder_block_types=blocks,
        encoder_block_out_channels=(4, 8, 8), decoder_block_out_channels=(4, 8, 8),
        encoder_layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()), decoder_qkv_multiscales=((), (), ()),
        downsample_block_type="conv", upsample_block_type="interpolate", scaling_factor=0.5,
    ).eval()  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return SanaPipeline(**text_parts, vae=vae, transformer=transformer, scheduler=scheduler)
