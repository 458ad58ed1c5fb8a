"""Low-rank adapters on any backbone, and beside them weights that were trained in full."""

from __future__ import annotations

import os
from typing import Any

import torch
from diffusers.loaders.lora_base import _fetch_state_dict
from diffusers.loaders.peft import PeftAdapterMixin
from torch import Tensor, nn

# In files of LoRA before the names of weights that are trained in full: diffusers wants "lora" in each name.
FULL_WEIGHTS = "lora_full"

# Arguments that say where the file of an adapter is.
_PLACE = (
    "weight_name", "use_safetensors", "local_files_only", "cache_dir", "force_download", "proxies", "token",
    "revision", "subfolder",
)  # fmt: skip


class AdapterMixin(PeftAdapterMixin):
    """Adapters as diffusers has them, also for backbones whose stock class has none."""

    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | dict[str, Tensor],
        prefix: str | None = "transformer",
        **kwargs: Any,
    ) -> None:
        """Load as diffusers does, also parts of MHLA (peft's ``modules_to_save``) and the ``lora/`` of a run.

        That holds self-attention, trained in full, beside the adapters. It takes the place of what is here,
        and stays when adapters are unloaded.

        Raises:
            ValueError: for weights that do not fit this model.
        """
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
        own = _fitting(self, full)
        # diffusers takes a file whose first weight is no adapter's for one of another format.
        ordered = dict(sorted(adapters.items(), key=lambda item: ".lora_" not in item[0]))
        super().load_lora_adapter(ordered, prefix=prefix, **kwargs)
        with torch.no_grad():
            for name, weight in full.items():
                own[name].copy_(weight)

    def unload_lora(self) -> None:
        """Unload adapters as diffusers does, and what was trained beside them (peft's ``modules_to_save``).

        Such modules are what they were before, or, where the adapters were fused, what they became.
        """
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils import ModulesToSaveWrapper

        parts = dict(self.named_modules())
        fused = any(isinstance(part, BaseTunerLayer) and part.merged for part in parts.values())
        for name, part in parts.items():
            if isinstance(part, ModulesToSaveWrapper):
                active = part.active_adapters if fused else []
                kept = part.modules_to_save[active[0]] if active else part.original_module
                parent, _, child = name.rpartition(".")
                setattr(parts[parent], child, kept)
        super().unload_lora()


def _fitting(model: Any, weights: dict[str, Tensor]) -> dict[str, nn.Parameter]:
    """Return the parameters of a model, which has those of ``weights``."""
    own = dict(model.named_parameters())
    for name, weight in weights.items():
        if name not in own or own[name].shape != weight.shape:
            here = tuple(own[name].shape) if name in own else "no such weight"
            raise ValueError(
                f"these adapters were trained with {name} {tuple(weight.shape)}, and this model has "
                f"{here}: load them beside the model that they were trained from"
            )
    return own
