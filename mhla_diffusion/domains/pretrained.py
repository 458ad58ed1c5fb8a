"""What the models of transformers with MHLA have in common."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import conversion_mapping
from transformers.models.auto import modeling_auto

from ..attention import MHLA
from ..config import MHLAConfig, as_config, with_window
from . import FAMILIES, configs

# Stock class -> the same model with MHLA.
MODELS: dict[type[Any], type[Any]] = {}


class PretrainedMHLA:
    """Base of the models, before their stock class."""

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **settings: Any) -> Any:
        """Load a model, see ``transformers.PreTrainedModel.from_pretrained``.

        What the files of a stock model lack is at its start, as in a new model. An ``mhla_config`` that says
        nothing of a softmax window keeps that of the files.

        Raises:
            ValueError: for files with a part of an MHLA layer.
        """
        if (wanted := settings.get("mhla_config")) is not None and args:
            stored = cls.config_class.get_config_dict(args[0])[0].get("mhla_config")  # type: ignore[attr-defined]
            if stored is not None:
                settings["mhla_config"] = with_window(as_config(wanted), as_config(stored), wanted)
        model, info = super().from_pretrained(*args, output_loading_info=True, **settings)  # type: ignore[misc]
        absent = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
        for name, module in model.named_modules():
            own = {f"{name}.{key}" for key, _ in module.named_parameters()}
            if not isinstance(module, MHLA) or not own & absent:
                continue
            if own - absent:
                raise ValueError(
                    f"the files lack {', '.join(sorted(own & absent))} but hold "
                    f"{', '.join(sorted(own - absent))}: load with the mhla_config that they were saved with"
                )
            module.reset_parameters()
        return (model, info) if output_loading_info else model

    def save_pretrained(self, *args: Any, save_original_format: bool = False, **settings: Any) -> None:
        """Save a model, see ``transformers.PreTrainedModel.save_pretrained``.

        Weights keep the names that they have in the model, other than by default in transformers: its Trainer
        resumes by these, and leaves out without a word what it does not find.
        """
        super().save_pretrained(  # type: ignore[misc]
            *args, save_original_format=save_original_format, **settings
        )


def make_models(room: str, base: type[Any]) -> dict[str, type[Any]]:
    """Make the classes of a room, by name, and have the Auto classes know them."""
    made: dict[str, type[Any]] = {}
    for family, (where, kinds) in FAMILIES.items():
        if where != room:
            continue
        config, stored = (
            getattr(configs, f"MHLA{family}Config"),
            f"{family.lower()}.modeling_{family.lower()}",
        )
        for kind in kinds:
            stock = getattr(importlib.import_module(f"transformers.models.{stored}"), family + kind)
            values = {
                "config_class": config,
                "__module__": base.__module__,
                "__doc__": f"{family} with MHLA.",
            }
            MODELS[stock] = made[f"MHLA{family}{kind}"] = type(f"MHLA{family}{kind}", (base, stock), values)
            auto = getattr(
                modeling_auto, f"Auto{'Model' * (kind != 'Model')}{kind.removesuffix('WithTeacher')}"
            )
            # One class stands by itself: of several, new configs would have to name theirs.
            known, new = auto._model_mapping.get(config, None), MODELS[stock]
            auto.register(config, new if known is None else (known, new), exist_ok=True)
            # Files have other names of weights than models, by class.
            if names := conversion_mapping.get_checkpoint_conversion_mapping(stock.__name__):
                conversion_mapping.register_checkpoint_conversion_mapping(f"MHLA{family}{kind}", names, True)
    return made


@torch.no_grad()
def convert(model: Any, config: Any, *, attention: Any = "mhla") -> tuple[Any, dict[str, list[str]]]:
    """Build the MHLA form of a model of transformers, see :func:`mhla_diffusion.convert_to_mhla`."""
    for room, _ in FAMILIES.values():
        importlib.import_module(f".{room}", __package__)
    target = MODELS.get(type(model))
    if target is None or attention not in ("mhla", "linear"):
        known = ", ".join(stock.__name__ for stock in MODELS)
        raise ValueError(
            f"no MHLA form of {type(model).__name__} with attention {attention!r}; those that have one, with "
            f"attention mhla or linear: {known}"
        )
    if attention == "linear":
        config = as_config(config).linear()
    settings = {**model.config.to_dict(), "mhla_config": config}
    settings.pop("model_type")
    with init_empty_weights():
        converted = target(target.config_class(**settings), **_parts(model)).train(model.training)
    for module in converted.modules():
        if isinstance(module, MHLA):
            module.to_empty(device=model.device).reset_parameters()
            module.to(model.dtype)
    outcome = converted.load_state_dict(model.state_dict(), strict=False, assign=True)
    converted.to(model.device).tie_weights()  # tables are not in the state dict
    for name, parameter in model.named_parameters():
        converted.get_parameter(name).requires_grad_(parameter.requires_grad)
    if model.can_generate():
        converted.generation_config = copy.deepcopy(model.generation_config)
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        converted.gradient_checkpointing_enable()
    return converted, {"new": outcome.missing_keys, "dropped": outcome.unexpected_keys}


def _parts(model: Any) -> dict[str, bool]:
    """Return which parts a stock model has by arguments beside its config, as those arguments."""
    parts = {
        "add_pooling_layer": getattr(model, "pooler", None),
        "use_mask_token": getattr(getattr(model, "embeddings", None), "mask_token", None),
    }
    known = inspect.signature(type(model).__init__).parameters
    return {name: part is not None for name, part in parts.items() if name in known}


def settings_of(config: Any, **changes: Any) -> MHLAConfig:
    """Return the MHLA settings of a model's config, with changes, and have the config hold all of them.

    Raises:
        ValueError: for settings that cannot be, or layers that the model does not have.
    """
    settings = dataclasses.replace(as_config(config.mhla_config), **changes)
    if outside := [layer for layer in settings.layers or () if layer >= config.num_hidden_layers]:
        raise ValueError(
            f"mhla_config.layers names layer {outside[0]}, but the layers are 0 to "
            f"{config.num_hidden_layers - 1}"
        )
    config.mhla_config = settings.to_dict()
    return settings
