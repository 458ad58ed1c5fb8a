from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from mhla_diffusion.commands.main import MHLA
from mhla_diffusion.commands.parsing import parse_and_call
from mhla_diffusion.comparison import Comparison, Recall, Variant, compare_attention, runs, write_page
from mhla_diffusion.comparison.config import Run, runs_of, screening_runs
from mhla_diffusion.comparison.runs import records
from mhla_diffusion.comparison.screen import Screen
from mhla_diffusion.comparison.task import task_of
from mhla_diffusion.files.locking import only_writer
from mhla_diffusion.intervals import Interval

ROOT = Path(__file__).parents[2]
TASK = Recall(side=4, blocks=2, queries=4, batch_size=2, head_dim=16, steps=2, layers=1)
COMPARISON = Comparison(
    "tiny",
    [Variant("softmax", "softmax"), Variant("linear", "linear")],
    TASK,
    {"distance": ["near", "far"]},
    [0, 1],
)


def without_times(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key != "seconds_per_step"} for record in found]


def test_runs_are_done_once_and_side_by_side_as_alone(tmp_path: Path) -> None:
    alone = compare_attention(COMPARISON, tmp_path / "alone")
    assert len(alone) == 8
    assert len({json.dumps(record["variant"]) for record in alone}) == 2
    paths = [tmp_path / "alone" / run.path for run in runs_of(COMPARISON)]
    times = [path.stat().st_mtime_ns for path in paths]
    paths[3].unlink()  # as if stopped before it
    again = compare_attention(COMPARISON, tmp_path / "alone", processes=2)
    assert without_times(again) == without_times(alone)
    changed = [path.stat().st_mtime_ns != time for path, time in zip(paths, times, strict=True)]
    assert changed == [i == 3 for i in range(8)]


def test_runs_go_seed_by_seed_and_short_tasks_first() -> None:
    """So that what was made before a stop compares all variants, and early."""
    both = dataclasses.replace(COMPARISON, settings={"side": [8, 4]})
    order = [(run.task.tokens, run.seed, run.variant.name) for run in runs_of(both)]
    assert order == [
        (tokens, seed, name) for tokens in (16, 64) for seed in (0, 1) for name in ("softmax", "linear")
    ]


def test_a_device_that_is_not_there_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device 'gpu' cannot be used: choose one of cpu"):
        compare_attention(COMPARISON, tmp_path / "runs", device="gpu")
    assert not list(tmp_path.iterdir())


@dataclasses.dataclass(frozen=True)
class Stopped(Recall):
    """Task that is stopped in its first run, as by Ctrl-C."""

    def train(self, variant: Variant, seed: int, folder: Path, device: str) -> dict[str, Any]:
        folder.mkdir(parents=True)
        raise KeyboardInterrupt


def test_a_process_that_was_stopped_starts_no_other_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "_stopped", False)
    first, second, *_ = runs_of(dataclasses.replace(COMPARISON, task=Stopped(), settings={}))
    for run in (first, second):
        with pytest.raises(KeyboardInterrupt):
            runs._train(run, tmp_path, "cpu")
    assert (tmp_path / first.path).with_suffix("").is_dir()
    assert not (tmp_path / second.path).with_suffix("").exists()


@pytest.mark.parametrize(("device", "method"), [("cpu", "forkserver"), ("cuda", "spawn")])
def test_no_worker_for_a_gpu_is_a_fork(device: str, method: str) -> None:
    """CUDA refuses forks of a process that has asked for it, and imports do."""
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {method}")
    with runs._workers(1, device) as pool:
        assert pool._mp_context.get_start_method() == method


WORKING = """
import os, time
from mhla_diffusion.comparison import runs
if __name__ == "__main__":
    with runs._workers(1, "cpu") as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        time.sleep(60)
"""


