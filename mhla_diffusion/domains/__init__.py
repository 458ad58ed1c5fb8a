"""Models of transformers with MHLA: vision transformers and causal language models.

They are to transformers what their stock classes are: its Auto classes, its Trainer and ``generate`` take
them as they are. Each is a stock class behind a base, of vision or language, made on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

# Family of transformers -> where its base is, and the stock classes that have an MHLA form.
FAMILIES = {
    "ViT": ("vision", ("Model", "ForImageClassification")),
    "DeiT": ("vision", ("Model", "ForImageClassification", "ForImageClassificationWithTeacher")),
    "Dinov2": ("vision", ("Model", "ForImageClassification")),
    "Llama": ("language", ("Model", "ForCausalLM")),
}
_ROOMS = {
    f"MHLA{family}{kind}": "configs" if kind == "Config" else room
    for family, (room, kinds) in FAMILIES.items()
    for kind in ("Config", *kinds)
}

__all__ = list(_ROOMS)


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_ROOMS[name]}", __name__), name)
