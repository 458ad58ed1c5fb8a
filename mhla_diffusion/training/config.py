"""Run configurations: dataclasses, read from YAML with overrides from the command line.

Each section's dataclass stands beside the code that reads it; here is what they share.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import logging
import os
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentError

from ..files.text import changes, flat_dict
from ..files.writing import write_file
from ..help import HelpParser, plain_message, with_home

_CHANGEABLE = "changeable"

ConfigT = TypeVar("ConfigT")


def changeable(default: Any = dataclasses.MISSING, **kwargs: Any) -> Any:
    """Return a dataclass field that a resumed run may change, because no step already taken depends on it."""
    return dataclasses.field(default=default, metadata={_CHANGEABLE: True}, **kwargs)


def parse_config(
    config_class: type[ConfigT],
    arguments: Sequence[str] | None = None,
    *,
    description: str = "",
    prog: str | None = None,
    resumable: bool = True,
) -> tuple[ConfigT, str | None]:
    """Read ``--config FILE [--key.of.it value ...] [--resume latest|auto|PATH]``.

    Args:
        config_class: a dataclass; its fields may be dataclasses.
        arguments: of the command line; the process's own by default.
        description: for ``--help``.
        prog: what stands before the arguments, for ``--help``; the name of the script by default.
        resumable: whether there is a ``--resume``; what goes on by itself has none.

    Returns:
        The config, and what to resume from.

    Raises:
        ValueError: naming the key and what is allowed.
        OSError: when a file cannot be read.
    """
    parser = HelpParser(prog=prog, description=description, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file of the run")
    if resumable:
        parser.add_argument(
            "--resume",
            type=str,
            help="checkpoint to go on from: 'latest', 'auto' (that, or a new run), or its name or folder",
        )
    parser.add_class_arguments(config_class)
    arguments = [with_home(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    try:
        _refuse_unknown_keys(config_class, arguments, resumable=resumable)
        values = parser.instantiate(parser.parse_args(arguments))
        names = [field.name for field in dataclasses.fields(config_class)]  # type: ignore[arg-type]
        return config_class(**{name: values[name] for name in names}), values.get("resume")
    except (ArgumentError, ValueError, TypeError) as error:
        raise ValueError(plain_message(str(error))) from error


def run_script(
    config_class: type[ConfigT],
    train: Callable[..., int],
    arguments: Sequence[str] | None = None,
    *,
    description: str = "",
    prog: str | None = None,
) -> int:
    """Read the config, train, and return the exit code.

    Args:
        config_class: of the run.
        train: called with the config and ``resume=``; returns the number of the signal that stopped it, or 0.
        arguments: of the command line; the process's own by default.
        description: for ``--help``.
        prog: what stands before the arguments, for ``--help``; the name of the script by default.

    Returns:
        0, or 128 and the number of the signal.

    Raises:
        ValueError: for a config that :func:`parse_config` refuses; and what ``train`` raises.
        OSError: when its file cannot be read.
    """
    logging.basicConfig(
        # One voice: the other processes speak up for warnings alone.
        level=logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING,
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
    )
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    config, resume = parse_config(config_class, arguments, description=description, prog=prog)
    stopped_by = train(config, resume=resume)
    return 128 + stopped_by if stopped_by else 0


def as_dict(config: Any) -> dict[str, Any]:
    """Return a config as plain values, as they stand in YAML and JSON."""
    return {name: _plain(getattr(config, name)) for name in (f.name for f in dataclasses.fields(config))}


def write_config(config: Any, path: Path) -> None:
    """Write a config as the YAML file that gives it again."""
    write_file(path, yaml.safe_dump(as_dict(config), sort_keys=False))


def require_shape_or_init_from(config: Any, optional: Sequence[str]) -> None:
    """Check that a model's config has either ``init_from`` or every field of a shape but the optional ones.

    Raises:
        ValueError: otherwise, naming the fields.
    """
    shape = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name != "init_from"}
    given = [name for name, value in shape.items() if value is not None]
    missing = [name for name in shape if name not in (*given, *optional)]
    if config.init_from is not None and given:
        raise ValueError(
            f"model.init_from brings its own shape; remove model.{', model.'.join(given)}, or init_from"
        )
    if config.init_from is None and missing:
        raise ValueError(f"a new model needs model.{', model.'.join(missing)}; or give model.init_from")


def forbidden_changes(saved: Mapping[str, Any], config: Any) -> list[str]:
    """List where a config differs from a saved one in a field that is not :func:`changeable`.

    Args:
        saved: what :func:`as_dict` gave. Fields that it lacks had their defaults.
        config: a dataclass.

    Returns:
        One line per key, ``key: old -> new``.
    """
    return changes(with_later_fields(saved, config), as_dict(config), free=_changeable_keys(config))


def decisive_settings(config: Any) -> dict[str, Any]:
    """Return what the steps of a run depend on, by dotted keys: all that is not :func:`changeable`."""
    free = _changeable_keys(config)
    flat = flat_dict(as_dict(config)).items()
    return {key: value for key, value in flat if key not in free and value is not None}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return as_dict(value)
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def with_later_fields(saved: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """Return a config that :func:`as_dict` gave, with the defaults of the fields that came later."""
    filled = dict(saved)
    for field in dataclasses.fields(config):
        old, value = saved.get(field.name), getattr(config, field.name)
        if dataclasses.is_dataclass(value) and isinstance(old, Mapping):
            filled[field.name] = with_later_fields(old, value)
        elif field.name not in saved and field.default is not dataclasses.MISSING:
            filled[field.name] = _plain(field.default)
        elif field.name not in saved and field.default_factory is not dataclasses.MISSING:
            filled[field.name] = _plain(field.default_factory())
    return filled


def _changeable_keys(config: Any, prefix: str = "") -> set[str]:
    keys: set[str] = set()
    for field in dataclasses.fields(config):
        value, key = getattr(config, field.name), f"{prefix}{field.name}"
        if field.metadata.get(_CHANGEABLE):
            keys.update(flat_dict({key: _plain(value)}))
        elif dataclasses.is_dataclass(value):
            keys.update(_changeable_keys(value, f"{key}."))
    return keys


def _refuse_unknown_keys(config_class: type, arguments: Sequence[str] | None, *, resumable: bool) -> None:
    """jsonargparse refuses unknown keys too, but does not name the known ones."""
    allowed = [*_dotted_keys(config_class), *(["resume"] if resumable else []), "help", "print_config"]
    if not resumable and "resume" in _given_keys(arguments):
        raise ValueError("what was interrupted goes on by itself: leave --resume out")
    free = tuple(f"{name}." for name in _mappings(config_class))
    for key in _given_keys(arguments):
        if key in allowed or any(name.startswith(f"{key}.") for name in allowed) or key.startswith(free):
            continue
        section = key.rpartition(".")[0]
        known = [name for name in allowed if name.rpartition(".")[0] == section]
        close = difflib.get_close_matches(key, allowed, n=1)
        hint = f", did you mean {close[0]}?" if close else "."
        there = f"Known there: {', '.join(known)}" if known else "--help lists all of them"
        raise ValueError(f"unknown key {key}{hint} {there}")


def _given_keys(arguments: Sequence[str] | None) -> list[str]:
    """Return the dotted keys on the command line and in its YAML files."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", type=Path, action="append", default=[])
    known, rest = parser.parse_known_args(arguments)
    options = (token[2:].split("=", 1)[0] for token in rest if token.startswith("--"))
    keys = [option for option in options if not option.endswith(".help")]
    for path in filter(Path.is_file, known.config):
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            mark = getattr(error, "problem_mark", None)
            place = f", line {mark.line + 1}" if mark else ""
            raise ValueError(f"{path}{place} is not YAML: {getattr(error, 'problem', error)}") from error
        if not isinstance(values, dict):
            found = "nothing" if values is None else f"a {type(values).__name__}"
            raise ValueError(f"{path} must map keys to values, got {found}")
        keys += flat_dict(values)
    return keys


def _mappings(config_class: type) -> list[str]:
    """Return the fields of a config that are mappings, whose keys it does not know."""
    hints = typing.get_type_hints(config_class).items()
    return [name for name, hint in hints if typing.get_origin(hint) is dict]


def _dotted_keys(config_class: type, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, hint in typing.get_type_hints(config_class).items():
        options = (
            typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
        )
        section = next((option for option in options if dataclasses.is_dataclass(option)), None)
        if isinstance(section, type):
            keys += _dotted_keys(section, f"{prefix}{name}.")
        else:
            keys.append(f"{prefix}{name}")
    return keys
