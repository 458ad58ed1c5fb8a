"""Inputs of many kinds, each a valid one with some of it changed by chance (hypothesis)."""

from __future__ import annotations

import copy
import io
import json
import multiprocessing
import os
import shutil
import signal
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from mhla_diffusion.commands.end import exit_code

from .bench import Bench
from .inputs import INPUTS, Input
from .outcomes import Record

EXAMPLES = 12
LIMIT = 60
"""Seconds for one input."""

Mutation = tuple[str, float, Any]

_PLACE = st.integers(0, 9999).map(lambda number: number / 1e4)
"""Where in a file, or which of its values."""

_BYTES = st.one_of(
    st.tuples(st.just("flip"), _PLACE, st.integers(0, 7)),
    st.tuples(st.just("overwrite"), _PLACE, st.binary(min_size=1, max_size=40)),
    st.tuples(st.just("insert"), _PLACE, st.binary(min_size=1, max_size=40)),
    st.tuples(st.just("zeros"), _PLACE, st.integers(1, 2000)),
    st.tuples(st.just("cut"), _PLACE, st.none()),
    st.tuples(st.just("repeat"), _PLACE, st.integers(1, 200)),
)
_WORDS = st.sampled_from(
    [
        *(
            "\ufeff",
            "\x00",
            '"',
            "'",
            ",",
            "\n",
            "\r",
            "[",
            "{",
            "}",
            ":",
            "..",
            "/etc/passwd",
            "../../up.png",
        ),
        *(
            "NaN",
            "-1",
            "1e999",
            "null",
            "true",
            "\u202e",
            "\udcff",
            "é",
            "a" * 5000,
            "&a [*a]",
            "!!python/name:os",
        ),
    ]
)
_TEXT = st.tuples(st.just("word"), _PLACE, _WORDS)
_VALUES: st.SearchStrategy[Any] = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), _WORDS, st.just([]), st.just({}),
    st.lists(st.integers(-2, 9), max_size=4), st.just("x" * 300), st.just(["a", ["b"]]),
)  # fmt: skip
_VALUE = st.tuples(st.sampled_from(["value", "remove", "rename"]), _PLACE, _VALUES)


def _change_bytes(content: bytes, mutation: Mutation) -> bytes:
    what, place, value = mutation
    at = min(int(place * len(content)), max(len(content) - 1, 0))
    if what == "flip":
        return content[:at] + bytes([content[at] ^ 1 << value]) + content[at + 1 :] if content else content
    if what == "overwrite":
        return content[:at] + value + content[at + len(value) :]
    if what == "insert":
        return content[:at] + value + content[at:]
    if what == "zeros":
        return content[:at] + bytes(value) + content[at + value :]
    if what == "repeat":
        return content[:at] + content[at : at + value] * 2 + content[at + value :]
    if what == "word":
        return content[:at] + value.encode("utf-8", "surrogateescape") + content[at:]
    return content[:at]


def _change_value(tree: Any, mutation: Mutation) -> Any:
    """Change one of the values, at any depth, of what JSON or YAML holds."""
    what, place, value = mutation
    value = copy.deepcopy(value)
    places = list(_places(tree))
    if not places:
        return value
    holder, key = places[min(int(place * len(places)), len(places) - 1)]
    if what == "value" or isinstance(holder, list):
        holder[key] = value
    elif what == "remove":
        del holder[key]
    else:
        holder[f"{key}_"] = holder.pop(key)
    return tree


def _places(tree: Any) -> list[tuple[Any, Any]]:
    if not isinstance(tree, (dict, list)):
        return []
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    return [pair for key in keys for pair in [(tree, key), *_places(tree[key])]]


