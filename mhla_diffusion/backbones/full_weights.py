"""Weights that were trained in full beside low-rank adapters, and are in use when these are."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.hooks.group_offloading import _get_top_level_group_offload_hook
from torch import Tensor, nn

# In files of LoRA before the names of weights that are trained in full: diffusers wants "lora" in each name.
FULL_WEIGHTS = "lora_full"


class FullWeights:
    """Weights that were trained in full beside adapters, and what was in their place, all on the CPU."""

    def __init__(self) -> None:
        self._of: dict[str, dict[str, Tensor]] = {}
        self._before: dict[str, Tensor] = {}
        self._in_use: dict[str, Tensor] | None = None

    def __contains__(self, adapter: str) -> bool:
        return adapter in self._of

    def __bool__(self) -> bool:
        return bool(self._of)

    def hold(self, adapter: str, weights: dict[str, Tensor]) -> None:
        """Keep those of an adapter in place of what it had, which may be none."""
        self._of.pop(adapter, None)
        if weights:
            self._of[adapter] = {n: weight.detach().to("cpu", copy=True) for n, weight in weights.items()}

    def keep(self, adapters: set[str]) -> None:
        """Forget all but those of these adapters."""
        self._of = {name: weights for name, weights in self._of.items() if name in adapters}

    @torch.no_grad()
    def switch(self, model: Any, adapters: list[str]) -> None:
        """Write those of the last of these adapters that has some, or what was there before.

        What is there now, which may have been trained since, is kept in its place.

        Raises:
            ValueError: when the model is offloaded so that they cannot be written.
        """
        wanted = next((self._of[name] for name in reversed(adapters) if name in self._of), None)
        if wanted is self._in_use:
            return
        require_no_disk(model)
        require_here(model)
        own, now = own_weights(model), self._in_use or {}
        names = {*(wanted or {}), *self._before}
        changed = {id(own[name]) for name in names}
        merged = [
            (layer, list(layer.merged_adapters))
            for layer in adapted(model)[0]
            if layer.merged and changed & {id(weight) for weight in layer.get_base_layer().parameters()}
        ]
        for layer, _ in merged:
            layer.unmerge()
        for name in names:
            its = now if name in now else self._before
            its[name] = own[name].detach().to("cpu", copy=True)
            own[name].copy_(wanted[name] if wanted and name in wanted else self._before[name])
        for layer, fused in merged:
            layer.merge(adapter_names=fused)
        self._in_use = wanted


def full_weights(model: Any) -> FullWeights:
    """Return those of a model, at first none."""
    return model.__dict__.setdefault("_full_weights", FullWeights())


def adapted(model: Any) -> tuple[list[Any], dict[str, Any]]:
    """Return layers with adapters, and by name the modules that peft keeps a copy of for an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    layers = [part for part in model.modules() if isinstance(part, BaseTunerLayer)]
    beside = {name: part for name, part in model.named_modules() if isinstance(part, ModulesToSaveWrapper)}
    return layers, beside


def require_no_disk(model: Any) -> None:
    """Check that a model is not offloaded to a disk.

    Raises:
        ValueError: when it is: what is written into its weights is not written there.
    """
    group = _get_top_level_group_offload_hook(model)
    if group is not None and group.config.offload_to_disk_path is not None:
        raise ValueError(
            f"weights of this model are offloaded into {group.config.offload_to_disk_path}, whose files are "
            "not written again: load adapters before enable_group_offload, or offload without "
            "offload_to_disk_path"
        )


def require_here(model: Any) -> None:
    """Check that a model has its weights, and not their shapes alone.

    Raises:
        ValueError: when layers bring them one after the other.
    """
    if any(weight.is_meta for weight in model.parameters()):
        raise ValueError(
            f"weights of this {type(model).__name__} are offloaded, and adapters would be lost: load and "
            "switch them before it is offloaded, or load them with load_lora_weights of a pipeline that "
            "offloads it"
        )


def own_weights(model: Any) -> dict[str, nn.Parameter]:
    """Return parameters of a model by the names that they have without adapters."""
    return {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): weight
        for name, weight in model.named_parameters()
        if ".lora_" not in name and ".modules_to_save." not in name
    }


def require_fitting(model: Any, weights: dict[str, Tensor], *, alone: bool) -> None:
    """Check that weights which were trained in full, if any, are all of this model's, beside adapters.

    Args:
        model: with or without adapters.
        weights: by the names of :func:`own_weights`.
        alone: whether no adapters come with them.

    Raises:
        ValueError: for others, or some of them.
    """
    own = own_weights(model)
    trained = {name for name in own if model.attention_name in name.split(".")}
    if weights and (alone or trained - weights.keys()):
        missing = "adapters" if alone else min(trained - weights.keys())
        raise ValueError(
            f"these weights were trained in full beside adapters, and are not all that were: there is no "
            f"{missing}; load the whole file of a run"
        )
    for name, weight in weights.items():
        if name not in own or own[name].shape != weight.shape:
            here = tuple(own[name].shape) if name in own else "no such weight"
            raise ValueError(
                f"these adapters were trained with {name} {tuple(weight.shape)}, and this model has "
                f"{here}: load them beside the model that they were trained from"
            )
