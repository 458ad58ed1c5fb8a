"""Clips in files, and how they are cached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from mhla_diffusion.files.videos import write_video
from mhla_diffusion.training import TextConfig, VideoDataConfig, VideoLatentCacheConfig


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five videos of 12 frames, one of them upright, and captions."""
    random, lines = np.random.default_rng(0), ["path,caption"]
    for i, size in enumerate([(32, 48)] * 4 + [(48, 32)]):
        write_video(random.integers(0, 255, (12, *size, 3), np.uint8), tmp_path / f"clips/{i}.mp4", fps=8)
        lines.append(f"{i}.mp4,{'abcde'[: i + 1]}")
    (tmp_path / "clips" / "captions.csv").write_text("\n".join(lines))
    return tmp_path / "clips"


@pytest.fixture
def config(folder: Path, text_parts: dict[str, Any], tmp_path: Path) -> VideoLatentCacheConfig:
    """Four latent channels, whose mean and deviation are not 0 and 1; the parts lie in a pipeline."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[0.5, 1.0, 2.0, 4.0],
    )  # fmt: skip
    for name, part in {**text_parts, "vae": vae}.items():
        part.save_pretrained(tmp_path / "wan" / name)
    (tmp_path / "wan" / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    return VideoLatentCacheConfig(
        output_dir=str(tmp_path / "cache"),
        vae=str(tmp_path / "wan"),
        data=VideoDataConfig("folder", path=str(folder), frames=5, sizes=((16, 32), (32, 16)), fps=8),
        text=TextConfig(encoder=str(tmp_path / "wan"), max_length=8),
        clips=2,
        shard_size=3,
    )


@pytest.fixture
def image_encoder(tmp_path: Path) -> str:
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=16,
        patch_size=8,
    )  # fmt: skip
    CLIPVisionModel(vision).save_pretrained(tmp_path / "wan" / "image_encoder")
    size = {"height": 16, "width": 16}
    CLIPImageProcessor(size=size, crop_size=size).save_pretrained(tmp_path / "wan" / "image_processor")
    return str(tmp_path / "wan")
