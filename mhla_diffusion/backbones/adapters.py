"""Low-rank adapters on any backbone, which take along what was trained in full beside them."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterable
from typing import Any

from diffusers.loaders.lora_base import _fetch_state_dict
from diffusers.loaders.peft import PeftAdapterMixin
from torch import Tensor, nn

from .full_weights import (
    FULL_WEIGHTS,
    adapted,
    full_weights,
    require_fitting,
    require_here,
    require_no_disk,
)

# Arguments that say where the file of an adapter is.
_PLACE = (
    "weight_name", "use_safetensors", "local_files_only", "cache_dir", "force_download", "proxies", "token",
    "revision", "subfolder",
)  # fmt: skip


def _followed(name: str) -> Callable[..., None]:
    """Make a method of diffusers that takes along what stands beside adapters, which it leaves as it is."""
    stock = getattr(PeftAdapterMixin, name)

    @functools.wraps(stock)
    def method(self: Any, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(stock).bind(self, *args, **kwargs).arguments
        _require_followed(self, name, given.get("adapter_names"))
        stock(self, *args, **kwargs)
        _follow_adapters(self)

    return method


class AdapterMixin(PeftAdapterMixin):
    """Adapters as diffusers has them, also for backbones whose stock class has none.

    What was trained in full beside an adapter, self-attention by a run of this package or modules by peft
    (``modules_to_save``), is switched with it: the last of those that are active decides, and without one it
    is what it was before. Their strength does not change it unless that is 0, and that of one call not then.

    As pipelines of diffusers take fused adapters out layer by layer, without a word to the model, what would
    differ then is refused with a ValueError: to fuse others than the active ones, to choose or delete some
    while some are fused. So is all that a model which is offloaded to a disk or by layers cannot follow.
    """

    set_adapter = _followed("set_adapter")
    set_adapters = _followed("set_adapters")
    enable_adapters = _followed("enable_adapters")
    disable_adapters = _followed("disable_adapters")
    enable_lora = _followed("enable_lora")
    disable_lora = _followed("disable_lora")
    delete_adapters = _followed("delete_adapters")
    fuse_lora = _followed("fuse_lora")
    unfuse_lora = _followed("unfuse_lora")

    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | dict[str, Tensor],
        prefix: str | None = "transformer",
        **kwargs: Any,
    ) -> None:
        """Load as diffusers does, also parts of MHLA (peft's ``modules_to_save``) and the ``lora/`` of a run.

        That holds self-attention, trained in full, beside the adapters. It takes the place of what is here
        while they are active; what was here is kept on the CPU.

        Raises:
            ValueError: for weights that do not fit this model, or are not all that a run has trained, and for
                one that is offloaded so that its own weights cannot be written.
        """
        require_no_disk(self)
        weights = pretrained_model_name_or_path_or_dict
        if not isinstance(weights, dict):
            place = {name: kwargs.pop(name, None) for name in _PLACE}
            # As pipelines of diffusers look for it.
            place["use_safetensors"] = place["use_safetensors"] is not False
            weights, metadata = _fetch_state_dict(
                weights, user_agent={}, allow_pickle=False, metadata=kwargs.pop("metadata", None), **place
            )
            kwargs["metadata"] = metadata
        start = f"{prefix}.{FULL_WEIGHTS}." if prefix else f"{FULL_WEIGHTS}."
        full = {key.removeprefix(start): value for key, value in weights.items() if key.startswith(start)}
        adapters = {key: value for key, value in weights.items() if not key.startswith(start)}
        # diffusers takes a file whose first weight is no adapter's for one of another format.
        ordered = dict(sorted(adapters.items(), key=lambda item: ".lora_" not in item[0]))
        # As diffusers does, and around all of this: offloading that is put back makes new parameters.
        pipeline: Any = kwargs.get("_pipeline")
        by_model, sequential, _ = self._optionally_disable_offloading(pipeline)
        try:
            require_here(self)
            beside = any(prefix is None or key.startswith(f"{prefix}.") for key in adapters)
            require_fitting(self, full, alone=not beside)
            known = set(getattr(self, "peft_config", {}))
            super().load_lora_adapter(ordered, prefix=prefix, **kwargs)
            if beside:
                new = set(self.peft_config) - known or {kwargs["adapter_name"]}  # or one that is hot-swapped
                full_weights(self).hold(new.pop(), full)
            _follow_adapters(self)
        finally:
            if by_model:
                pipeline.enable_model_cpu_offload()
            elif sequential:
                pipeline.enable_sequential_cpu_offload()

    def save_lora_adapter(
        self, save_directory: str | os.PathLike[str], adapter_name: str = "default", **kwargs: Any
    ) -> None:
        """Save as diffusers does, arguments as there.

        Raises:
            ValueError: for an adapter with self-attention trained in full, for which its file has no place.
        """
        if adapter_name in full_weights(self):
            raise ValueError(
                f"self-attention was trained in full beside {adapter_name}, and the file would lack it: keep "
                "the file that it was loaded from, or fuse_lora, unload_lora and save the model"
            )
        super().save_lora_adapter(save_directory, adapter_name, **kwargs)

    def unload_lora(self) -> None:
        """Unload adapters as diffusers does, and what was trained in full beside them.

        That is what it was before, or, where the adapters were fused, what it became.
        """
        layers, beside = adapted(self)
        fused = _in_use(layer for layer in layers if layer.merged)
        full_weights(self).switch(self, fused)
        self.__dict__.pop("_full_weights", None)
        for name, part in beside.items():
            kept = [part.modules_to_save[its] for its in fused if its in part.modules_to_save]
            _unwrap(self, name, kept[-1] if kept else part.original_module)
        super().unload_lora()


def _follow_adapters(model: Any) -> None:
    """Have what was trained beside adapters be in use where they are, and away where they are."""
    layers, beside = adapted(model)
    there = {name for layer in layers for name in layer._all_available_adapter_names()}
    in_use = _in_use(layers)
    full_weights(model).switch(model, in_use)
    full_weights(model).keep(there)
    for place, part in beside.items():
        part.set_adapter([])  # a deleted one could not be left
        for name in set(part.modules_to_save) - there:
            del part.modules_to_save[name]
        if not part.modules_to_save:
            _unwrap(model, place, part.original_module)
            continue
        part.modules_to_save.requires_grad_(False)
        chosen = [name for name in in_use if name in part.modules_to_save][-1:]
        part.enable_adapters(bool(chosen))
        part.set_adapter(chosen)


def _in_use(layers: Iterable[Any]) -> list[str]:
    """Adapters that act, of strength other than 0: those that are fused, or else active."""
    names = (
        name
        for layer in layers
        if not layer.disable_adapters
        for name in (layer.merged_adapters or layer.active_adapters)
        if not hasattr(layer, "scaling") or layer.scaling.get(name)
    )
    return list(dict.fromkeys(names))


def _unwrap(model: Any, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _require_followed(model: Any, method: str, names: str | list[str] | None) -> None:
    """Check that what was trained beside adapters can follow what a method does to them."""
    layers, beside = adapted(model)
    full = full_weights(model)
    if full:
        require_no_disk(model)
        require_here(model)
    if not (full or beside):
        return
    what = f"{method}: of what was trained in full beside adapters"
    active = {name for layer in layers for name in layer.active_adapters}
    if method == "fuse_lora" and names is not None and set(names) != active:
        raise ValueError(
            f"{what} that of {', '.join(sorted(active)) or 'none'} is in use: set_adapters({names!r}) first, "
            "and fuse what is active"
        )
    if method in ("set_adapter", "set_adapters", "delete_adapters") and any(layer.merged for layer in layers):
        raise ValueError(f"{what} that of adapters which are fused is in use: unfuse_lora first")
