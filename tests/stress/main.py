"""The loop of scripts/stress.py."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from pathlib import Path

from mhla_diffusion.files.locking import only_writer

from . import damage, faults, fuzz
from .bench import Bench
from .outcomes import MEANINGS, Log, Record

CASES: dict[str, Callable[[Bench, int], list[Record]]] = {**faults.CASES, **damage.CASES, **fuzz.CASES}


def stress(out: str, hours: float = 1.0, kinds: list[str] | None = None, number: int | None = None) -> int:
    """Do cases, one kind after the other in turn, until the time is over, and print the table of all.

    Args:
        out: folder for records.jsonl, to which is added, and for what the cases need. What a case left stays
            there when it came to no good end.
        hours: for how long; 0 for the table alone.
        kinds: which kinds of faults; all by default.
        number: of the one case of each kind that is to be done again, instead.

    Returns:
        1 when a case came to no good end.
    """
    chosen = list(CASES) if kinds is None else kinds
    if unknown := [kind for kind in chosen if kind not in CASES]:
        raise ValueError(f"kinds must be out of {', '.join(CASES)}, got {unknown[0]!r}")
    with only_writer(out):
        log = Log(Path(out) / "records.jsonl")
        if hours > 0 or number is not None:
            bench, end = Bench(Path(out)), time.monotonic() + 3600 * hours
            # A case in which nothing happened, as it ended before its kill, leaves no record.
            numbers = {kind: itertools.count(log.next_number(kind)) for kind in chosen}
            for kind in chosen if number is not None else itertools.cycle(chosen):
                if number is None and time.monotonic() > end:
                    break
                records = CASES[kind](bench, next(numbers[kind]) if number is None else number)
                log.add(records)
                for record in records:
                    logging.info(
                        "%s %d, %s: %s %s", kind, record.number, record.subject, record.outcome, record.detail
                    )
    meanings = [f"{name}: {meaning}" for name, meaning in MEANINGS.items()]
    bad = [f"{r.outcome}: {r.kind} {r.number}, {r.subject}: {r.detail}" for r in log.bad()]
    print("\n".join([log.table(), *meanings, *bad]))  # noqa: T201
    return int(bool(bad))
