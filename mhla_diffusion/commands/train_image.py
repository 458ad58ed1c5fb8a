"""Train a model of images, of classes or of texts.

    accelerate launch scripts/train_image.py --config configs/image_dit_mnist.yaml
    accelerate launch scripts/train_image.py --config configs/image_pixart_scenes.yaml
    accelerate launch scripts/train_image.py --config FILE --trainer.max_steps 100 --resume latest

Exit codes: 0 when trained to the end; 130 (Ctrl-C) or 143 (SIGTERM) when stopped, after saving a checkpoint
that ``--resume latest`` goes on from; 1 for an error.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..training import ImageTrainingConfig, run_script, train_image


def main(arguments: Sequence[str], prog: str) -> int:
    """Return the exit code of a training."""
    return run_script(ImageTrainingConfig, train_image, arguments, prog=prog, description=__doc__ or "")
