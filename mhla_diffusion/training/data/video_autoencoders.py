"""Autoencoders of videos, and those of images, frame by frame, as Latte's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...autoencoders import has_first_frame, vae_strides


def needs_tiles(vae: Any) -> bool:
    """Tell an autoencoder that encodes and decodes by tiles alone, as that of Allegro."""
    return hasattr(vae, "kernel") and hasattr(vae, "stride")


def require_clips(vae: Any, frames: int, sizes: Sequence[tuple[int, int]]) -> None:
    """Check that an autoencoder takes clips of so many frames, and of these heights and widths.

    Raises:
        ValueError: otherwise, with what it takes.
    """
    time, space = vae_strides(vae)
    if has_first_frame(vae) and (extra := (frames - 1) % time):
        raise ValueError(
            f"data.frames must be one more than a multiple of {time} for this autoencoder, got {frames}; the "
            f"nearest are {frames - extra} and {frames - extra + time}"
        )
    require_multiples("data.sizes", sizes, space)
    if needs_tiles(vae):
        for size in sizes:
            _require_tiles(vae, (frames, *size))


def require_multiples(name: str, sizes: Sequence[tuple[int, int]], factor: int) -> None:
    """Check that an autoencoder's stride divides heights and widths.

    Raises:
        ValueError: otherwise, with the nearest size.
    """
    for size in sizes:
        if any(side % factor for side in size):
            raise ValueError(
                f"{name} must be multiples of {factor} for this autoencoder, got {tuple(size)}; the "
                f"nearest is {tuple(max(1, round(side / factor)) * factor for side in size)}"
            )


def _require_tiles(vae: Any, size: tuple[int, ...]) -> None:
    """Check that tiles cover a clip to its edges: what lies beyond the last would be lost."""
    tiles = list(zip(size, vae.kernel, vae.stride, strict=True))
    if any(side < tile or (side - tile) % step for side, tile, step in tiles):
        wanted = ", ".join(f"{tile} and a multiple of {step}" for _, tile, step in tiles)
        raise ValueError(
            f"this autoencoder takes clips in tiles: data.frames and the height and width in data.sizes must "
            f"be {wanted}, got {size}"
        )


@torch.no_grad()
def encode_clip(vae: Any, clip: Tensor) -> Tensor:
    """Encode a clip ``[C, F, H, W]`` by the mode of its latents, as the pipelines scale them, float16.

    Returns:
        ``[C', f, h, w]``.
    """
    clip = clip.to(vae.device, vae.dtype)
    if needs_tiles(vae):
        vae.enable_tiling()
    if type(vae).__name__ == "AutoencoderKL":
        latents = vae.encode(clip.transpose(0, 1)).latent_dist.mode().transpose(0, 1)
    else:
        latents = vae.encode(clip[None]).latent_dist.mode()[0]
    return _scaled(vae, latents).half().cpu()


def _scaled(vae: Any, latents: Tensor) -> Tensor:
    config = vae.config
    scale = config.get("scaling_factor", 1.0)
    # Numbers of the config, or of LTX weights.
    mean, std = (
        config[name] if name in config else getattr(vae, name, None)
        for name in ("latents_mean", "latents_std")
    )  # fmt: skip
    if mean is None or std is None:
        return (latents - (config.get("shift_factor") or 0.0)) * scale
    mean, std = (torch.as_tensor(values, device=vae.device).view(-1, 1, 1, 1) for values in (mean, std))
    return (latents - mean) * scale / std
