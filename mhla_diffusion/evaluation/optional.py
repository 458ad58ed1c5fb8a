"""Packages of the ``eval`` extra, imported at the moment they are needed."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str) -> ModuleType:
    """Import ``module``.

    Raises:
        ImportError: when it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"evaluation needs the package '{error.name}', which is not installed: "
            "pip install mhla-diffusion[eval]"
        ) from error
