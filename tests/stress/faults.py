"""Kills, signals, full disks, second writers and lost processes."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tests.processes import Script, start_processes

from .bench import LIMIT, Bench, Watch, ended, killed_by
from .outcomes import Record, Result, judge_end, output_of
from .subjects import Subject


def kills(bench: Bench, number: int) -> list[Record]:
    """SIGKILL, once to three times, at any moment or at one of those between two doings with files."""
    draw, subject = random.Random(f"kills {number}"), bench.subject(number)
    out = bench.fresh("kills", number)
    _, _, seconds, events = bench.undisturbed(subject.name)
    moments: list[str] = []
    for _ in range(draw.randint(1, 3)):
        by_time = draw.random() < 0.4
        moment = draw.random() * seconds if by_time else draw.randint(1, events)
        watch = None if by_time else Watch(out.parent, fatal=int(moment))
        script = subject.start(out, before=watch, again=bool(moments))
        if by_time and not script.ends_within(moment):
            script.send(signal.SIGKILL)
        result = ended(script)
        if not killed_by(result, signal.SIGKILL):
            status, line = judge_end(result)
            if status == "refused" and "start without --resume" in line:
                continue
            if status in ("done", "refused"):
                break
            return [Record("kills", number, subject.name, status, f"after {moments}: {line}")]
        moments.append(f"{moment:.2f} s" if by_time else f"event {moment}")
    return _resumed(bench, "kills", number, subject, out, moments)


def _resumed(
    bench: Bench, kind: str, number: int, subject: Subject, out: Path, moments: list[str]
) -> list[Record]:
    """Go on, and count each of the faults before as what comes of it."""
    outcome, detail = bench.finish(subject, out, again=bool(moments))
    left = [p for p in out.parent.rglob(".*") if p.name.startswith(".writing-") or ".partial" in p.name]
    if outcome == "resumed" and left:
        outcome, detail = "wrong", f"left behind: {', '.join(p.name for p in left)}"
    if outcome == "resumed":
        bench.clear(out)
    detail = f"{', '.join(moments)}{': ' if detail else ''}{detail}"
    return [Record(kind, number, subject.name, outcome, detail)] * len(moments)


def signals(bench: Bench, number: int) -> list[Record]:
    """SIGTERM or Ctrl-C at any moment."""
    draw, subject = random.Random(f"signals {number}"), bench.subject(number)
    out, which = bench.fresh("signals", number), draw.choice([signal.SIGTERM, signal.SIGINT])
    seconds = draw.random() * bench.undisturbed(subject.name)[2]
    script = subject.start(out)
    if not script.ends_within(seconds):
        script.send(which)
    result = ended(script)
    moment = [f"{which.name} after {seconds:.2f} s"]
    stopped = isinstance(result, subprocess.CompletedProcess) and result.returncode in (-which, 128 + which)
    if not stopped or "Traceback" in output_of(result):
        status, line = judge_end(result)
        if status != "done":
            return [Record("signals", number, subject.name, status, f"{moment[0]}: {line}")]
    return _resumed(bench, "signals", number, subject, out, moment)


def full_disks(bench: Bench, number: int) -> list[Record]:
    """A limit of the size of files, or a disk of which some kilobytes are free; then room, and once more."""
    draw, subject = random.Random(f"disks {number}"), bench.subject(number)
    out = bench.fresh("disks", number)
    reference = bench.undisturbed(subject.name)[0]
    sizes = [path.stat().st_size for path in reference.rglob("*") if path.is_file()]
    if number % 4 and os.geteuid() == 0:
        free = int(draw.uniform(0.02, 0.9) * sum(sizes))
        with _small_disk(out.parent, free) as enlarge:
            result = ended(subject.start(out))
            enlarge()
            return _after_full_disk(bench, number, subject, out, f"{free} bytes free", result)
    # What it prints goes to files, too.
    limit = max(8192, int(draw.uniform(0, 1) ** 2 * max(sizes)))
    result = ended(subject.start(out, before=partial(_limit_files, limit)))
    return _after_full_disk(bench, number, subject, out, f"files of {limit} bytes", result)


def _after_full_disk(
    bench: Bench,
    number: int,
    subject: Subject,
    out: Path,
    what: str,
    result: Result,
) -> list[Record]:
    status, line = judge_end(result)
    if status == "done":
        status, line = bench.compare(subject, out)
        status = "harmless" if status == "resumed" else status
        return [Record("full disks", number, subject.name, status, f"{what}: done, {line}")]
    if status != "refused":
        return [Record("full disks", number, subject.name, status, f"{what}: {line}")]
    (record,) = _resumed(bench, "full disks", number, subject, out, [f"{what}: {line}"])
    return [record]


def _limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@contextmanager
def _small_disk(folder: Path, free: int) -> Iterator[partial[object]]:
    mount = ["mount", "-t", "tmpfs", "-o", f"size={max(free, 8192)}", "tmpfs", str(folder)]
    subprocess.run(mount, check=True)
    try:
        yield partial(subprocess.run, ["mount", "-o", "remount,size=1g", str(folder)], check=True)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def two_writers(bench: Bench, number: int) -> list[Record]:
    """The same command twice, the second some time after the first: one of them does it."""
    draw, subject = random.Random(f"writers {number}"), bench.subject(number)
    out = bench.fresh("writers", number)
    wait = draw.random() ** 2 * bench.undisturbed(subject.name)[2]
    first = subject.start(out)
    first.ends_within(wait)
    second = subject.start(out)
    ends = [judge_end(ended(script)) for script in (first, second)]
    outcome, detail = "wrong", "neither did it"
    if bad := [end for end in ends if end[0] not in ("done", "refused")]:
        outcome, detail = bad[0]
    elif any(status == "done" for status, _ in ends):
        outcome, detail = bench.compare(subject, out)
    refusals = [line for status, line in ends if status == "refused"]
    outcome = "refused" if outcome == "resumed" and refusals else outcome
    if outcome in ("refused", "resumed"):
        bench.clear(out)
    said = f"after {wait:.2f} s: {'; '.join([*refusals, detail])}"
    return [Record("second writers", number, subject.name, outcome, said)]


def lost_processes(bench: Bench, number: int) -> list[Record]:
    """One of two processes of a run is killed: the other ends within a minute, and both go on to the bit.

    Before they have found each other it is up to their launcher to end them.
    """
    draw = random.Random(f"ranks {number}")
    subject = bench.subject(number, "training", "images", "caching")
    out, victim = bench.fresh("ranks", number), draw.randint(0, 1)
    seconds = draw.random() * bench.undisturbed(subject.name)[2]
    pair = _start_pair(subject, out)
    pair[0].says("2 processes share the work")
    if not pair[victim].ends_within(seconds):
        pair[victim].send(signal.SIGKILL)
    other = judge_end(ended(pair[1 - victim], 60))
    ended(pair[victim])
    what = f"process {victim} after {seconds:.2f} s: {other[1]}"
    if other[0] not in ("done", "refused"):
        return [Record("lost processes", number, subject.name, other[0], what)]
    again = [judge_end(ended(script)) for script in _start_pair(subject, out, again=True)]
    if any("start without --resume" in line for _, line in again):
        again = [judge_end(ended(script)) for script in _start_pair(subject, out)]
    outcome, detail = "wrong", f"dead end: {again}"
    if all(status == "done" for status, _ in again):
        outcome, detail = _compare_pair(bench, subject, out)
    if outcome == "resumed":
        bench.clear(out)
    return [Record("lost processes", number, subject.name, outcome, f"{what}; {detail}")]


def _compare_pair(bench: Bench, subject: Subject, out: Path) -> tuple[str, str]:
    """Compare with two undisturbed processes, whose sums are rounded otherwise than those of one."""
    if subject.name != "training":
        return bench.compare(subject, out)
    reference = bench.place / "cases" / "undisturbed-pair" / "out"
    if not (reference / "pipeline").exists():
        for script in _start_pair(subject, reference):
            assert judge_end(ended(script))[0] == "done"
    same = subject.digest(reference) == subject.digest(out)
    return ("resumed", "") if same else ("wrong", "other weights or losses than undisturbed")


def _start_pair(subject: Subject, out: Path, *, again: bool = False) -> list[Script]:
    return start_processes(lambda before: subject.start(out, before=before, again=again))


CASES = {
    "kills": kills,
    "signals": signals,
    "full disks": full_disks,
    "second writers": two_writers,
    "lost processes": lost_processes,
}
assert LIMIT > 60
