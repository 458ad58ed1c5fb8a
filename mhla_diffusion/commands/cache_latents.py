"""Encode a data set with an autoencoder, for training on latents.

    accelerate launch scripts/cache_latents.py image --vae stabilityai/sd-vae-ft-ema --size 256 \
        --output_dir latents/imagenet256 --data.source folder --data.path imagenet/train --data.flip true
    accelerate launch scripts/cache_latents.py image --vae PixArt-alpha/PixArt-Sigma-XL-2-1024-MS \
        --text.encoder PixArt-alpha/PixArt-Sigma-XL-2-1024-MS --text.max_length 300 --data.source webdataset \
        --data.path TARS --data.aspect_ratios 1024 --output_dir latents/pictures
    accelerate launch scripts/cache_latents.py video --vae Wan-AI/Wan2.1-T2V-1.3B-Diffusers \
        --text.encoder Wan-AI/Wan2.1-T2V-1.3B-Diffusers --data.source folder --data.path clips --data.fps 16 \
        --data.frames 81 --data.sizes "[[480, 832]]" --output_dir latents/clips

Start it again to finish what was interrupted.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from ..training import (
    LatentCacheConfig,
    VideoLatentCacheConfig,
    cache_latents,
    cache_video_latents,
    parse_config,
)

KINDS: dict[str, tuple[Any, Any]] = {
    "image": (LatentCacheConfig, cache_latents),
    "video": (VideoLatentCacheConfig, cache_video_latents),
}


def main(arguments: Sequence[str], prog: str, kind: str) -> None:
    """Encode images, or videos."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"
    )
    config_class, cache = KINDS[kind]
    description = __doc__ or ""
    config, _ = parse_config(config_class, arguments, prog=prog, description=description, resumable=False)
    cache(config)
