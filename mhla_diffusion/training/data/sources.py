"""Sources of data: one class each, and the flat config that a run chooses among them with.

To add a source, write one class: a dataclass derived from a kind of source (``ImageSource``, ``VideoSource``)
whose fields are its settings and whose ``open()`` gives what it holds. Its name in YAML, the keys that it
takes, the help of the command line and the errors follow from it.
"""

from __future__ import annotations

import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_type_hints

from docstring_parser import parse as parse_docstring

from ..config import changeable


class Source(ABC):
    """Place where data comes from, as a dataclass of its settings."""

    @abstractmethod
    def open(self) -> Any:
        """Return what the source holds, not yet read.

        Raises:
            ValueError: when it is not there, or not of the form that it should have.
        """

    def facts(self) -> dict[str, Any]:
        """Return what a model card says of the source, in the card's words."""
        background = getattr(self, "background", None)
        return {} if background is None else {"transparent pixels": f"on {background}"}

    @classmethod
    def by_name(cls) -> dict[str, type[Source]]:
        """Return every source of this kind under its name.

        That is the class's own in snake case, without the word of its kind: ``FolderImages``, an
        ``ImageSource``, is folder.
        """
        return {_name(source, cls.__name__.removesuffix("Source")): source for source in _concrete(cls)}


@dataclass(frozen=True)
class SourceConfig:
    """Choice of one source of a kind, and its settings.

    A subclass, ``class DataConfig(SourceConfig, kind=ImageSource)``, is a frozen dataclass with the field
    ``source`` and those of every source of its kind. A setting that a source must be given is None when it
    was not.

    Raises:
        ValueError: for a source that there is none of, a setting that it needs and was not given, or one that
            it does not take.
    """

    kind: ClassVar[type[Source]]
    source: str

    if TYPE_CHECKING:
        # The fields are not known before the sources are.
        def __init__(self, source: str, path: str | None = None, **settings: Any) -> None: ...

        def __getattr__(self, name: str) -> Any: ...

    def __init_subclass__(cls, *, kind: Any) -> None:
        cls.kind = kind
        settings = _settings(kind)
        cls.__annotations__ = {"source": Literal[tuple(kind.by_name())]}
        for name, (hint, setting) in settings.items():
            cls.__annotations__[name] = hint | None if _is_required(setting) else hint
            setattr(cls, name, _optional(setting))
        cls.__doc__ = f"{inspect.getdoc(cls)}\n\nArgs:\n" + "\n".join(_help(kind, settings))
        dataclass(frozen=True)(cls)

    def __post_init__(self) -> None:
        self.chosen()

    def chosen(self) -> Source:
        """Return the source with its own settings."""
        sources = self.kind.by_name()
        if self.source not in sources:
            raise ValueError(f"data.source must be {' or '.join(sources)}, got {self.source!r}")
        own = {setting.name: setting for setting in fields(sources[self.source])}  # type: ignore[arg-type]
        for setting in fields(self)[1:]:
            name, value = setting.name, getattr(self, setting.name)
            if name not in own and value != _default(setting):
                takers = " or ".join(_takers(self.kind, name))
                raise ValueError(f"data.{name} is for data.source {takers} alone; remove it")
            if name in own and value is None and _is_required(own[name]):
                raise ValueError(f"data.source {self.source} needs data.{name}, got None")
        return sources[self.source](**{name: getattr(self, name) for name in own})

    def open(self, **wanted: Any) -> Any:
        """Open the source; see :meth:`Source.open`, and the kind's own for what can be asked for."""
        return self.chosen().open(**wanted)

    @property
    def title(self) -> str:
        """Name of the data in a model card: its path, or the source itself."""
        return getattr(self, "path", None) or self.source


def _concrete(kind: type) -> Iterator[type]:
    subclasses: list[type] = kind.__subclasses__()
    for source in subclasses:
        if not inspect.isabstract(source):
            yield source
        yield from _concrete(source)


def _name(source: type, kind: str) -> str:
    words = re.sub(f"{kind}s?", "", source.__name__)
    return re.sub(r"(?<!^)(?=[A-Z])", "_", words).lower()


def _settings(kind: type[Source]) -> dict[str, tuple[Any, Field[Any]]]:
    """Collect type and field of each setting of all sources, the required ones first."""
    found: dict[str, tuple[Any, Field[Any]]] = {}
    for source in kind.by_name().values():
        hints = get_type_hints(source)
        for setting in fields(source):  # type: ignore[arg-type]
            hint, first = found.setdefault(setting.name, (hints[setting.name], setting))
            same = hint == hints[setting.name] and _default(first) == _default(setting)
            assert same, f"sources differ in the type or the default of {setting.name}"
    return dict(sorted(found.items(), key=lambda item: not _is_required(item[1][1])))


def _is_required(setting: Field[Any]) -> bool:
    return setting.default is MISSING and setting.default_factory is MISSING


def _default(setting: Field[Any]) -> Any:
    if setting.default_factory is not MISSING:
        return setting.default_factory()
    return None if setting.default is MISSING else setting.default


# Where data lie may change on the way: checkpoints know the fingerprint of the data themselves.
_PLACES = ("path", "captions")


def _optional(setting: Field[Any]) -> Any:
    if setting.default_factory is not MISSING:
        return field(default_factory=setting.default_factory)
    default = _default(setting)
    return changeable(default) if setting.name in _PLACES else field(default=default)


def _takers(kind: type[Source], setting: str) -> list[str]:
    """List the sources that take a setting."""
    return [name for name, source in kind.by_name().items() if setting in source.__dataclass_fields__]  # type: ignore[attr-defined]


def _help(kind: type[Source], settings: dict[str, tuple[Any, Field[Any]]]) -> Iterator[str]:
    """Lines of a docstring: what each source is, and what each setting means."""
    sources = kind.by_name()
    texts: dict[str, str] = {}
    for source in sources.values():
        for base in reversed(source.__mro__):
            parameters = parse_docstring(base.__doc__ or "").params
            texts.update({p.arg_name: " ".join((p.description or "").split()) for p in parameters})
    summaries = [
        f"{name} ({parse_docstring(source.__doc__ or '').short_description})"
        for name, source in sources.items()
    ]
    yield f"    source: {'; '.join(summaries)}"
    for name in settings:
        takers = _takers(kind, name)
        whose = "" if len(takers) == len(sources) else f" (of {', '.join(takers)})"
        yield f"    {name}: {texts.get(name, '')}{whose}"
