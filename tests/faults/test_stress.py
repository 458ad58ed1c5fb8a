"""Some of the cases of scripts/stress.py, of every kind: faults by chance, and none comes to a bad end."""

from __future__ import annotations

import itertools
import shutil
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired

import pytest

from tests.stress import faults, fuzz
from tests.stress.bench import Bench
from tests.stress.damage import TARGETS, damaged_files
from tests.stress.inputs import INPUTS, Input
from tests.stress.outcomes import BAD, GOOD, Log, Record, judge_end

QUICK = ("images", "caching", "export", "conversion")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("stress"))


def require_good(records: list[Record]) -> None:
    assert records
    assert not [record for record in records if record.outcome in BAD]
    assert all(record.outcome in GOOD for record in records)


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("kind", ["kills", "signals", "full disks", "second writers"])
def test_a_command_that_something_happened_to_comes_to_the_same_end(
    bench: Bench, kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "subject", lambda number, *names: bench.subjects[name])
    # A command that ends before its kill leaves no record.
    cases = (faults.CASES[kind](bench, 4 * number + QUICK.index(name)) for number in itertools.count())
    require_good(next(filter(None, cases)))


@pytest.mark.parametrize("name", ["images", "latents", "latents trained on"])
def test_a_damaged_file_is_made_again_left_out_or_refused(bench: Bench, name: str) -> None:
    first = next(number for number, target in enumerate(TARGETS) if target.name == name)
    for number in (first, first + len(TARGETS), first + 2 * len(TARGETS)):
        require_good(damaged_files(bench, number))


QUICK_INPUTS = [kind for kind in INPUTS if kind.name not in ("reports", "configs", "weights")]


@pytest.mark.parametrize("kind", QUICK_INPUTS, ids=lambda kind: kind.name)
def test_inputs_are_read_when_they_are_right_and_else_refused_or_skipped(
    bench: Bench, tmp_path: Path, kind: Input, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = kind.write(bench, tmp_path, 1)
    assert fuzz._outcome(partial(kind.read, bench, tmp_path, path)) == ("read", "")
    monkeypatch.setattr(fuzz, "EXAMPLES", 4)
    require_good(fuzz.fuzzed(bench, INPUTS.index(kind)))


def test_bad_ends_are_told_from_good_ones() -> None:
    def refuse() -> str:
        raise ValueError("no such thing")

    def fail() -> str:
        raise KeyError("thing")

    assert fuzz._outcome(refuse) == ("refused", "error: no such thing")
    assert fuzz._outcome(lambda: "skipped") == ("skipped", "")
    assert fuzz._outcome(fail)[0] == "traceback"
    end = partial(CompletedProcess, "mhla")
    assert judge_end(end(0, "", ""))[0] == "done"
    assert judge_end(end(1, "", "error: no disk\n")) == ("refused", "error: no disk")
    assert judge_end(end(1, "", "Traceback (most recent call last)\nKeyError: 1"))[0] == "traceback"
    assert judge_end(end(1, "", "what now?"))[0] == "wrong"
    assert judge_end(end(-11, "", ""))[0] == "crash"
    assert judge_end(TimeoutExpired("mhla", 60))[0] == "hang"


def test_what_is_not_the_same_is_found(bench: Bench, tmp_path: Path) -> None:
    subject, (out, *_) = bench.subjects["caching"], bench.undisturbed("caching")
    copy = shutil.copytree(out, tmp_path / "copy")
    assert bench.compare(subject, copy) == ("resumed", "")
    (copy / "latents-00001.safetensors").write_bytes(b"other")
    assert bench.compare(subject, copy) == ("wrong", "other latents-00001.safetensors")
    (copy / "cache.json").unlink()
    assert bench.compare(subject, copy)[1] == "other cache.json, latents-00001.safetensors"


def test_the_log_goes_on_and_its_table_counts(tmp_path: Path) -> None:
    log = Log(tmp_path / "records.jsonl")
    log.add([Record("kills", 3, "images", "resumed"), Record("kills", 3, "images", "resumed")])
    log.add([Record("kills", 4, "training", "wrong", "other weights")])
    again = Log(tmp_path / "records.jsonl")
    assert again.next_number("kills") == 5
    assert again.next_number("signals") == 0
    assert [record.detail for record in again.bad()] == ["other weights"]
    assert "| kills | images | 2 |  |  |  |  |  |  |  |  |" in again.table()
    assert "| all | 3 | 2 | 0 | 0 | 0 | 0 | 1 | 0 | 0 | 0 |" in again.table()
