"""Runs of training, as its own tests have them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mhla_diffusion.training import ImageTrainingConfig, parse_config
from tests.training.conftest import (  # noqa: F401
    _fresh_accelerator,
    image_folder,
    losses,
    run,
    settings,
    write_settings,
)


@pytest.fixture
def config(write_settings: Callable[[], Path]) -> ImageTrainingConfig:  # noqa: F811
    """The config that ``run`` runs."""
    return parse_config(ImageTrainingConfig, ["--config", str(write_settings())])[0]
