"""``mhla compare-attention``: variants of attention on one task, over seeds, with a page of results."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from ..comparison import Comparison, compare_attention, write_page
from .parsing import parse_and_call


def main(arguments: Sequence[str], prog: str) -> None:
    """Run what is missing, write the page and print where it is."""

    def compare(
        comparison: Comparison,
        out: str,
        results: str = "docs/results",
        processes: int = 1,
        device: str = "cpu",
    ) -> None:
        """Compare variants of attention; interrupted, the same call goes on.

        Args:
            comparison: a YAML file, as in configs/compare, or its settings.
            out: folder of the runs; what is there is not done again.
            results: folder of the page and its JSON, which are written anew.
            processes: runs at a time, each with one thread.
            device: of torch, cpu or cuda.
        """
        records = compare_attention(comparison, Path(out), processes=processes, device=device)
        page = write_page(comparison, records, Path(results), f"{prog} {shlex.join(arguments)}")
        print(page)

    parse_and_call(compare, arguments, prog)
