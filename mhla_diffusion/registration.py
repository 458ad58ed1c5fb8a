"""Our pipelines under their names in diffusers, whose from_pretrained looks for classes nowhere else."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PIPELINES = ("MHLADiTPipeline", "MHLAWanPipeline")


def offer_pipelines() -> None:
    """Have ``diffusers`` know our pipelines, at once or when it is imported; it is not imported for it."""
    module = sys.modules.get("diffusers")
    if module is None:
        sys.meta_path.insert(0, _Watch())
    else:
        _extend(module)


class _Watch:
    """Finder of modules that waits for diffusers, and is gone then."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "diffusers":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_extend(module: ModuleType) -> None:
                load(module)
                _extend(sys.modules[name])  # diffusers puts a lazy module in its own place

            spec.loader.exec_module = load_and_extend  # type: ignore[method-assign]
        return spec


def _extend(module: ModuleType) -> None:
    """Give a module one more place to look for names: importing our pipelines takes seconds."""
    before = type(module)

    def look_up(self: ModuleType, name: str) -> Any:
        if name in PIPELINES:
            return getattr(importlib.import_module(__package__), name)
        return before.__getattr__(self, name)

    module.__class__ = type(before.__name__, (before,), {"__getattr__": look_up})
