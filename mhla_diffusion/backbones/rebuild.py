"""A model built anew with another config around the weights that it can keep."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..attention import MHLA

logger = logging.getLogger(__name__)


@torch.no_grad()
def rebuild(model: ModelMixin, target: type[Any], **changes: Any) -> tuple[Any, dict[str, list[str]]]:
    """Build a model of class ``target`` with the config and the weights of ``model``, but for ``changes``.

    It is built without weights and takes the tensors of ``model`` over, so that there is no second copy of
    them at any time. Mixing matrices are resized to the new blocks, and what the new config asks for beyond
    the old is at its start.

    Returns:
        The model, and ``{"new": [...], "dropped": [...]}``, names of weights.

    Raises:
        ValueError: for changes that do not fit the model, or weights that cannot be taken.
    """
    require_plain_weights(model)
    _require_plain_layers(model)
    # The config of an old checkpoint has more fields than the class takes.
    known = inspect.signature(target.__init__).parameters
    arguments = {key: value for key, value in model.config.items() if key in known}
    with init_empty_weights():  # tables, such as those of positions, are made
        rebuilt = target(**{**arguments, **changes}).train(model.training)
    device, dtype = model.device, model.dtype  # each of which walks over the whole model
    for processor in _mhla_modules(rebuilt).values():
        processor.to_empty(device=device)
        processor.reset_parameters()
        processor.to(dtype)
    taken = rebuilt.state_dict()
    source = {key: value for key, value in model.state_dict().items() if key in taken or _is_stock(key)}
    _take_processors(model, rebuilt, source)
    # Assigning takes the tensor itself, and its dtype.
    outcome = rebuilt.load_state_dict(source, strict=False, assign=True)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    for name, parameter in rebuilt.named_parameters():
        parameter.requires_grad_(name not in frozen)
    if model.is_gradient_checkpointing:
        rebuilt.enable_gradient_checkpointing()
    _take_quantizer(model, rebuilt)
    for module in rebuilt.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    new = sorted(outcome.missing_keys)
    dropped = sorted(set(model.state_dict()) - set(source))
    assert not outcome.unexpected_keys, outcome
    assert not any(map(_is_stock, new)), outcome
    assert not any(tensor.is_meta for tensor in (*rebuilt.parameters(), *rebuilt.buffers()))
    logger.info("kept %d tensors; %d are new: %s", len(source), len(new), ", ".join(new) or "none")
    if dropped:
        logger.warning("%d weights have no place in the new config: %s", len(dropped), ", ".join(dropped))
    return rebuilt, {"new": new, "dropped": dropped}


def require_plain_weights(model: ModelMixin, *, fused: bool = False) -> None:
    """Check that all weights are there, under the names that the class gives them.

    Args:
        fused: whether projections may be fused, which leaves the plain ones beside them.

    Raises:
        ValueError: for adapters, fused projections and offloaded weights, saying what to do.
    """
    names = dict(model.named_parameters())
    merge = (
        "merge or unload its adapters first (fuse_lora, then unload_lora_weights; with peft merge_and_unload)"
    )
    remedies = {"base_layer": merge, "original_module": merge}
    if not fused:
        remedies["to_qkv"] = "call unfuse_qkv_projections() first"
    for part, remedy in remedies.items():
        if found := next((name for name in names if f".{part}." in name), None):
            raise ValueError(f"the model has {found}: {remedy}")
    found = next((name for name, weight in names.items() if hasattr(weight, "__tensor_flatten__")), None)
    if found and not isinstance(names[found], DTensor) and getattr(model, "hf_quantizer", None) is None:
        raise ValueError(
            f"{found} is a {type(names[found]).__name__}, which no file holds: quantise when the model is "
            "loaded, with quantization_config="
        )
    if found := next((name for name, weight in names.items() if weight.is_meta), None):
        raise ValueError(
            f"{found} is offloaded, so that its values are not there: take the model before that"
        )


def _require_plain_layers(model: ModelMixin) -> None:
    """Refuse quantisation that has put other layers in place of linear ones, and hooks that cast weights."""
    hooks = (getattr(module, "_diffusers_hook", None) for module in model.modules())
    if any(hook is not None and hook.get_hook("layerwise_casting") is not None for hook in hooks):
        raise ValueError(
            "weights of the model are stored in another dtype than they are computed in "
            "(enable_layerwise_casting): convert it as it was before, and enable that then"
        )
    quantizer = getattr(model, "hf_quantizer", None)
    method = "torchao" if quantizer is None else quantizer.quantization_config.quant_method
    method = getattr(method, "value", method)
    if method != "torchao":
        raise ValueError(
            f"the model is quantised by {method}, whose layers are others: convert it as it was before, save "
            "it, and give quantization_config= when it is loaded"
        )


def _take_quantizer(model: ModelMixin, rebuilt: ModelMixin) -> None:
    """Carry over what saves quantised weights, and what says that they are."""
    if (quantizer := getattr(model, "hf_quantizer", None)) is None:
        return
    rebuilt.hf_quantizer = quantizer
    rebuilt.is_quantized, rebuilt.quantization_method = model.is_quantized, model.quantization_method
    rebuilt.register_to_config(quantization_config=model.config["quantization_config"])


def _is_stock(key: str) -> bool:
    """Tell a weight of the stock model from one of a processor."""
    return ".processor." not in key


def _mhla_modules(model: nn.Module) -> dict[str, MHLA]:
    return {name: module for name, module in model.named_modules() if isinstance(module, MHLA)}


def _take_processors(model: Any, rebuilt: Any, source: dict[str, Tensor]) -> None:
    """Put the mixing matrices of an MHLA model, resized, in the place of those in its state dict.

    What weighs a window of another form is left out: it is a logarithm in one and a logit in the other.
    """
    old, new = _mhla_modules(model), _mhla_modules(rebuilt)
    for name in old.keys() & new.keys():
        before, after = old[name], new[name]
        if before.config.window != after.config.window:
            source.pop(f"{name}.local", None)
        if before.mixing is None or after.mixing is None:
            continue
        after.take_mixing(before)
        source[f"{name}.mixing"] = after.mixing.to(before.mixing.dtype)
        if after.local is not None and before.local is not None and f"{name}.local" in source:
            source[f"{name}.local"] = after.local.to(before.local.dtype)
        if after.blocks != before.blocks:
            logger.info("%s: mixing resized, blocks %s to %s", name, before.blocks, after.blocks)
