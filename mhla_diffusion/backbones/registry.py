"""Which models of diffusers have an MHLA form. Everything that goes over backbones asks here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..hub import component_subfolder, load_config

# Stock class -> the same model with MHLA; a backbone enters itself when its class is made.
BACKBONES: dict[type[Any], type[Any]] = {}


def backbone_of(model: Any) -> type[Any] | None:
    """Return our class for a model, stock or ours; None where there is none."""
    return next((ours for stock, ours in BACKBONES.items() if isinstance(model, stock)), None)


def backbone_named(name: str | None) -> type[Any] | None:
    """Return our class by its own name or that of its stock class; None where there is none."""
    known = {cls.__name__: ours for stock, ours in BACKBONES.items() for cls in (stock, ours)}
    return known.get(name or "")


def backbone_of_config(config: Mapping[str, Any]) -> type[Any] | None:
    """Return our class for a stored config, of today or of the time when all were Transformer2DModel."""
    name = config.get("_class_name")
    if name == "Transformer2DModel":
        name = next(
            (ours.__name__ for ours in BACKBONES.values() if ours.old_norm_type == config.get("norm_type")),
            None,
        )
    return backbone_named(name)


def load_transformer(
    path: str, *, component: str = "transformer", subfolder: str | None = None, **place: Any
) -> Any:
    """Load a stored transformer that has an MHLA form, stock or ours, in the class that it is stored as.

    Args:
        path: folder or hub id of the transformer, or of a pipeline.
        component: of the pipeline: Wan2.2 has ``transformer`` and ``transformer_2``.
        subfolder: where it lies in ``path``; that of the component by default.
        place: revision, ... as for ``from_pretrained``.

    Raises:
        ValueError: when it holds another model.
    """
    subfolder = subfolder or component_subfolder(path, component, **place)
    stored = load_config(path, subfolder=subfolder, **place)
    ours = backbone_of_config(stored)
    if ours is None and "model_type" in stored:
        raise ValueError(
            f"{path} holds a {stored['model_type']} of transformers, where a model of diffusers is wanted: "
            "in Python convert_to_mhla(model) takes those that have an MHLA form"
        )
    if ours is None:
        raise ValueError(
            f"{path} holds a {stored.get('_class_name', 'config of no class')}, which has no MHLA form; "
            f"those that have one: {stock_names()}"
        )
    loader = ours if stored["_class_name"] == ours.__name__ else ours.stock
    return loader.from_pretrained(path, subfolder=subfolder, **place)


def stock_names() -> str:
    """List the models that have an MHLA form, for messages."""
    return ", ".join(stock.__name__ for stock in BACKBONES)
