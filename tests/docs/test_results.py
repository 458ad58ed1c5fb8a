"""Numbers of the pages of results against the JSON beside them."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mhla_diffusion.comparison import Comparison, write_page
from mhla_diffusion.comparison.config import key_of
from mhla_diffusion.comparison.screen import Screen
from mhla_diffusion.comparison.variant import Variant
from mhla_diffusion.conversion.findings import findings, table
from mhla_diffusion.intervals import Interval

from .pages import PAGES, ROOT, read

RESULTS = {
    path.stem: json.loads(path.read_text(encoding="utf-8"))
    for path in sorted((ROOT / "docs/results").glob("*.json"))
}
COMPARISONS = [name for name, content in RESULTS.items() if "runs" in content]
CONVERSIONS = [name for name, content in RESULTS.items() if "results" in content]

_NUMBER = r"(\d[\d,]*(?:\.\d+)?|\.\d+)"
_INTERVAL = re.compile(rf"{_NUMBER}\s±\s{_NUMBER}")
_CELL = re.compile(rf"\| (\**){_INTERVAL.pattern}")
_DIFFERENCE = re.compile(rf"{_NUMBER}\s\[{_NUMBER},\s{_NUMBER}\]")


def rows_with_marks(text: str) -> list[str]:
    """Lines of the tables."""
    return [line for line in text.splitlines() if line.startswith("| ")]


def rows(text: str) -> list[str]:
    """Lines of the tables, without bold."""
    return [line.replace("**", "") for line in rows_with_marks(text)]


def comparison(name: str) -> Comparison:
    config = yaml.safe_load((ROOT / f"configs/compare/{name}.yaml").read_text(encoding="utf-8"))
    variants = [Variant(**variant) for variant in config.pop("variants")]
    return Comparison(variants=variants, screen=Screen(**config.pop("screen", {})), **config)


@pytest.mark.parametrize("name", COMPARISONS)
def test_tables_of_a_comparison_are_what_its_records_come_to(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    compared = comparison(name)
    # What a machine without units for bfloat16 takes instead.
    here = {key: value for key, value in compared.task.record.items() if key == "trainer.mixed_precision"}
    runs = [{**run, "task": run["task"] | here} for run in RESULTS[name]["runs"]]
    runs = [{key: value for key, value in run.items() if key != "curve"} for run in runs]
    page = write_page(compared, runs, tmp_path, "command").read_text(encoding="utf-8")
    assert rows(read(f"docs/results/{name}.md").partition("## Screened out")[0]) == rows(page)


@pytest.mark.parametrize("name", CONVERSIONS)
def test_tables_of_a_conversion_are_what_its_records_come_to(name: str) -> None:
    """But for scores, whose columns the page has in its text."""
    content = dict(RESULTS[name])
    content["results"] = [{**its, "scores": []} for its in content["results"] if its["variant"] != "teacher"]
    expected = rows(table({**content, "findings": findings(content)}))
    assert len(expected) > 20
    assert set(expected) <= set(rows(read(f"docs/results/{name}.md")))


def test_intervals_of_the_pages_are_those_of_some_records() -> None:
    found = [Interval.of(values) for content in RESULTS.values() for values in over_seeds(content)]
    known = {(digits, text(its, digits)) for its in found for digits in range(5)}
    stated = [(page, *match) for page in PAGES for match in _INTERVAL.findall(read(page))]
    assert len(stated) > 100
    wrong = []
    for page, mean, half in stated:
        digits = len(mean.partition(".")[2])
        if (digits, (number(mean), number(half))) not in known:
            wrong.append(f"{page}: {mean} ± {half}")
    assert not wrong


def test_differences_of_the_pages_are_those_of_some_records() -> None:
    """Those within a seed, and scores of a teacher, written as ``mean [low, high]``."""
    found = [Interval.of(values) for values in differences()]
    ends = [(its.mean - its.half, its.mean, its.mean + its.half) for its in found]
    teachers = [
        its for name in CONVERSIONS for its in RESULTS[name]["results"] if its["variant"] == "teacher"
    ]
    scores = [score for its in teachers for score in its["scores"]]
    ends += [(score["interval"][0], score["value"], score["interval"][1]) for score in scores]
    known = {tuple(f"{abs(end):.{digits}f}" for end in its) for its in ends for digits in range(1, 5)}
    stated = _DIFFERENCE.findall(read("docs/results/README.md"))
    assert len(stated) > 10
    wrong = []
    for mean, low, high in stated:
        written = ["0" * number.startswith(".") + number for number in (low, mean, high)]
        if tuple(written) not in known and tuple(written[::-1]) not in known:
            wrong.append(f"{mean} [{low}, {high}]")
    assert not wrong


def test_marks_of_the_summary_are_of_intervals_that_lie_apart() -> None:
    """Bold is better than the first of its row, in the table of forms than the first row; italic is worse."""
    title, marked = "", 0
    for line in rows_with_marks(read("docs/results/README.md")):
        found = [(mark, Interval(number(mean), number(half), 3)) for mark, mean, half in _CELL.findall(line)]
        if not found:
            title, firsts = line, []
        elif re.match(r"\| (Frechet distance|loss|form) \|", title):
            if not (firsts and title.startswith("| form |")):
                firsts = [its for _, its in found] if title.startswith("| form |") else [found[0][1]] * 4
            for (mark, its), first in zip(found, firsts, strict=False):
                assert mark == "**" * first.is_above(its) + "*" * its.is_above(first), line
                marked += mark != ""
    assert marked > 20


def differences() -> Iterator[list[float]]:
    """Yield how far two variants are apart in each seed: by metrics of comparisons, losses of conversions.

    Runs of one task are compared on whatever page they stand.
    """
    tasks: dict[str, dict[tuple[str, str], list[Any]]] = {}
    for page, content in RESULTS.items():
        if "runs" not in content:
            ratios: dict[str, list[float]] = {}
            for its in content["results"]:
                ratios.setdefault(its["variant"], []).append(its["ratio"]["value"])
            yield from less([dict(enumerate(its)) for its in ratios.values()])
            continue
        for run in content["runs"]:
            variants = tasks.setdefault(key_of(run)[0], {})
            variants.setdefault((page, run["variant"]["name"]), []).append(run)
    for variants in tasks.values():
        for key in ("frechet", "loss", "frame_change", "accuracy", "perplexity"):
            yield from less(
                [{run["seed"]: run[key] for run in runs if key in run} for runs in variants.values()]
            )


def less(groups: list[dict[int, float]]) -> Iterator[list[float]]:
    """Yield the differences of each two variants in the seeds that both have, where these are several."""
    for one, other in itertools.permutations(groups, 2):
        seeds = sorted(one.keys() & other.keys())
        if len(seeds) > 1:
            yield [one[seed] - other[seed] for seed in seeds]


def number(text: str) -> float:
    return float(text.replace(",", ""))


def text(interval: Interval, digits: int) -> tuple[float, float]:
    """Mean and half of the interval, as they are when written with some digits."""
    return float(f"{interval.mean:.{digits}f}"), float(f"{interval.half:.{digits}f}")


def over_seeds(content: dict[str, Any]) -> Iterator[list[float]]:
    """Yield every number of the records, its values over seeds."""
    if "runs" in content:
        groups: dict[str, list[Any]] = {}
        for run in content["runs"]:
            groups.setdefault(json.dumps([run["task"], run["variant"]]), []).append(run)
        for group in groups.values():
            yield from ([run[key] for run in group] for key in group[0] if isinstance(group[0][key], float))
        return
    variants: dict[str, list[Any]] = {}
    for its in content["results"]:
        variants.setdefault(its["variant"], []).append(its)
    experiments = [*variants.values(), *(row["results"] for row in content.get("why", []))]
    experiments = [group for group in experiments if len(group) > 1]
    percent = [[100 * (its["ratio"]["value"] - 1) for its in group] for group in experiments]
    for group, losses in zip(experiments, percent, strict=True):
        yield from ([its[key] for its in group] for key in ("error", "before") if key in group[0])
        yield from ([its["ratio"]["value"] for its in group], losses)
        if group[0].get("scores"):
            yield [its["scores"][0]["value"] for its in group]
    for one, other in itertools.permutations(percent, 2):
        if len(one) == len(other):
            yield [a - b for a, b in zip(one, other, strict=True)]