def test_workers_end_where_the_comparison_was_killed(tmp_path: Path) -> None:
    (tmp_path / "working.py").write_text(WORKING)
    with subprocess.Popen(
        [sys.executable, tmp_path / "working.py"], stdout=subprocess.PIPE, text=True
    ) as main:
        assert main.stdout is not None
        worker = psutil.Process(int(main.stdout.readline()))
        assert worker.is_running()
        main.kill()
    deadline = time.monotonic() + 30
    with contextlib.suppress(psutil.NoSuchProcess):
        while worker.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_results_keep_their_names() -> None:
    """As of when recall was the only task: a comparison that was begun then goes on."""
    task = Recall(side=16, distance="near", head_dim=16, steps=1200, batch_size=16, learning_rate=4e-3)
    assert str(Run(task, Variant("softmax", "softmax"), 2).path) == "softmax/2d231ee46b7c53fc.json"


def test_another_setting_is_another_run(tmp_path: Path) -> None:
    few = dataclasses.replace(COMPARISON, settings={"distance": ["near"]}, seeds=[0])
    compare_attention(few, tmp_path)
    assert len(records(COMPARISON, tmp_path)) == 2
    longer = dataclasses.replace(few, task=dataclasses.replace(TASK, steps=3))
    assert records(longer, tmp_path) == []


def of(variant: str, seed: int, accuracy: float, distance: str = "near") -> dict[str, Any]:
    task = dataclasses.replace(TASK, distance=distance).record
    return {
        "task": task, "variant": {"name": variant}, "seed": seed, "device": "cpu", "accuracy": accuracy,
        "seconds_per_step": 0.01, "parameters": 1000,
    }  # fmt: skip


def test_a_page_says_what_is_best_only_where_intervals_lie_apart(tmp_path: Path) -> None:
    found = [of("softmax", s, 0.9 + s / 100) for s in (0, 1)] + [
        of("linear", s, 0.1 + s / 100) for s in (0, 1)
    ]
    found += [of("softmax", s, 0.9 - s / 2, "far") for s in (0, 1)] + [
        of("linear", s, 0.4, "far") for s in (0, 1)
    ]
    text = write_page(COMPARISON, found, tmp_path, "mhla compare-attention").read_text()
    assert "Incomplete" not in text
    rows = [line for line in text.splitlines() if line.startswith("| softmax")]
    near, far = rows[0].split("|")[2:4]
    assert near.strip() == "**0.905 ± 0.064 (sd 0.007)**"
    assert "**" not in far
    assert json.loads((tmp_path / "tiny.json").read_text())["runs"] == found


def test_a_page_says_what_is_missing(tmp_path: Path) -> None:
    text = write_page(COMPARISON, [of("softmax", 0, 0.9)], tmp_path, "x").read_text()
    assert "**Incomplete: 1 of 8 runs are done.**" in text
    assert "0.900 (one seed) (1 seeds)" not in text
    assert "0.900 (one seed)" in text
    assert "| linear |  |  |" in text


def test_a_page_compares_runs_of_a_seed(tmp_path: Path) -> None:
    near = dataclasses.replace(COMPARISON, settings={"distance": ["near"]}, seeds=[0, 1, 2])
    # Seeds differ by .4 and variants by .1, so that means overlap and differences are apart from 0.
    starts = {"softmax": 0.5, "linear": 0.4}
    found = [of(name, seed, start + 0.2 * seed) for name, start in starts.items() for seed in near.seeds]
    text = write_page(near, found, tmp_path, "x").read_text()
    assert "| distance near, less | softmax | linear |" in text
    assert "| linear | **-0.100 [-0.100, -0.100]** |  |" in text
    assert "| softmax |  | **+0.100 [+0.100, +0.100]** |" in text
    found[-1] = of("linear", 2, 0.9)
    text = write_page(dataclasses.replace(near, against=["softmax"]), found[:-1], tmp_path, "x").read_text()
    assert "| linear | **-0.100 [-0.100, -0.100]** (2 seeds) |\n" in text
    text = write_page(dataclasses.replace(near, against=["softmax"]), found, tmp_path, "x").read_text()
    half = 4.302653 / math.sqrt(3) * statistics.stdev([-0.1, -0.1, 0.0])
    low, high = -0.2 / 3 - half, -0.2 / 3 + half
    assert f"| linear | -0.067 [{low:.3f}, +{high:.3f}] |\n" in text
    assert ", less" not in write_page(near, found[:4], tmp_path, "x").read_text(), "one seed has both"


