"""Caches that no model is trained on are refused before anything is encoded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from diffusers import AutoencoderKL, AutoencoderKLQwenImage, AutoencoderKLWan

from mhla_diffusion.training import (
    DataConfig,
    LatentCacheConfig,
    MovingDigitsConfig,
    TextConfig,
    VideoDataConfig,
    VideoLatentCacheConfig,
    cache_latents,
    cache_video_latents,
)
from mhla_diffusion.training.data.toys import ScenesConfig
from tests.training.stock_runs import KL, WAN


def cache(pipeline: str, vae: Any, size: tuple[int, int], folder: Path, *, videos: bool) -> None:
    """Encode drawn data; there is no text encoder, which is looked for after the refusals."""
    vae.save_pretrained(folder / "vae")
    places: dict[str, Any] = {
        "output_dir": str(folder / "cache"), "vae": str(folder / "vae"),
        "text": TextConfig(str(folder / "none"), max_length=77, pipeline=pipeline),
    }  # fmt: skip
    if videos:
        digits = MovingDigitsConfig(digits=1, digit_size=12, num_clips=1)
        clips = VideoDataConfig("moving_mnist", frames=5, sizes=(size,), moving_digits=digits)
        cache_video_latents(VideoLatentCacheConfig(**places, data=clips))
    else:
        scenes = DataConfig("scene", sizes=(size,), scenes=ScenesConfig(num_images=1, side=max(size)))
        cache_latents(LatentCacheConfig(**places, data=scenes))


@pytest.mark.parametrize(
    ("pipeline", "vae", "size", "message"),
    [
        ("QwenImagePipeline", "kl", (64, 64), "decodes by an AutoencoderKLQwenImage, got an AutoencoderKL:"),
        ("LuminaPipeline", "qwen", (64, 64), "decodes by an AutoencoderKL, got an AutoencoderKLQwenImage:"),
        ("HunyuanDiTPipeline", "kl", (64, 72), "multiples of 16, but the data are of 64 x 72 pixels"),
        ("", "qwen", (64, 64), "AutoencoderKLQwenImage is for QwenImagePipeline alone: set text.pipeline to"),
        ("LattePipeline", "kl", (64, 64), "LattePipeline is not for images: it must be one of Lumina"),
    ],
)
def test_of_pictures(pipeline: str, vae: str, size: tuple[int, int], message: str, tmp_path: Path) -> None:
    made = AutoencoderKL(**KL) if vae == "kl" else AutoencoderKLQwenImage(**WAN)
    with pytest.raises(ValueError, match=message):
        cache(pipeline, made, size, tmp_path, videos=False)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("pipeline", "size", "message"),
    [
        ("Kandinsky5T2VPipeline", (64, 64), "by an AutoencoderKLHunyuanVideo, got an AutoencoderKLWan"),
        ("SanaVideoPipeline", (64, 48), "multiples of 32, but the data are of 64 x 48 pixels"),
        ("WanVACEPipeline", (64, 64), "cache-latents, --text.pipeline WanVACEPipeline and --control"),
        ("ChronoEditPipeline", (64, 64), "ChronoEditPipeline and --image_condition edit"),
        ("QwenImagePipeline", (64, 64), "QwenImagePipeline is not for videos: it must be one of Latte"),
    ],
)
def test_of_clips(pipeline: str, size: tuple[int, int], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        cache(pipeline, AutoencoderKLWan(**WAN), size, tmp_path, videos=True)
    assert not (tmp_path / "cache").exists()
