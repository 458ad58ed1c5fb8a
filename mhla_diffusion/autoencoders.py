"""What autoencoders of diffusers make of a size: pixels of latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_BY_FIRST_FRAME = ("AutoencoderKLWan", "AutoencoderKLLTXVideo", "AutoencoderKLHunyuanVideo")
VIDEO_AUTOENCODERS = (*_BY_FIRST_FRAME, "AutoencoderKLAllegro", "AutoencoderKL")


def vae_scale_factor(vae: Any) -> int:
    """Return the pixels along a side of a latent, 1 without an autoencoder."""
    if vae is None:
        return 1
    if hasattr(vae, "spatial_compression_ratio"):
        return vae.spatial_compression_ratio
    stages = vae.config.get("block_out_channels") or vae.config["encoder_block_out_channels"]
    return 2 ** (len(stages) - 1)


def vae_strides(vae: Any) -> tuple[int, int]:
    """Return the frames and the pixels along a side of a latent, 1 each without an autoencoder."""
    if vae is None:
        return 1, 1
    config = vae.config
    if "scale_factor_temporal" in config:
        return config.scale_factor_temporal, config.scale_factor_spatial
    if hasattr(vae, "temporal_compression_ratio"):
        return vae.temporal_compression_ratio, vae.spatial_compression_ratio
    return int(config.get("temporal_compression_ratio", 1)), vae_scale_factor(vae)


def has_first_frame(vae: Any) -> bool:
    """Tell if it makes one latent frame of the first, then one of each few."""
    own = getattr(vae, "_orig_mod", vae)  # inside of torch.compile
    return any(kind.__name__ in _BY_FIRST_FRAME for kind in type(own).__mro__)


def size_in_pixels(vae: Any, latents: Sequence[int]) -> tuple[int, ...]:
    """Return what an autoencoder, if any, makes of latents of this size: height and width, frames first."""
    *frames, height, width = latents
    if not frames:
        factor = vae_scale_factor(vae)
        return height * factor, width * factor
    time, space = vae_strides(vae)
    return frames[0] * time - (time - 1 if has_first_frame(vae) else 0), height * space, width * space
