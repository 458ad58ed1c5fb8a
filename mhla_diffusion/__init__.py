"""Diffusion transformers with Multi-Head Linear Attention (arXiv 2601.07832)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .registration import offer_classes

if TYPE_CHECKING:
    from mhla_diffusion.pipelines import *  # noqa: F403

    from .attention import MHLA as MHLA
    from .backbones import *  # noqa: F403
    from .config import MHLAConfig as MHLAConfig
    from .domains import *  # noqa: F403

__version__ = "0.1.0"

_ROOMS = {"MHLA": ".attention", "MHLAConfig": ".config"}

offer_classes()


def __getattr__(name: str) -> Any:
    """Import on first use, so that importing the package costs no more than what is used of it."""
    if name == "__all__":
        return _public()
    if name == "ModelMixin":
        # diffusers looks for the base class in the library that model_index.json names.
        from diffusers import ModelMixin

        return ModelMixin
    # Models and pipelines are what their rooms say.
    rooms = (_ROOMS[name],) if name in _ROOMS else (".domains", ".backbones", ".pipelines")
    for room in rooms if not name.startswith("_") else ():
        module = importlib.import_module(room, __name__)
        if name in getattr(module, "__all__", _ROOMS):
            globals()[name] = getattr(module, name)
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_public()})


def _public() -> list[str]:
    from . import backbones, domains, pipelines

    return sorted({*_ROOMS, *backbones.__all__, *domains.__all__, *pipelines.__all__})