def test_an_interval_is_students() -> None:
    interval = Interval.of([1.0, 2.0, 3.0])
    assert interval.mean == 2
    assert interval.half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-5)
    assert Interval.of([3.0]).half == math.inf
    assert not Interval.of([3.0]).is_above(Interval.of([1.0, 1.0]))


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ({"variants": [Variant("a"), Variant("a")]}, "names of their own"),
        ({"seeds": []}, "seeds must be one or more"),
        ({"seeds": [0, 1, 0]}, r"all different, got \[0, 1, 0\]"),
        ({"settings": {"sides": [4]}}, "unknown settings sides"),
        ({"settings": {"side": 4}}, "a list of one value or more"),
        ({"settings": {"side": [2]}}, "queries may be half"),
        ({"against": ["flash"]}, "against must name variants, which are softmax, linear, got flash"),
    ],
)
def test_a_comparison_that_cannot_be_is_refused(setting: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        dataclasses.replace(COMPARISON, **setting)
    with pytest.raises(ValueError, match="attention must be one of"):
        Variant("a", "flash")


@pytest.mark.parametrize("name", ["../a", "..", ".a", " ", "-a", "a/b", ""])
def test_a_variant_is_named_as_a_folder(name: str) -> None:
    with pytest.raises(ValueError, match="begins with a letter or digit"):
        Variant(name)


@pytest.mark.parametrize(
    ("attention", "mhla", "told"),
    [
        ("linear", {"blocks": [2, 2]}, "x: linear attention takes feature_map, .*, got blocks"),
        ("linear", {"cpe": "zero", "local": "shared"}, "x: linear attention takes .*, got local"),
        ("softmax", {"blocks": 4, "local": "shared"}, "x: softmax attention takes cpe, .* blocks, local"),
        ("softmax", {"feature_map": "hedgehog"}, "x: softmax attention takes cpe, .* got feature_map"),
        ("mhla", {"block": 4}, "x: unknown MHLA setting block"),
    ],
)
def test_settings_that_a_variant_would_not_have_are_refused(
    attention: str, mhla: dict[str, Any], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        Variant("x", attention, mhla)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"steps": "eight"}, "steps of the task recall must be an integer, got 'eight'"),
        ({"steps": 8.5}, "steps of the task recall must be an integer, got 8.5"),
        ({"learning_rate": "1e-3"}, "learning_rate of the task recall must be a number, got '1e-3'"),
        ({"distance": 3}, "distance of the task recall must be a text, got 3"),
    ],
)
def test_values_of_another_type_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        task_of(settings)
    with pytest.raises(ValueError, match=told):
        dataclasses.replace(COMPARISON, settings={name: [value] for name, value in settings.items()})
    assert task_of({"learning_rate": 1}).record["learning_rate"] == 1


