"""Stock models into MHLA models."""

from __future__ import annotations

from typing import Any

from diffusers import (
    DiTTransformer2DModel,
    ModelMixin,
    SanaVideoTransformer3DModel,
    WanTransformer3DModel,
)

from ..attention import MHLAConfig
from .image import MHLADiTTransformer2DModel
from .rebuild import rebuild
from .video import MHLASanaVideoTransformer3DModel, MHLAWanTransformer3DModel

# Stock class -> the same model with MHLA.
_CONVERTIBLE: dict[type[ModelMixin], type[Any]] = {
    DiTTransformer2DModel: MHLADiTTransformer2DModel,
    SanaVideoTransformer3DModel: MHLASanaVideoTransformer3DModel,
    WanTransformer3DModel: MHLAWanTransformer3DModel,
}


def convert_to_mhla(
    model: ModelMixin, config: MHLAConfig | dict[str, Any] | None = None, *, output_loading_info: bool = False
) -> Any:
    """A copy of a stock model with MHLA in the layers that ``config.layers`` names (all by default).

    Every weight carries over, in its dtype and on its device; the mixing matrices and what else the config
    asks for are new and at their start. The result is not the same function: it is a start for fine-tuning.
    The model given is not changed.

    Args:
        model: a :class:`diffusers.DiTTransformer2DModel`, :class:`diffusers.SanaVideoTransformer3DModel` or
            :class:`diffusers.WanTransformer3DModel`, or an MHLA model to be given another config. Then mixing
            matrices carry over too, resized to the new blocks, and so do the convolutions, norms and gates
            that both configs ask for.
        config: an :class:`MHLAConfig` or its dict.
        output_loading_info: also return ``{"new": [...], "dropped": [...]}``, names of weights.

    Returns:
        The MHLA model, or the model and the names.

    Raises:
        ValueError: for a model that there is no MHLA form of, or a config that does not fit it.
    """
    target = next((new for stock, new in _CONVERTIBLE.items() if isinstance(model, stock)), None)
    if target is None:
        raise ValueError(
            f"no MHLA form of {type(model).__name__}; those that have one: "
            f"{', '.join(stock.__name__ for stock in _CONVERTIBLE)}"
        )
    converted, info = rebuild(model, target, attention="mhla", mhla_config=config)
    return (converted, info) if output_loading_info else converted
