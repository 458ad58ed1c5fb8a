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
            ValueError: for a number that is none (NaN), which every bound lets pass.
        """
        words = [with_home(word) for word in (sys.argv[1:] if args is None else args)]
        values = super().parse_args(words, *more, **settings)
        for key, value in list(values.items()):
            if _holds_nan(value):
                raise ValueError(f"{key} must be a number, got {value}")
            if (expanded := _expanded(value)) != value:
                values[key] = expanded
        return values


def list_hint(message: str) -> str:
    """Return how a list is written, to stand behind a message that one was expected; else nothing."""
    expected = re.search(r"Expected a <class '[\w.]*(tuple|list|Sequence)'>", message)
    return "; a list is written [A, B], in quotes" if expected else ""


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


def _holds_nan(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_holds_nan, value))
    if isinstance(value, dict):
        return any(map(_holds_nan, value.values()))
    return isinstance(value, float) and math.isnan(value)
