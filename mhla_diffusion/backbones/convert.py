"""Softmax models into MHLA models."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, ModelMixin
from torch import Tensor

from ..attention import MHLA, MHLAConfig
from .image import MHLADiTTransformer2DModel

logger = logging.getLogger(__name__)

# Stock class -> the same model with MHLA.
_CONVERTIBLE: dict[type[ModelMixin], type[Any]] = {DiTTransformer2DModel: MHLADiTTransformer2DModel}


@torch.no_grad()
def convert_to_mhla(
    model: ModelMixin, config: MHLAConfig | dict[str, Any] | None = None, *, output_loading_info: bool = False
) -> Any:
    """A copy of a softmax model with MHLA in the layers that ``config.layers`` names (all by default).

    Every weight carries over, in its dtype and on its device; the mixing matrices and what else the config
    asks for are new and at their start. The result is not the same function: it is a start for fine-tuning.
    The model given is not changed.

    Args:
        model: a :class:`diffusers.DiTTransformer2DModel`, or an MHLA model to be given another config. Then
            mixing matrices carry over too, resized to the new blocks, and so do the convolutions, norms and
            gates that both configs ask for.
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
    # The config of an old checkpoint has more fields than the class takes.
    known = inspect.signature(target.__init__).parameters
    arguments = {key: value for key, value in model.config.items() if key in known}
    converted = target(**{**arguments, "attention": "mhla", "mhla_config": config})
    taken = converted.state_dict()
    source = {
        key: value.clone() for key, value in model.state_dict().items() if key in taken or _is_stock(key)
    }
    _resize_mixing(model, converted, source)
    # Assigning keeps the dtype of each weight; what is new takes the model's.
    outcome = (
        converted.to(model.device).train(model.training).load_state_dict(source, strict=False, assign=True)
    )
    for processor in converted.modules():
        if isinstance(processor, MHLA):
            processor.to(model.dtype)
    new = sorted(outcome.missing_keys)
    dropped = sorted(set(model.state_dict()) - set(source))
    assert not outcome.unexpected_keys, outcome
    assert not any(map(_is_stock, new)), outcome
    logger.info("kept %d tensors; %d are new: %s", len(source), len(new), ", ".join(new) or "none")
    return (converted, {"new": new, "dropped": dropped}) if output_loading_info else converted


def _is_stock(key: str) -> bool:
    """Whether a weight is the stock model's, and not a processor's."""
    return ".processor." not in key


def _resize_mixing(model: Any, converted: Any, source: dict[str, Tensor]) -> None:
    """Put the mixing matrices of an MHLA model, resized, in the place of those in its state dict."""
    old, new = (
        {name: part for name, part in whole.named_modules() if getattr(part, "mixing", None) is not None}
        for whole in (model, converted)
    )
    for name in old.keys() & new.keys():
        new[name].take_mixing(old[name])
        source[f"{name}.mixing"] = new[name].mixing.to(old[name].mixing.dtype)
        if new[name].blocks != old[name].blocks:
            logger.info("%s: mixing resized, blocks %s to %s", name, old[name].blocks, new[name].blocks)
