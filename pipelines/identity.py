"""What a pipeline is made of: its transformers, and hashes that tell one pipeline from another."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mhla_diffusion.files.sums import json_sha256

# Of a config: what changes from machine to machine and changes no output.
_INCIDENTAL = ("transformers_version", "torch_dtype", "dtype")

TRAINING = "training.json"
"""File beside pipelines of diffusers, which have no place for it in their config: how they were trained."""


def transformers_of(pipeline: Any) -> dict[str, nn.Module]:
    """Transformers of a pipeline by their names: ``transformer``, and ``transformer_2`` as Wan2.2 has.

    Either may be missing there: the other then takes all steps.
    """
    found = {name: getattr(pipeline, name, None) for name in ("transformer", "transformer_2")}
    return {name: model for name, model in found.items() if model is not None}


def training_of(pipeline: Any, folder: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Return the facts of a pipeline's training: its own, or those that lie beside it; empty without any.

    Args:
        pipeline: ours or one of diffusers.
        folder: that it lies in; by default the one that it was loaded from.
    """
    known = pipeline.config.get("training") or pipeline.config.get("_training")
    place = folder or pipeline.config.get("_name_or_path")
    beside = Path(place) / TRAINING if place else None
    stored = json.loads(beside.read_text("utf-8")) if beside is not None and beside.is_file() else {}
    return dict(known or stored)


def mark_converted(pipeline: Any, source: str) -> None:
    """Have a pipeline of ours say that what it holds of a training was that of what it was converted from.

    Args:
        pipeline: whose transformer was converted; one of diffusers holds nothing of a training.
        source: folder or hub id of that.
    """
    if facts := dict(pipeline.config.get("training") or {}):
        for key in ("trained", "base model"):
            facts.pop(key, None)
        pipeline.register_to_config(training={**facts, "converted from": source})


def describe(pipeline: Any) -> dict[str, Any]:
    """Return what a pipeline's samples depend on besides the arguments of its call, as JSON values.

    ``config_sha256``, ``weights_sha256`` and ``dtype`` are those of its first transformer; ``components`` has
    a hash for each other model, tokenizer and processor; ``scheduler`` and ``pipeline`` hold settings.
    ``model``, ``training`` and ``versions`` are for the reader.

    Raises:
        ValueError: when weights are not in memory.
    """
    name, transformer = next(iter(transformers_of(pipeline).items()))
    components = {key: part for key, part in pipeline.components.items() if part is not None}
    settings = {key: value for key, value in pipeline.config.items() if not key.startswith("_")}
    for key in (*pipeline.components, "training", "id2label"):  # rows of a manifest hold ids beside names
        settings.pop(key, None)
    return {
        "model": str(pipeline.config.get("_name_or_path") or ""),
        "config_sha256": json_sha256(_config(transformer)),
        "weights_sha256": weights_sha256(transformer),
        "dtype": str(transformer.dtype).removeprefix("torch."),
        "components": {
            key: component_sha256(part)
            for key, part in sorted(components.items())
            if key not in (name, "scheduler")
        },
        "scheduler": {"class": type(pipeline.scheduler).__name__, **pipeline.scheduler.config},
        "pipeline": {"class": type(pipeline).__name__, **settings},
        "training": training_of(pipeline) or None,
        "versions": {name: version(name) for name in ("mhla-diffusion", "torch", "diffusers", "accelerate")},
    }


def component_sha256(component: Any) -> str:
    """Hash of a model (its config and weights), a tokenizer (its vocabulary and rules) or a processor."""
    if hasattr(component, "get_vocab"):
        return json_sha256(_tokenizer(component))
    values = {"class": type(component).__name__, "config": _config(component)}
    if isinstance(component, nn.Module):
        values["weights"] = weights_sha256(component)
    return json_sha256(values)


def weights_sha256(model: nn.Module) -> str:
    """Hash of the names and bytes of all weights, and of which adapters act, how strongly.

    Weights of any dtype count as they lie in memory, fp8 as well. Those that are a tensor made of tensors, as
    quantisation leaves them (values and their scales), count as the bytes of each of these, so that the same
    numbers quantised otherwise are other weights.

    Raises:
        ValueError: when weights are not in memory.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        _update(digest, value, name)
    for name, layer in model.named_modules():
        if hasattr(layer, "merged_adapters"):  # a layer of peft
            names = list(layer.active_adapters), list(layer.merged_adapters)
            scaling = sorted(getattr(layer, "scaling", {}).items())
            digest.update(repr((name, layer.disable_adapters, *names, scaling)).encode())
    return digest.hexdigest()


def _update(digest: Any, value: Any, name: str) -> None:
    if not isinstance(value, Tensor):  # what a module keeps as its extra state
        digest.update(repr(value).encode())
    elif hasattr(value, "__tensor_flatten__"):
        digest.update(type(value).__name__.encode())
        for part in value.__tensor_flatten__()[0]:
            digest.update(part.encode())
            _update(digest, getattr(value, part), f"{name}.{part}")
    elif value.is_meta:
        raise ValueError(
            f"{name} is not in memory (device meta), as offloading leaves weights: generate into a folder "
            "with a pipeline that is not offloaded to disk or by layers"
        )
    else:
        plain = value.detach().as_subclass(Tensor).cpu().contiguous().flatten()
        digest.update(plain.view(torch.uint8).numpy())


def _tokenizer(tokenizer: Any) -> dict[str, Any]:
    """What decides how a text becomes numbers."""
    values = {"vocab": tokenizer.get_vocab(), "special": tokenizer.special_tokens_map}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        # These two are left there by the last call.
        values["rules"] = {key: rules[key] for key in rules if key not in ("truncation", "padding")}
    return values


def _config(component: Any) -> dict[str, Any]:
    """Settings of a model or processor, of diffusers or of transformers."""
    config = getattr(component, "config", component)
    values = config if isinstance(config, Mapping) else config.to_dict()
    return {
        key: value.to_dict() if hasattr(value, "to_dict") else value  # as a quantization_config is or is not
        for key, value in values.items()
        if not key.startswith("_") and key not in _INCIDENTAL
    }
