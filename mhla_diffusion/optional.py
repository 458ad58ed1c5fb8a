"""Packages of the optional extras, imported at the moment they are needed."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, extra: str = "eval") -> ModuleType:
    """Import ``module``, which a package of the optional ``extra`` brings.

    Raises:
        ImportError: when it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = (error.name or module).partition(".")[0]
        raise ImportError(
            f"the package '{package}' of the extra {extra} is not installed: "
            f"pip install mhla-diffusion[{extra}]"
        ) from error
