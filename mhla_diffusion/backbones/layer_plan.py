"""Which attention each layer of a model has: what may be asked for, and what that is by layer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from ..config import MHLAConfig, OneConfig, as_config, with_window
from ..ops import recommended_layout
from .grid import Grid

ATTENTIONS = ("mhla", "linear", "softmax")

# In a softmax window, which then takes several times as long as all else of the operator.
_MANY_KEYS = 1024

AttentionChoice = str | Sequence[str]
ConfigChoice = OneConfig | Sequence[OneConfig]


@dataclass(frozen=True)
class LayerPlan:
    """Attention of each layer of a model, known to fit before any weight is made.

    Args:
        attention: as it was asked for.
        kinds: ``"mhla"``, ``"linear"`` or ``"softmax"``, by layer.
        configs: by layer; those of layers with stock attention do not count.
        shared: whether one config was given for all.
        grid: tokens along each axis that the model is made for.
    """

    attention: AttentionChoice
    kinds: list[str]
    configs: list[MHLAConfig]
    grid: Grid
    shared: bool = True

    @property
    def registered(self) -> dict[str, Any] | list[dict[str, Any]]:
        """Config, or those of the layers, as plain values."""
        return self.configs[0].to_dict() if self.shared else [config.to_dict() for config in self.configs]


def as_configs(mhla_config: ConfigChoice) -> list[MHLAConfig]:
    """Return the one config, or those of the layers, of what a model's argument may be."""
    choices: Any = mhla_config if isinstance(mhla_config, (list, tuple)) else [mhla_config]
    return [as_config(choice) for choice in choices]


def with_window_of(stored: Mapping[str, Any], wanted: ConfigChoice) -> ConfigChoice:
    """Return configs that keep the softmax window of a model with MHLA where they say nothing of one.

    Args:
        stored: config of that model.
        wanted: what its layers are to have; ``local="auto"`` and dicts without ``local`` say nothing.
    """
    kinds, before = stored.get("attention", "mhla"), stored.get("mhla_config")
    if before is None or "mhla" not in ([kinds] if isinstance(kinds, str) else kinds):
        return wanted
    old = as_configs(before)
    if isinstance(wanted, (list, tuple)):
        old = old * len(wanted) if len(old) == 1 else old
        if len(old) != len(wanted):
            return wanted  # which is refused where layers are planned
        return [with_window(as_config(choice), one, choice) for one, choice in zip(old, wanted, strict=True)]
    config = as_config(cast(OneConfig, wanted))
    each = [with_window(config, one, wanted) for one in old]
    if all(one == each[0] for one in each):
        return each[0]
    return each if config.layers is None else wanted


def layer_settings(
    attention: AttentionChoice, mhla_config: ConfigChoice, num_layers: int, *, stock: str = "softmax"
) -> tuple[list[str], list[MHLAConfig]]:
    """Return attention and config of each layer; see :func:`layer_attention`.

    Raises:
        ValueError: for a list of configs of the wrong length, or in which one names layers; and what
            :func:`layer_attention` refuses.
    """
    configs = as_configs(mhla_config)
    if not isinstance(mhla_config, (list, tuple)):
        return layer_attention(attention, configs[0].layers, num_layers, stock=stock), configs * num_layers
    if len(configs) != num_layers or any(config.layers is not None for config in configs):
        raise ValueError(
            f"mhla_config is a list of {len(configs)} configs, but the model has {num_layers} layers: give "
            "one for each, without layers, and name their attention as a list"
        )
    return layer_attention(attention, None, num_layers, stock=stock), configs


def attentions_of(stock: str) -> tuple[str, ...]:
    """Return what the attention of a layer can be where the stock class has ``stock``."""
    return ATTENTIONS if stock == "softmax" else ("mhla", stock)


def layer_attention(
    attention: AttentionChoice, layers: tuple[int, ...] | None, num_layers: int, *, stock: str = "softmax"
) -> list[str]:
    """Return the attention of each layer: ``attention``, and ``stock`` where ``layers`` does not name it.

    Raises:
        ValueError: for an unknown attention, a list of the wrong length, a layer that does not exist, or a
            list together with ``layers``.
    """
    known = attentions_of(stock)
    if not isinstance(attention, (str, list, tuple)):
        raise ValueError(
            f"attention must be one of {', '.join(known)}, or a list of them by layer, got {attention!r}"
        )
    kinds = [attention] * num_layers if isinstance(attention, str) else list(attention)
    if unknown := sorted({kind for kind in kinds if kind not in known}, key=repr):
        raise ValueError(f"attention must be one of {', '.join(known)}, got {', '.join(map(repr, unknown))}")
    if len(kinds) != num_layers:
        raise ValueError(f"attention names {len(kinds)} layers, but the model has {num_layers}")
    if layers is None:
        return kinds
    if not isinstance(attention, str):
        raise ValueError("give attention as a list or mhla_config.layers, not both")
    if outside := [i for i in layers if i >= num_layers]:
        raise ValueError(
            f"mhla_config.layers names layer {outside[0]}, but the layers are 0 to {num_layers - 1}"
        )
    return [kind if i in layers else stock for i, kind in enumerate(kinds)]


def check_blocks(config: MHLAConfig, grid: tuple[int, ...]) -> None:
    """Warn of blocks whose mixing, or whose softmax windows, cost more than they should."""
    layout = config.layout(grid)
    if layout.num_blocks**2 > layout.num_tokens:
        warnings.warn(
            f"{layout.num_blocks} blocks on {layout.num_tokens} tokens: mixing costs M^2 = "
            f"{layout.num_blocks**2} > N and is over a third of the attention's work; blocks="
            f"{recommended_layout(grid).blocks} keeps it at 20 % or less on the grid {grid}",
            stacklevel=6,
        )
    if config.window is None or layout.num_blocks == 1:  # one block is softmax over all, and asked for
        return
    recommended = recommended_layout(grid)
    keys, fewer = layout.reach_size(config.margin), recommended.reach_size(config.margin)
    if keys > max(_MANY_KEYS, 2 * fewer):
        warnings.warn(
            f"{layout.num_blocks} blocks on {layout.num_tokens} tokens: softmax windows of {keys} tokens, "
            f"whose cost is no longer linear in all tokens; blocks={recommended.blocks} makes them {fewer} "
            f"on the grid {grid}, and local=None leaves them out",
            stacklevel=6,
        )