def test_runs_of_what_was_screened_out_do_not_count(tmp_path: Path) -> None:
    near = dataclasses.replace(COMPARISON, settings={"distance": ["near"]}, seeds=[0, 1, 2])
    found = [of("softmax", 0, 0.9), *(of("linear", seed, 0.95) for seed in near.seeds)]
    (task,) = near.tasks()
    out = {(json.dumps(task.record, sort_keys=True), "linear"): 0.2}
    text = write_page(near, found, tmp_path, "mhla compare-attention", screened=out).read_text()
    assert "**Incomplete: 1 of 3 runs are done.**" in text
    assert "| linear |  |" in text
    assert "| 16 | linear | 0.200 |" in text
    assert json.loads((tmp_path / "tiny.json").read_text())["runs"] == found


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs/compare").glob("*.yaml")), ids=lambda path: path.name
)
def test_configs_can_be_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # bases are named from there

    def given(comparison: Comparison) -> Comparison:
        return comparison

    comparison = parse_and_call(given, ["--comparison", str(path)], "mhla")
    assert comparison.name == path.stem
    assert len(comparison.seeds) >= 3
    assert "compare-attention" in MHLA.commands


def test_a_page_has_the_time_and_the_most_memory_of_a_step_and_the_range_of_parameters(
    tmp_path: Path,
) -> None:
    found = [
        of("softmax", seed, 0.9) | {"seconds_per_step": s, "peak_bytes": mib * 2**20, "parameters": count}
        for seed, s, mib, count in ((0, 0.01, 100, 1000), (1, 0.02, 70, 2000))
    ]
    found.append(
        of("softmax", 0, 0.9, "far") | {"seconds_per_step": 0.06, "peak_bytes": 0, "parameters": 3000}
    )
    text = write_page(COMPARISON, found, tmp_path, "x").read_text()
    assert "| softmax | 20.0 | 100 | 1,000 to 3,000 |" in text


def test_a_page_says_that_one_run_is_missing(tmp_path: Path) -> None:
    found = [of(run.variant.name, run.seed, 0.9, run.task.record["distance"]) for run in runs_of(COMPARISON)]
    assert "**Incomplete: 7 of 8 runs" in write_page(COMPARISON, found[1:], tmp_path, "x").read_text()


