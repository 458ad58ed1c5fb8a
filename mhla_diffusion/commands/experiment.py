"""``mhla experiment``: experiments that are run as one command from a config."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ..conversion.experiment import ExperimentConfig, experiment
from ..training.config import parse_config


def main(arguments: Sequence[str], prog: str, kind: str) -> None:
    """Run the experiment of a kind: ``conversion``."""
    assert kind == "conversion"
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for library in ("mhla_diffusion.backbones.rebuild", "accelerate"):
        logging.getLogger(library).setLevel(logging.WARNING)
    description = __doc__ or ""
    config, _ = parse_config(ExperimentConfig, arguments, prog=prog, description=description, resumable=False)
    experiment(config)
