"""Place in which cases are run: what they are given, and what comes of it undisturbed."""

from __future__ import annotations

import os
import shutil
import signal
import time
from functools import cache
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from typing import Any

from tests.processes import Script

from .outcomes import Result, judge_end
from .subjects import Digest, Subject, prepare

_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}
LIMIT = 240.0


class Bench:
    """Subjects, and each of them undisturbed.

    Args:
        place: folder for all of it; what is there is used.
    """

    def __init__(self, place: Path) -> None:
        self.place = place.resolve()
        self.given = self.place / "given"
        self.subjects = prepare(self.given)
        Script("plan", "--help").finish()  # starts the server, so that the next ones take their own time

    def subject(self, number: int, *names: str) -> Subject:
        """Return one of the subjects, or of some, in turn."""
        chosen = names or tuple(self.subjects)
        return self.subjects[chosen[number % len(chosen)]]

    def fresh(self, kind: str, number: int) -> Path:
        """Return a new folder for the output of a case."""
        folder = self.place / "cases" / f"{kind}-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder / "out"

    def clear(self, out: Path) -> None:
        """Remove what a case has left."""
        shutil.rmtree(out.parent, ignore_errors=True)

    @cache  # noqa: B019 (it lives as long as the process)
    def undisturbed(self, name: str) -> tuple[Path, Digest, float, int]:
        """Return the output of a subject that nothing happened to, its digest, seconds, and file events."""
        out, subject = self.fresh("undisturbed", list(self.subjects).index(name)), self.subjects[name]
        events, started = out.parent / "events", time.perf_counter()
        result = subject.start(out, before=Watch(out.parent, counter=events)).finish()
        assert result.returncode == 0, result.stdout + result.stderr
        return out, subject.digest(out), time.perf_counter() - started, int(events.read_text())

    def finish(self, subject: Subject, out: Path, *more: str, again: bool = True) -> tuple[str, str]:
        """Go on with what was begun until it is done; returns the outcome, and what it is not the same in."""
        status, line = judge_end(ended(subject.start(out, *more, again=again)))
        if status == "refused" and "start without --resume" in line:
            return self.finish(subject, out, *more, again=False)
        if status == "refused" and subject.done_once and "already" in line:
            status = "done"
        if status != "done":
            return "wrong" if status == "refused" else status, f"dead end: {line}"
        return self.compare(subject, out)

    def compare(self, subject: Subject, out: Path) -> tuple[str, str]:
        """Return ``resumed``, or ``wrong`` with the names of what is not as it was undisturbed."""
        _, expected, *_ = self.undisturbed(subject.name)
        try:
            found = subject.digest(out)
        except (OSError, ValueError, AssertionError) as error:
            return "wrong", f"{type(error).__name__}: {error}"
        keys = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
        return ("wrong", f"other {', '.join(keys)}") if keys else ("resumed", "")


class Watch:
    """Counts what a process does to the files of a folder, and kills it at one of these moments.

    Args:
        place: the folder; links are resolved.
        counter: file that the count goes to.
        fatal: number of the event at which the process is killed.
    """

    def __init__(self, place: Path, *, counter: Path | None = None, fatal: int | None = None) -> None:
        self.place, self.counter, self.fatal = str(place.resolve()), counter, fatal

    def __call__(self) -> None:
        import sys

        self.seen = 0
        self.descriptor = None if self.counter is None else os.open(self.counter, os.O_CREAT | os.O_WRONLY)
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _EVENTS or not str(arguments[0]).startswith(self.place):
            return
        self.seen += 1
        if self.descriptor is not None:
            os.pwrite(self.descriptor, str(self.seen).encode(), 0)
        if self.seen == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)


def ended(script: Script, limit: float = LIMIT) -> Result:
    """Wait for the end of a process, or for its time to be over."""
    try:
        return script.finish(limit)
    except TimeoutExpired as error:
        return error


def killed_by(result: Result, number: int) -> bool:
    """Tell whether a process was ended by a signal."""
    return isinstance(result, CompletedProcess) and result.returncode == -number