@pytest.mark.parametrize("processes", [0, -1])
def test_fewer_than_one_process_is_refused_before_anything_is_written(processes: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"processes must be 1 or more, got {processes}"):
        compare_attention(COMPARISON, tmp_path / "runs", processes=processes)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_another_process_writes_to_is_refused(tmp_path: Path) -> None:
    with only_writer(tmp_path), pytest.raises(ValueError, match="another process is writing to"):
        compare_attention(COMPARISON, tmp_path)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many processes each pool is asked for. Runs are made in this one."""
    found: list[int] = []

    def workers(processes: int, device: str) -> ThreadPoolExecutor:
        found.append(processes)
        return ThreadPoolExecutor(1)

    monkeypatch.setattr(runs, "_workers", workers)
    return found


@dataclasses.dataclass(frozen=True)
class Known(Recall):
    """Task whose results are known: linear attention is far worse, and fails with the seed 7."""

    def train(self, variant: Variant, seed: int, folder: Path, device: str) -> dict[str, Any]:
        if variant.name == "linear" and seed == 7:
            raise FloatingPointError("the loss became nan")
        return {"accuracy": 0.9 if variant.name == "softmax" else 0.1}


def known(**settings: Any) -> Comparison:
    task = Known(**{**dataclasses.asdict(TASK), "steps": 8})
    return dataclasses.replace(COMPARISON, task=task, settings={}, **settings)


@pytest.mark.usefixtures("started")
def test_what_short_runs_show_to_be_beaten_is_not_run_over_all_seeds(tmp_path: Path) -> None:
    comparison = known(screen=Screen(share=0.25))
    found = compare_attention(comparison, tmp_path, screen=True)
    assert [(record["variant"]["name"], record["seed"]) for record in found] == [
        ("softmax", 0),
        ("softmax", 1),
    ]
    short = [json.loads((tmp_path / run.path).read_text()) for run in screening_runs(comparison).values()]
    assert [record["task"]["steps"] for record in short] == [2, 2]


@pytest.mark.usefixtures("started")
def test_a_run_that_fails_stops_no_other_and_is_told_of_in_the_end(tmp_path: Path) -> None:
    comparison = known(seeds=[7, 8])
    with pytest.raises(ValueError, match=r"1 runs failed, .* linear, seed 7: the loss became nan"):
        compare_attention(comparison, tmp_path)
    assert len(records(comparison, tmp_path)) == 3


@pytest.mark.usefixtures("started")
def test_what_fails_in_its_short_run_is_not_run_over_all_seeds(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1 runs failed, the others are done: linear, seed 7"):
        compare_attention(comparison := known(seeds=[7, 8]), tmp_path, screen=True)
    assert [record["variant"]["name"] for record in records(comparison, tmp_path)] == ["softmax"] * 2


@dataclasses.dataclass(frozen=True)
class Broken(Known):
    """Task whose linear attention fails as no setting makes it, and with many values ends its process."""

    def train(self, variant: Variant, seed: int, folder: Path, device: str) -> dict[str, Any]:
        if variant.name == "linear" and self.values == 99:
            os._exit(1)
        if variant.name == "linear":
            raise RuntimeError("out of memory")
        return super().train(variant, seed, folder, device)


@pytest.mark.usefixtures("started")
def test_an_error_of_one_run_is_that_of_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    comparison = dataclasses.replace(COMPARISON, task=Broken(**dataclasses.asdict(TASK)), settings={})
    with pytest.raises(ValueError, match=r"2 runs failed, .* linear, seed 0: out of memory"):
        compare_attention(comparison, tmp_path)
    assert len(records(comparison, tmp_path)) == 2
    assert "Traceback" in caplog.text


def test_a_process_that_was_killed_is_told_of_in_one_line(tmp_path: Path) -> None:
    task = Broken(**{**dataclasses.asdict(TASK), "values": 99})
    comparison = dataclasses.replace(COMPARISON, task=task, settings={})
    with pytest.raises(ValueError, match=r"was killed, .* take fewer --processes than 1"):
        compare_attention(comparison, tmp_path)


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    run = next(runs_of(COMPARISON))
    for damage in ('{"task": ', "[]", ""):
        (tmp_path / run.path).parent.mkdir(exist_ok=True)
        (tmp_path / run.path).write_text(damage)
        with pytest.raises(ValueError, match=rf"{run.path.name} is damaged: remove it"):
            records(COMPARISON, tmp_path)


def test_a_page_takes_the_place_of_none_but_its_own(tmp_path: Path) -> None:
    write_page(COMPARISON, [], tmp_path, "mhla")
    write_page(COMPARISON, [], tmp_path, "mhla")
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "other.json").write_text('{"results": []}')
    for name in ("README", "other"):
        with pytest.raises(ValueError, match=rf"{name}\..* is not of a comparison: choose another name"):
            write_page(dataclasses.replace(COMPARISON, name=name), [], tmp_path, "mhla")
    assert (tmp_path / "README.md").read_text() == "mine"
    for name in ("../a", "a/b", "", ".."):
        with pytest.raises(ValueError, match="the name of a comparison is that of a file"):
            dataclasses.replace(COMPARISON, name=name)


@pytest.mark.parametrize(("processes", "expected"), [(1, 1), (2, 2), (9, 4)])
def test_there_are_as_many_processes_as_are_asked_for_and_have_work(
    processes: int, expected: int, started: list[int], tmp_path: Path
) -> None:
    compare_attention(known(), tmp_path, processes=processes)
    assert started == [expected]


def test_all_are_compared_with_the_controls_or_the_first_where_there_is_none() -> None:
    assert COMPARISON.references == ["softmax", "linear"]
    assert Comparison("x", [Variant("a"), Variant("b")], TASK).references == ["a"]


def test_what_never_differs_has_an_interval_that_holds_no_difference_and_no_zero_has_a_sign() -> None:
    assert Interval.of([0.0, 0.0, 0.0]).holds(0)
    assert Interval.of([-1e-6, -1e-6]).difference_text() == "+0.000 [+0.000, +0.000]"
