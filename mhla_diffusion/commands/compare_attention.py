"""``mhla compare-attention``: variants of attention on one task, over seeds, with a page of results."""

from __future__ import annotations

import contextlib
import logging
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from ..comparison import Comparison, compare_attention, write_page
from ..comparison.runs import records, screened_out
from .parsing import parse_and_call

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str], prog: str) -> None:
    """Run what is missing, and write the page on request."""

    def compare(
        comparison: Comparison,
        out: str,
        page: bool = False,
        screen: bool = False,
        results: str = "docs/results",
        processes: int = 1,
        device: str = "cpu",
    ) -> None:
        """Compare variants of attention; interrupted, the same call goes on.

        Args:
            comparison: a YAML file, as in configs/compare, or its settings.
            out: folder of the runs; what is there is not done again.
            page: make no runs, but write the page of those that are done, also while others are made.
            screen: run each variant short and once, and those alone over all seeds that are not clearly
                beaten; what was left out stands on the page.
            results: folder of the page, its JSON and its pictures, which are written anew.
            processes: runs at a time, each with one thread.
            device: of torch, cpu or cuda.
        """
        folder = Path(out)
        if not page:
            found = compare_attention(comparison, folder, processes=processes, device=device, screen=screen)
            logger.info("%d runs are done; --page writes them to %s", len(found), results)
            return
        command = f"{prog} {re.sub(' --page[ =][^ ]+', '', f' {shlex.join(arguments)}').strip()}"
        screened = screened_out(comparison, folder) if screen else {}
        found = records(comparison, folder)
        print(write_page(comparison, found, Path(results), command, out=folder, screened=screened))

    parse_and_call(compare, _with_comparison(arguments), prog)


def _with_comparison(arguments: Sequence[str]) -> list[str]:
    """Arguments with ``--comparison`` for a ``--config`` that is the YAML of a comparison."""
    found = list(arguments)
    for i, word in enumerate(arguments):
        option, equals, value = word.partition("=")
        if option != "--config":
            continue
        path = Path(value if equals else "".join(arguments[i + 1 : i + 2]))
        with contextlib.suppress(OSError):  # no file: what it is instead the parser says
            if re.search(r"^task:", path.read_text(errors="replace"), re.MULTILINE):
                found[i] = word.replace(option, "--comparison", 1)
    return found
