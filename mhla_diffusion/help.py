"""Parsers of command lines whose help is made of docstrings."""

from __future__ import annotations

import argparse
import re

from jsonargparse import ArgumentParser


class HelpParser(ArgumentParser):
    """Parser whose help has plain names where docstrings have cross-references."""

    def format_help(self, formatter: argparse.HelpFormatter | None = None) -> str:
        return re.sub(r":[a-z]+:`[~.]*([^`]+)`", r"\1", super().format_help(formatter))
