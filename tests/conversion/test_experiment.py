"""The experiment on what conversion loses, and what is found by it."""

from __future__ import annotations

import faulthandler
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mhla_diffusion.conversion import experiment as experiments
from mhla_diffusion.conversion.experiment import ExperimentConfig, experiment
from mhla_diffusion.conversion.findings import findings, table
from mhla_diffusion.conversion.job import AlignConfig
from mhla_diffusion.evaluation.networks import images as networks
from tests.extractors import quarters
from tests.faults.test_processes import join

MODEL = {
    "sample_size": 8, "patch_size": 2, "in_channels": 1, "num_layers": 2, "num_attention_heads": 2,
    "attention_head_dim": 8, "num_embeds_ada_norm": 2, "attention": "softmax",
}  # fmt: skip


def run_late(rank: int, config: ExperimentConfig) -> None:
    """Run with a second process that comes when the first has written the student."""
    faulthandler.dump_traceback_later(200, exit=True)  # where one waits for the other for ever
    join(rank)
    networks._efficientnet_lite0 = quarters
    assembled, student = experiments.assemble, Path(config.out) / "seed-0" / "all-MHLA" / "student"

    def assemble(*arguments: Any, **settings: Any) -> Any:
        start, last = assembled(*arguments, **settings), time.monotonic() + 60
        while rank == 1 and not student.is_dir() and time.monotonic() < last:
            time.sleep(0.05)
        return start

    experiments.assemble = assemble
    for content in (experiment(config), experiment(config)):
        (teacher, row) = content["results"]
        assert (teacher["variant"], row["variant"]) == ("teacher", "all MHLA")
        assert row["scores"][0]["name"] == "fd_quarters"
    faulthandler.cancel_dump_traceback_later()


def test_a_process_that_comes_late_does_what_the_first_does(
    write_run: Callable[..., Path],
    image_folder: Path,
    run_processes: Callable[..., None],
    tmp_path: Path,
) -> None:
    forms = tmp_path / "forms.yaml"
    forms.write_text("linear: {blocks: 1}\nmhla: {blocks: 4}\nmhla-local: {blocks: 4, local: shared}\n")
    config = ExperimentConfig(
        teacher=str(write_run(model=MODEL)), out=str(tmp_path / "out"), height=8, width=8, vae_stride=1,
        candidates=str(forms), seeds=(0,), variants=("all MHLA",), steps=1, calls=1, check=0,
        align=AlignConfig(samples=2, held_out=1, steps=1, batch_size=1),
        num_samples=4, real=str(image_folder), extractor="efficientnet_lite0",
    )  # fmt: skip
    run_processes(run_late, 2, config)


