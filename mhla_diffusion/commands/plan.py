"""``mhla plan``: FLOPs, bytes and the bound on the speed-up, and the blocks to take."""

from __future__ import annotations

from collections.abc import Sequence

from ..planning import plan
from .parsing import parse_and_call


def main(arguments: Sequence[str], prog: str) -> None:
    """Print the plan."""
    print(parse_and_call(plan, arguments, prog))
