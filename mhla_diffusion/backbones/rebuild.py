"""A model built anew with another config, and the weights it can keep."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor

from ..attention import MHLA

logger = logging.getLogger(__name__)


@torch.no_grad()
def rebuild(model: ModelMixin, target: type[Any], **changes: Any) -> tuple[Any, dict[str, list[str]]]:
    """A model of class ``target`` with the config and the weights of ``model``, but for ``changes``.

    Weights keep their dtype and device. Mixing matrices are resized to the new blocks, and what the new
    config asks for beyond the old is at its start. The model given is not changed.

    Returns:
        The model, and ``{"new": [...], "dropped": [...]}``, names of weights.

    Raises:
        ValueError: for changes that do not fit the model.
    """
    # The config of an old checkpoint has more fields than the class takes.
    known = inspect.signature(target.__init__).parameters
    arguments = {key: value for key, value in model.config.items() if key in known}
    rebuilt = target(**{**arguments, **changes})
    taken = rebuilt.state_dict()
    source = {
        key: value.clone() for key, value in model.state_dict().items() if key in taken or _is_stock(key)
    }
    _resize_mixing(model, rebuilt, source)
    # Assigning keeps the dtype of each weight; what is new takes the model's.
    outcome = (
        rebuilt.to(model.device).train(model.training).load_state_dict(source, strict=False, assign=True)
    )
    for processor in rebuilt.modules():
        if isinstance(processor, MHLA):
            processor.to(model.dtype)
    new = sorted(outcome.missing_keys)
    dropped = sorted(set(model.state_dict()) - set(source))
    assert not outcome.unexpected_keys, outcome
    assert not any(map(_is_stock, new)), outcome
    logger.info("kept %d tensors; %d are new: %s", len(source), len(new), ", ".join(new) or "none")
    return rebuilt, {"new": new, "dropped": dropped}


def _is_stock(key: str) -> bool:
    """Whether a weight is the stock model's, and not a processor's."""
    return ".processor." not in key


def _resize_mixing(model: Any, rebuilt: Any, source: dict[str, Tensor]) -> None:
    """Put the mixing matrices of an MHLA model, resized, in the place of those in its state dict."""
    old, new = (
        {name: part for name, part in whole.named_modules() if getattr(part, "mixing", None) is not None}
        for whole in (model, rebuilt)
    )
    for name in old.keys() & new.keys():
        new[name].take_mixing(old[name])
        source[f"{name}.mixing"] = new[name].mixing.to(old[name].mixing.dtype)
        if new[name].blocks != old[name].blocks:
            logger.info("%s: mixing resized, blocks %s to %s", name, old[name].blocks, new[name].blocks)