def fuzzed(bench: Bench, number: int) -> list[Record]:
    """Change an input in some ways, one after the other, in a process of its own."""
    kind = INPUTS[number % len(INPUTS)]
    folder = bench.fresh("fuzzed", number).parent
    lines = folder / "records"
    process = multiprocessing.get_context("fork").Process(
        target=_fuzz, args=(bench, kind, number, folder, lines)
    )
    process.start()
    process.join(LIMIT * EXAMPLES)
    records = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    found = [Record("fuzzed inputs", number, kind.name, *record) for record in records]
    if process.is_alive():
        process.kill()
        found.append(Record("fuzzed inputs", number, kind.name, "hang", _last(folder)))
    elif process.exitcode:
        outcome = "crash" if process.exitcode < 0 else "traceback"
        found.append(
            Record("fuzzed inputs", number, kind.name, outcome, f"{process.exitcode}, {_last(folder)}")
        )
    if all(record.outcome in ("read", "refused", "skipped") for record in found):
        shutil.rmtree(folder)
    return found


def _last(folder: Path) -> str:
    return (folder / "now").read_text() if (folder / "now").exists() else "before the first"


class _TooLong(BaseException):
    pass


def _ring(number: int, frame: object) -> None:
    raise _TooLong


def _fuzz(bench: Bench, kind: Input, number: int, folder: Path, lines: Path) -> None:
    signal.signal(signal.SIGALRM, _ring)
    for handler in (1, 2):
        os.dup2(os.open(folder / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND), handler)
    raw = st.lists(st.one_of(_BYTES, _TEXT) if kind.text else _BYTES, min_size=1, max_size=3)
    values = st.lists(_VALUE, min_size=1, max_size=2)
    changes = st.one_of(raw, values, values) if kind.structured else raw
    counter = iter(range(10**6))
    _read_valid(bench, kind, folder / "valid")

    @seed(number)
    @settings(
        max_examples=EXAMPLES, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(changes, st.integers(0, 1 << 20))
    def example(mutations: list[Mutation], variant: int) -> None:
        place = folder / str(next(counter))
        place.mkdir()
        path = kind.write(bench, place, variant)
        _mutate(path, mutations, kind)
        (folder / "now").write_text(f"{path.name}: {mutations}")
        outcome, line = _outcome(partial(kind.read, bench, place, path))
        if outcome == "refused" and kind.named and not any(name in line for name in (path.name, place.name)):
            outcome = "wrong"  # which of many files?
        if outcome in ("read", "refused", "skipped"):
            shutil.rmtree(place)
        detail = f"{place.name}/{path.name}: {str(mutations)[:200]}: {line}"
        with lines.open("a") as file:
            file.write(json.dumps([outcome, detail]) + "\n")
        if outcome == "hang":
            os._exit(0)  # what was interrupted, an import perhaps, would show in the next ones

    example()


def _read_valid(bench: Bench, kind: Input, place: Path) -> None:
    """Import what reading needs, which on a machine that others use can take longer than an input may."""
    place.mkdir()
    kind.read(bench, place, kind.write(bench, place, 0))
    shutil.rmtree(place)


def _mutate(path: Path, mutations: list[Mutation], kind: Input) -> None:
    for mutation in mutations:
        if mutation[0] in ("value", "remove", "rename"):
            assert kind.structured is not None
            parse, write = kind.structured
            try:
                text = write(_change_value(parse(path.read_text()), mutation))
                path.write_bytes(text.encode("utf-8", "surrogateescape"))
            except (
                ValueError,
                TypeError,
                yaml.YAMLError,
            ):  # what an earlier one left is no longer of its kind
                continue
        else:
            path.write_bytes(_change_bytes(path.read_bytes(), mutation))


def _outcome(read: Callable[[], str]) -> tuple[str, str]:
    found, said = [""], io.StringIO()

    def call() -> None:
        found[0] = read()

    signal.alarm(LIMIT)
    try:
        with redirect_stderr(said):
            code = exit_code(call)
    except _TooLong:
        return "hang", f"no end after {LIMIT} s"
    except BaseException as error:
        traceback.print_exc()
        place = traceback.extract_tb(error.__traceback__)[-1]
        return (
            "traceback",
            f"{type(error).__name__}: {str(error)[:200]} ({Path(place.filename).name}:{place.lineno})",
        )
    finally:
        signal.alarm(0)
    errors = [line for line in said.getvalue().splitlines() if line.startswith("error: ")]
    if code == 0:
        return found[0], ""
    return ("refused", errors[0][:300]) if len(errors) == 1 else ("wrong", f"{len(errors)} lines of error")


CASES = {"fuzzed inputs": fuzzed}
