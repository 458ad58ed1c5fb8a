"""Our classes where libraries look for classes: pipelines in diffusers, models in transformers."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PIPELINES = ("MHLADiTPipeline", "MHLAWanPipeline")
_AUTO_CONFIGS = "transformers.models.auto.configuration_auto"
_AUTO_MODELS = "transformers.models.auto.modeling_auto"


def offer_classes() -> None:
    """Have diffusers know our pipelines, and the Auto classes of transformers our models.

    At once, or when they are imported; they are not imported for it.
    """
    register = _register_configs
    for name, tell in (("diffusers", _extend), (_AUTO_CONFIGS, register), (_AUTO_MODELS, register)):
        if name in sys.modules:
            tell(sys.modules[name])
        else:
            sys.meta_path.insert(0, _Watch(name, tell))


class _Watch:
    """Finder of modules that waits for one, and is gone then."""

    def __init__(self, name: str, tell: Callable[[ModuleType], None]) -> None:
        self.name, self.tell = name, tell

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_tell(module: ModuleType) -> None:
                load(module)
                self.tell(sys.modules[name])  # diffusers puts a lazy module in its own place

            spec.loader.exec_module = load_and_tell  # type: ignore[method-assign]
        return spec


def _register_configs(module: ModuleType) -> None:
    models = sys.modules.get(_AUTO_MODELS)
    if models is not None and not hasattr(models, "MODEL_MAPPING_NAMES"):
        return  # It imports the configs, and those of stock classes read it: their turn comes behind it.
    importlib.import_module(".domains.configs", __package__)


def _extend(module: ModuleType) -> None:
    """Give a module one more place to look for names: importing our pipelines takes seconds."""
    before = type(module)

    def look_up(self: ModuleType, name: str) -> Any:
        if name in PIPELINES:
            return getattr(importlib.import_module(__package__), name)
        return before.__getattr__(self, name)

    module.__class__ = type(before.__name__, (before,), {"__getattr__": look_up})
