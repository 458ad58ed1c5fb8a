"""``mhla export-checkpoint``: what a run has learned so far, as a pipeline.

mhla export-checkpoint --run runs/a --out runs/a-exported [--checkpoint step-00001000] [--weights raw]
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ..training.export import Weights, export_checkpoint
from .parsing import parse_and_call


def export(run: str, out: str, checkpoint: str | None = None, weights: Weights = "averaged") -> None:
    """Write a checkpoint of a training as a pipeline, which mhla generate and diffusers open.

    Args:
        run: output folder of the training, whose data must be where they were.
        out: a folder that does not exist yet.
        checkpoint: such as step-00001000; the last that is whole by default.
        weights: averaged, which is what a finished run leaves, or raw, as the optimizer has them.
    """
    logging.info(
        "saved %s, from %s", out, export_checkpoint(run, out, checkpoint=checkpoint, weights=weights)
    )


def main(arguments: Sequence[str], prog: str) -> None:
    """Export a checkpoint."""
    parse_and_call(export, arguments, prog)
