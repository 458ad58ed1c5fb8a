"""Train a class-conditional image model.

    accelerate launch scripts/train_image.py --config configs/image_dit_mnist.yaml
    accelerate launch scripts/train_image.py --config FILE --trainer.max_steps 100 --resume latest

Exit codes: 0 when trained to the end; 130 (Ctrl-C) or 143 (SIGTERM) when stopped, after saving a checkpoint
that ``--resume latest`` goes on from; 1 for an error.
"""

from __future__ import annotations

import sys

from mhla_diffusion.training import ImageTrainingConfig, run_script, train_image

if __name__ == "__main__":
    sys.exit(run_script(ImageTrainingConfig, train_image, description=__doc__ or ""))
