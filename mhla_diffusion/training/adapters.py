"""Weights that are trained: all, those of self-attention, or these and low-rank adapters on the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline
from torch import nn

from ..backbones.full_weights import FULL_WEIGHTS
from ..optional import how_to_install


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021).

    Args:
        rank: of an adapter; 0 for none.
        alpha: adapters are scaled by alpha / rank; alpha is the rank by default.

    Raises:
        ValueError: for a rank below 0, an alpha that is not positive, or one without a rank.
    """

    rank: int = 0
    alpha: float | None = None

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"lora.rank must be 0 or more, got {self.rank}")
        if self.alpha is not None and not (self.rank and 0 < self.alpha < math.inf):
            raise ValueError(
                f"lora.alpha must be positive and needs a lora.rank, got {self.alpha} with rank {self.rank}"
            )


def require_trained(lora: LoraConfig, init_from: str | None) -> None:
    """Check that adapters are put beside weights that have learned something.

    Raises:
        ValueError: for a rank with a model from scratch, whose frozen weights would stay random.
    """
    if lora.rank and init_from is None:
        raise ValueError(
            f"lora.rank {lora.rank} trains adapters beside weights that stay as they are, and those of a new "
            "model are random: give the trained model as model.init_from, or leave lora out"
        )


def set_trainable(model: Any, trainable: str, lora: LoraConfig) -> None:
    """Freeze what is not trained, and add adapters.

    Args:
        model: a transformer, whose ``attention_name`` is what its layers call their self-attention.
        trainable: ``"all"`` or ``"attention"``. With a rank, self-attention is trained in full and every
            other linear layer through its adapter, whatever is said here.
        lora: see :class:`LoraConfig`. Layers of the model's ``uncalled`` modules have no adapters.

    Raises:
        ImportError: for adapters without the package peft.
    """
    if lora.rank:
        _add_adapters(model, lora)
    elif trainable == "all":
        return
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_in_self_attention(model, name) or (lora.rank > 0 and ".lora_" in name))


def merge_adapters(model: nn.Module) -> None:
    """Add every adapter to the weights that it stands beside, and take it away."""
    for name, layer in list(model.named_modules()):
        if hasattr(layer, "lora_A"):
            layer.merge()
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, layer.base_layer)


@torch.no_grad()
def save_adapters(model: Any, lora: LoraConfig, folder: Path) -> None:
    """Write the trained weights as ``load_lora_weights`` of diffusers reads them, before they are merged.

    Adapters stand under their usual names, and self-attention, trained in full with its mixing matrices, as
    the models' ``load_lora_adapter`` takes it.

    Args:
        model: with adapters.
        lora: its config.
        folder: to write pytorch_lora_weights.safetensors into.
    """
    weights, targets = {}, []
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            targets.append(name)
            for part in ("lora_A", "lora_B"):
                weights[f"{name}.{part}.weight"] = getattr(layer, part)["default"].weight.clone()
    for name, parameter in model.named_parameters():
        if _in_self_attention(model, name):
            weights[f"{FULL_WEIGHTS}.{name}"] = parameter.clone()
    metadata = {"r": lora.rank, "lora_alpha": lora.alpha or lora.rank, "target_modules": targets}
    WanPipeline.save_lora_weights(
        folder, transformer_lora_layers=weights, transformer_lora_adapter_metadata=metadata
    )


def _add_adapters(model: Any, lora: LoraConfig) -> None:
    try:
        import peft
    except ImportError as error:
        raise ImportError(f"lora.rank needs peft: {how_to_install('peft')}") from error
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and not _in_self_attention(model, name)
        and not set(model.uncalled) & set(name.split("."))
    ]
    alpha: Any = lora.alpha or lora.rank
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=targets), model
    )


def _in_self_attention(model: Any, name: str) -> bool:
    return model.attention_name in name.split(".")
