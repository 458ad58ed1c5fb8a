"""Configs of the models: those of the stock classes, and ``mhla_config`` (of Llama also ``block_size``)."""

from __future__ import annotations

import importlib
from typing import Any

from . import FAMILIES


class ConfigWithMHLA:
    """Base of the configs, before their stock class.

    Args:
        mhla_config: a :class:`mhla_diffusion.MHLAConfig` or its dict; ``layers`` says which layers have MHLA.
            What it leaves out is put in by the model, so that a stored config holds all of it.
        block_size: of a language model, tokens in a block.
    """

    room: str

    def __post_init__(self, mhla_config: Any = None, block_size: int = 64, **settings: Any) -> None:
        self.mhla_config = mhla_config
        if self.room == "language":
            self.block_size = block_size
        super().__post_init__(**settings)  # type: ignore[misc]
        # A config in hand means that a model is wanted: only now its classes are imported, which takes
        # seconds, and enter the Auto classes.
        importlib.import_module(f".{self.room}", __package__)

    def __setattr__(self, name: str, value: Any) -> None:
        # As JSON has it, whoever sets it.
        super().__setattr__(
            name, value.to_dict() if name == "mhla_config" and hasattr(value, "to_dict") else value
        )


for _family, (_room, _) in FAMILIES.items():
    _type = _family.lower()
    _stock = getattr(
        importlib.import_module(f"transformers.models.{_type}.configuration_{_type}"), f"{_family}Config"
    )
    _values = {
        "model_type": f"mhla_{_type}",
        "room": _room,
        "__module__": __name__,
        "__doc__": ConfigWithMHLA.__doc__,
    }
    globals()[f"MHLA{_family}Config"] = type(f"MHLA{_family}Config", (ConfigWithMHLA, _stock), _values)
