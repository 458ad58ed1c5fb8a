"""Parsers of command lines whose help is made of docstrings."""

from __future__ import annotations

import argparse
import re

from jsonargparse import ArgumentParser


class HelpParser(ArgumentParser):
    """Parser whose help has plain names for cross-references of docstrings, and each option once."""

    def format_help(self, formatter: argparse.HelpFormatter | None = None) -> str:
        usage, blank, rest = super().format_help(formatter).partition("\n\n")
        assert usage.startswith("usage: ")
        return f"usage: {self.prog} [options]" + re.sub(r"(?::[a-z]+:)?`+[~.]*([^`]+)`+", r"\1", blank + rest)
