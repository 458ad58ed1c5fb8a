"""What came of a fault, the log of all of them, and the table."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired

GOOD = ("resumed", "refused", "skipped", "read", "harmless")
BAD = ("wrong", "traceback", "hang", "crash")
MEANINGS = {
    "resumed": "gone on with, or made again, to the same bytes",
    "refused": "ended with one line that says what is wrong",
    "skipped": "left out, named and counted",
    "read": "taken for a valid input, all of it",
    "harmless": "not noticed, and the result is the same to the byte",
    "wrong": "another result without a word, or a dead end",
    "traceback": "an error that is nobody's sentence",
    "hang": "no end within its time",
    "crash": "ended by a signal that nobody sent",
}


@dataclass(frozen=True)
class Record:
    """One fault.

    Args:
        kind: of the case, such as ``kills``.
        number: of the case in its kind; with the kind it says what is done.
        subject: what it was done to.
        outcome: one of ``GOOD`` or ``BAD``.
        detail: what was done and said.
    """

    kind: str
    number: int
    subject: str
    outcome: str
    detail: str = ""


class Log:
    """Records in a file, a line of JSON each, to which a later run adds.

    Args:
        path: of the file; made when it is not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.records = [Record(**json.loads(line)) for line in lines]

    def add(self, records: Iterable[Record]) -> None:
        new = list(records)
        self.records += new
        with self.path.open("a") as file:
            file.writelines(json.dumps(asdict(record)) + "\n" for record in new)

    def next_number(self, kind: str) -> int:
        return 1 + max((record.number for record in self.records if record.kind == kind), default=-1)

    def bad(self) -> list[Record]:
        return [record for record in self.records if record.outcome in BAD]

    def table(self) -> str:
        """Return Markdown: a row for each kind and subject, a column for each outcome."""
        counts = Counter((record.kind, record.subject, record.outcome) for record in self.records)
        columns = [*GOOD, *BAD]
        lines = [f"| faults | done to | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
        rows = dict.fromkeys((record.kind, record.subject) for record in self.records)
        for kind, subject in sorted(rows):
            cells = [str(counts[kind, subject, outcome] or "") for outcome in columns]
            lines.append(f"| {kind} | {subject} | {' | '.join(cells)} |")
        totals = [str(sum(n for (_, _, name), n in counts.items() if name == column)) for column in columns]
        return "\n".join([*lines, f"| all | {len(self.records):,} | {' | '.join(totals)} |"])


Result = CompletedProcess[str] | TimeoutExpired


def output_of(result: Result) -> str:
    """Return all that a process printed, nothing of one that did not end."""
    return result.stdout + result.stderr if isinstance(result, CompletedProcess) else ""


def judge_end(result: Result) -> tuple[str, str]:
    """Return what a process that was not killed came to, ``done`` or an outcome, and what it said."""
    if isinstance(result, TimeoutExpired):
        return "hang", f"no end after {result.timeout:.0f} s"
    output = output_of(result)
    last = next((line for line in reversed(output.splitlines()) if line.strip()), "")
    if "Traceback (most recent call last)" in output:
        return "traceback", last
    if result.returncode < 0:
        return "crash", f"signal {-result.returncode}: {last}"
    if result.returncode == 0:
        return "done", ""
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    return ("refused", errors[0]) if len(errors) == 1 else ("wrong", f"{len(errors)} lines of error: {last}")
