"""Runs of training, as its own tests have them."""

from __future__ import annotations

from tests.training.conftest import (  # noqa: F401
    _fresh_accelerator,
    image_folder,
    losses,
    run,
    settings,
    start,
    write_settings,
)