def test_the_experiment_compares_every_variant_and_goes_on(
    write_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forms = tmp_path / "forms.yaml"
    forms.write_text("linear: {blocks: 1}\nmhla: {blocks: 4}\nmhla-local: {blocks: 4, local: shared}\n")
    config = ExperimentConfig(
        teacher=str(write_run(model=MODEL)), out=str(tmp_path / "out"), height=8, width=8, vae_stride=1,
        candidates=str(forms), seeds=(0, 1), align=AlignConfig(samples=2, held_out=1, steps=1, batch_size=1),
        steps=1, calls=1,
    )  # fmt: skip
    content = experiment(config)
    assert len(content["results"]) == 2 * 8
    distilled = {(its["seed"], its["variant"]): its["distilled_as"] for its in content["results"]}
    assert distilled[0, "all MHLA"] == "all MHLA"
    assert sum(distilled[0, f"half, {name}"] == "half, chosen" for name in ("chosen", *PATTERNS)) == 2
    assert all(record["ratio"]["value"] > 0 for record in content["results"])
    half = [record for record in content["results"] if record["variant"].startswith("half")]
    assert {record["forms"].count("mhla") for record in half} == {1}, "at equal cost"
    lines = (tmp_path / "out" / "results.md").read_text().splitlines()
    assert "1 steps of distillation, 25 % of the teacher's; seeds 0, 1" in lines[0]
    variants = {record["variant"] for record in content["results"]}
    assert all(len([line for line in lines if line.startswith(f"| {name} |")]) == 2 for name in variants)
    chosen = json.loads((tmp_path / "out" / "seed-1" / "chosen.json").read_text())
    assert chosen["chosen"]["measured"] > 0, "on the assembled model"
    assert [len(found["seeds"]) for found in content["findings"].values()] == [2] * 9
    monkeypatch.setattr("mhla_diffusion.conversion.experiment.distil", lambda *_: pytest.fail("done already"))
    assert experiment(config) == content
    for changes, message in (
        ({"learning_rate": 0.5}, r"learning_rate: 0\.0001 -> 0\.5"),
        (
            {"teacher": str(write_run(model={**MODEL, "dropout": 0.5}))},
            r"teacher: model\.dropout: None -> 0\.5",
        ),
    ):
        with pytest.raises(ValueError, match=rf"out holds an experiment with other .*\n  {message}"):
            experiment(replace(config, **changes))
    write_run(model=MODEL)
    assert "sampling" not in content
    check_that_scores_complete(config, content, monkeypatch, tmp_path)


def check_that_scores_complete(
    config: ExperimentConfig, content: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An experiment that is finished is scored without training, and what was scored is not scored again."""
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8), dtype=np.uint8)
        folder = tmp_path / "held-out" / ("cat" if number % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    held_out = {"data.path": str(tmp_path / "held-out")}
    wanted = replace(config, num_samples=4, num_real=5, held_out=held_out, extractor="efficientnet_lite0")
    monkeypatch.setattr(networks, "_efficientnet_lite0", quarters)
    with pytest.raises(ValueError, match="at most the 6 held-out samples, got 7"):
        experiment(replace(wanted, num_real=7))
    scored = experiment(replace(wanted, scored=("half, chosen",)))
    teacher, *rows = scored["results"]
    assert [its["scores"][0]["name"] for its in rows if "scores" in its] == ["fd_quarters"] * 2
    assert teacher["scores"][0]["interval"][1] > teacher["scores"][0]["value"] > 0
    assert [{k: v for k, v in its.items() if k != "scores"} for its in rows] == content["results"]
    assert list(scored["findings"])[-1] == "half of the layers: fd_quarters within the teacher's interval"
    assert scored["sampling"]["num_real"] == 5
    assert len(list((tmp_path / "out").glob("real-*"))) == 1, "one store"
    more = replace(wanted, scored=("half, chosen", "all linear"))
    everything = experiment(more)
    assert {its["variant"] for its in everything["results"] if "scores" in its} == {"teacher", *more.scored}
    monkeypatch.setattr(
        "mhla_diffusion.conversion.scores.scores", lambda *_, **__: pytest.fail("done already")
    )
    assert experiment(more) == everything


PATTERNS = ("every second", "every second from the first")


def made_up_results(losses: dict[str, tuple[float, float]]) -> dict[str, Any]:
    def record(seed: int, variant: str, value: float) -> dict[str, Any]:
        return {
            "seed": seed, "variant": variant, "error": value, "before": 2 * value,
            "ratio": {"value": 1 + value}, "by_time": [2 + 2 * value] * 10, "teacher_by_time": [2.0] * 10,
        }  # fmt: skip

    results = [record(seed, name, pair[seed]) for name, pair in losses.items() for seed in (0, 1)]
    return {
        "size": "8 x 8 pixels", "steps": 5, "teacher_steps": 100, "seeds": [0, 1], "results": results,
    }  # fmt: skip


LOSSES = {
    "half, chosen": (0.004, 0.006),
    "half, every second": (0.014, 0.026),
    "half, every second from the first": (0.014, 0.006),
    "half, chosen, not aligned": (0.008, 0.030),
    "all local": (0.04, 0.05),
    "all MHLA": (0.06, 0.07),
    "all MHLA, not aligned": (0.08, 0.08),
    "all linear": (0.075, 0.080),
}


def test_findings_are_means_over_seeds_beside_what_was_wanted() -> None:
    found = list(findings(made_up_results(LOSSES)).values())
    assert [its["value"] for its in found] == pytest.approx(
        [0.005, 0.045, 0.0125, 0.015, 0.005, -0.0045, 0.65, 0.025, 0.1875]
    )
    assert [its["met"] for its in found] == [None] * 9, "intervals of two seeds hold every limit"
    # Student's t of one degree of freedom, 12.706, times the standard error, 0.001.
    assert found[0]["interval"] == pytest.approx([0.005 - 0.012706, 0.005 + 0.012706], abs=1e-6)
    assert found[2]["wanted"]["more than"] == pytest.approx(0.01), "the larger spread, of MHLA"


def test_the_interval_decides_whether_a_wish_is_met() -> None:
    name = "half of the layers: loss within 1%"
    for losses, met in (((0.0050, 0.0051), True), ((0.020, 0.0201), False), ((0.004, 0.006), None)):
        assert findings(made_up_results({"half, chosen": losses}))[name]["met"] is met
    name = "chosen layers: loss of every second less theirs"
    for losses, met in (((0.0060, 0.0061), True), ((0.001, 0.0011), False), ((0.004, 0.007), None)):
        rows = {"half, chosen": (0.0050, 0.0051), "half, every second": losses}
        assert findings(made_up_results(rows))[name]["met"] is met
    one = made_up_results({"half, chosen": (0.005, 0.005)})
    one["results"] = one["results"][:1]
    (found,) = findings(one).values()
    assert (found["interval"], found["met"]) == (None, None), "one seed says nothing"
    assert table({**one, "findings": {"a wish": found}}).endswith("| - | 0.0050 | open |\n")


def test_half_of_the_layers_are_wished_within_the_teachers_score() -> None:
    content = made_up_results(LOSSES)
    for record in content["results"]:
        if record["variant"] == "half, chosen":
            record["scores"] = [{"name": "fid", "value": 10.0 + record["seed"] / 10}]
    scores = [{"name": "fid", "value": 9.0, "interval": [8.0, 10.2]}]
    teacher: dict[str, Any] = {
        "seed": None,
        "variant": "teacher",
        "error": 0.0,
        "before": 0.0,
        "ratio": {"value": 1.0},
    }
    content["results"].insert(0, {**teacher, "scores": scores})
    found = findings(content)["half of the layers: fid within the teacher's interval"]
    assert (found["value"], found["wanted"], found["met"]) == (10.05, {"most": 10.2}, None)
    teacher["scores"] = [{**scores[0], "interval": [8.0, 10.7]}]
    content["results"][0] = teacher
    assert findings(content)["half of the layers: fid within the teacher's interval"]["met"]
    lines = table({**content, "findings": findings(content)}).splitlines()
    assert lines[2].endswith("| before distillation | fid |")
    assert lines[4] == "| teacher | 1.0000 | 0.0000 | 0.0000 | 9.00 (8.00 to 10.70) |"
    assert lines[5].startswith("| half, chosen | 1.0050 ± 0.0127 | 0.0050 ± 0.0127 |")
    assert lines[5].endswith("| 10.05 ± 0.64 |")
    assert lines[6].endswith("| - |"), "not scored"
    assert f"| all local |{' 1.045 |' * 10}" in lines
    assert lines[-1].endswith("| most 10.7 | 10.0500 | 9.4147 to 10.6853 | 10.0000, 10.1000 | yes |")
