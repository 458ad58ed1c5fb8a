"""``mhla benchmark``: speed and memory beside the alternatives; each command is a file of benchmarks/."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from .end import CommandError
from .parsing import parse_and_call


def main(arguments: Sequence[str], prog: str, name: str) -> None:
    """Print the table of a benchmark."""
    module = importlib.import_module(f"..benchmarks.{name}", __package__)
    try:
        print(parse_and_call(getattr(module, name), arguments, prog))
    except RuntimeError as error:  # what is measured is not right, or does not fit into memory
        raise CommandError(str(error)) from error
