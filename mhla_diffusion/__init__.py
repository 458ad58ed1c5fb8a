"""Diffusion transformers with Multi-Head Linear Attention (arXiv 2601.07832)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mhla_diffusion.pipelines import MHLADiTPipeline, MHLAPipeline, MHLAWanPipeline

    from .attention import MHLA, MHLAConfig
    from .backbones import (
        MHLAAttnProcessor,
        MHLADiTTransformer2DModel,
        MHLASanaVideoTransformer3DModel,
        MHLAWanTransformer3DModel,
        convert_to_mhla,
    )

__version__ = "0.1.0"

# Resolved on first use, so that importing the package costs no more than importing what is used.
_HOMES = {
    "MHLA": ".attention",
    "MHLAConfig": ".attention",
    "MHLAAttnProcessor": ".backbones",
    "MHLADiTTransformer2DModel": ".backbones",
    "MHLASanaVideoTransformer3DModel": ".backbones",
    "MHLAWanTransformer3DModel": ".backbones",
    "convert_to_mhla": ".backbones",
    "MHLADiTPipeline": ".pipelines",
    "MHLAPipeline": ".pipelines",
    "MHLAWanPipeline": ".pipelines",
}

__all__ = [
    "MHLA",
    "MHLAAttnProcessor",
    "MHLAConfig",
    "MHLADiTPipeline",
    "MHLADiTTransformer2DModel",
    "MHLAPipeline",
    "MHLASanaVideoTransformer3DModel",
    "MHLAWanPipeline",
    "MHLAWanTransformer3DModel",
    "convert_to_mhla",
]


def __getattr__(name: str) -> Any:
    if name == "ModelMixin":
        # diffusers looks for the base class in the library that model_index.json names.
        from diffusers import ModelMixin

        return ModelMixin
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
