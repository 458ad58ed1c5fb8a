"""Parsers of command lines whose help is made of docstrings."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser, Namespace

# What jsonargparse says of a value: a line for each type that it may have, nested, between lines of no use.
_ABOUT = re.compile(r"(- )?(Does not validate|Subtypes: |Errors:|Problem with given|Given value type: )")
_KEY = re.compile(r'(?:- )?Parser key "([^"]+)": ?')
_EXPECTED = re.compile(r"(?:- )?Expected an? (.*?)(?:\. Got value: (.*))?$")
_TYPE_NAMES = {"NoneType": "null", "str": "text", "bool": "true or false"}
_LISTS = {"tuple", "list", "Sequence"}
_MAY_BE_EMPTY = ("prompt", "prompts", "text.instruction", "text.pipeline")


class HelpParser(ArgumentParser):
    """Parser whose help has plain names for cross-references, and in whose values ``~`` is the home.

    The help names each option once.
    """

    def format_help(self, formatter: argparse.HelpFormatter | None = None) -> str:
        usage, blank, rest = super().format_help(formatter).partition("\n\n")
        assert usage.startswith("usage: ")
        return f"usage: {self.prog} [options]" + re.sub(r"(?::[a-z]+:)?`+[~.]*([^`]+)`+", r"\1", blank + rest)

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, *more: Any, **settings: Any
    ) -> Namespace:
        """Parse arguments; in them and in files of configuration ``~/`` begins a path in the home.

        Raises:
            ValueError: for a number that is none (NaN), which every bound lets pass, and for a text that is
                empty, which as a path would be the working folder. What goes into prompts may be.
        """
        words = [with_home(word) for word in (sys.argv[1:] if args is None else args)]
        values = super().parse_args(words, *more, **settings)
        for key, value in list(values.items()):
            if _holds_nan(value):
                raise ValueError(f"{key} must be a number, got {value}")
            if _holds_blank(value) and not key.endswith(_MAY_BE_EMPTY):
                raise ValueError(f"{key} is empty: leave it out, or say what it is (is a variable not set?)")
            if (expanded := _expanded(value)) != value:
                values[key] = expanded
        return values


def plain_message(message: str) -> str:
    """Return what jsonargparse says of a value as ``key: expected TYPES, got VALUE``.

    Messages of other forms, as those of our own checks, are returned as they are.
    """
    if not (_KEY.match(message) or _ABOUT.match(message)):
        return message
    keys, types, value = list[str](), list[str](), ""
    for line in map(str.strip, message.splitlines()):
        if key := _KEY.match(line):
            keys += [key[1]] * (key[1] not in keys)
            line = line[key.end() :]
        if expected := _EXPECTED.match(line):
            types.append(_type_name(expected[1]))
            value = expected[2] or ""
        elif line.startswith("Given value: "):
            value = line.removeprefix("Given value: ")
        elif line and not _ABOUT.match(line):
            return ": ".join([*([".".join(keys)] if keys else []), line.removeprefix("- ")])
        if value:
            break
    if not (types and value):
        return message
    hint = "; a list is written [A, B], in quotes" if _LISTS.intersection(types) else ""
    return f"{'.'.join(keys)}: expected {' or '.join(types)}, got {value}{hint}"


def _type_name(expected: str) -> str:
    """Return ``Literal['a', 'b']`` or ``<class 'int'>`` as a reader of YAML names it."""
    if choices := re.match(r"typing\.Literal\[(.*)\]$", expected):
        return f"one of {choices[1]}"
    if expected.startswith("dot import path"):  # of settings that have keys
        return "keys and values"
    name = re.sub(r"^<class '(?:[\w.]*\.)?(\w+)'>$", r"\1", expected)
    return _TYPE_NAMES.get(name, name)


def with_home(word: str) -> str:
    """Return an argument, ``~/path`` or ``--option=~/path``, with the home in the place of the tilde.

    Shells replace it where it begins a word, and YAML and Python never do.
    """
    option, equals, path = word.partition("=") if word.startswith("-") else ("", "", word)
    return f"{option}{equals}{_expanded(path)}"


def _expanded(value: Any) -> Any:
    if isinstance(value, str):
        return os.path.expanduser(value) if value == "~" or value.startswith("~/") else value
    if type(value) in (list, tuple):  # no named tuple, such as jsonargparse has of nested keys
        return type(value)(map(_expanded, value))
    return value


def _holds_blank(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_holds_blank, value))
    return isinstance(value, str) and not value.strip()


def _holds_nan(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_holds_nan, value))
    if isinstance(value, dict):
        return any(map(_holds_nan, value.values()))
    return isinstance(value, float) and math.isnan(value)
