"""Train a class-conditional image model.

    accelerate launch scripts/train_image.py --config configs/image_dit_mnist.yaml
    accelerate launch scripts/train_image.py --config FILE --trainer.max_steps 100 --resume latest

Exit codes: 0 when trained to the end; 130 (Ctrl-C) or 143 (SIGTERM) when stopped, after saving a checkpoint
that ``--resume latest`` goes on from; 1 for an error.
"""

from __future__ import annotations

import logging
import os
import sys

from mhla_diffusion.training import ImageTrainingConfig, parse_config, train_image


def main() -> int:
    logging.basicConfig(
        # One voice: the other processes speak up for warnings alone.
        level=logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING,
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
    )
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    config, resume = parse_config(ImageTrainingConfig, description=__doc__ or "")
    try:
        stopped_by = train_image(config, resume=resume)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    return 128 + stopped_by if stopped_by else 0


if __name__ == "__main__":
    sys.exit(main())
