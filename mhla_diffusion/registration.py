"""Our classes where libraries look for classes: pipelines in diffusers, models in transformers."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_AUTO = "transformers.models.auto.configuration_auto"


def offer_classes() -> None:
    """Have diffusers know our pipelines and models, and the Auto classes of transformers our models.

    At once, or when they are imported; they are not imported for it.
    """
    for name, tell in (("diffusers", _extend), (_AUTO, _register_configs)):
        if (module := sys.modules.get(name)) is not None:
            tell(module)
        elif name not in sys.modules:  # None there says that it is not to be imported
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
    """Name our configs and their module: imported now they would lead back into what is being imported."""
    domains, mapping = importlib.import_module(".domains", __package__), module.CONFIG_MAPPING
    names = {f"mhla_{family.lower()}": f"MHLA{family}Config" for family in domains.FAMILIES}
    mapping._mapping = {**mapping._mapping, **names}
    mapping._modules.update(dict.fromkeys(names, domains))


def _extend(module: ModuleType) -> None:
    """Give diffusers one more place to look for names: importing our classes takes seconds."""
    before = type(module)

    def look_up(self: ModuleType, name: str) -> Any:
        ours = importlib.import_module(__package__)
        if name.startswith("MHLA") and hasattr(ours, name):
            return getattr(ours, name)
        return before.__getattr__(self, name)

    module.__class__ = type(before.__name__, (before,), {"__getattr__": look_up})
