"""Encode a data set with an autoencoder, for training on latents.

    accelerate launch scripts/cache_latents.py --vae stabilityai/sd-vae-ft-ema --size 256 \
        --output_dir latents/imagenet256 --data.source folder --data.path imagenet/train --data.flip true

Start it again to finish what was interrupted.
"""

from __future__ import annotations

import logging

from mhla_diffusion.training import LatentCacheConfig, cache_latents, parse_config


def main() -> None:
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"
    )
    config, _ = parse_config(LatentCacheConfig, description=__doc__ or "")
    try:
        cache_latents(config)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
