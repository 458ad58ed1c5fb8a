"""The commands one after the other, as a user types them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mhla_diffusion import MHLAPipeline
from mhla_diffusion.commands import align, choose, experiment, linearize, report
from mhla_diffusion.commands.end import exit_code
from mhla_diffusion.conversion import load_candidates
from mhla_diffusion.conversion.experiment import FORMS, ExperimentConfig
from mhla_diffusion.training.config import parse_config
from mhla_diffusion.training.export import read_run_config

STEPS = [
    *("--settings.samples", "3", "--settings.held_out", "2", "--settings.steps", "2"),
    *("--settings.batch_size", "1", "--settings.evaluate_every", "1"),
]


def test_align_choose_and_report(
    stored_teacher: Path, write_run: Callable[..., Path], tmp_path: Path
) -> None:
    sampling = {"class_labels": [0], "images_per_class": 1, "num_inference_steps": 2}
    data, teacher = str(write_run(sampling=sampling)), str(stored_teacher)
    forms, out, student = tmp_path / "forms.yaml", str(tmp_path / "aligned"), str(tmp_path / "student")
    forms.write_text("mhla: {blocks: 4}\n")
    align.main(
        ["--model", teacher, "--data", data, "--out", out, "--candidates", str(forms), *STEPS], "mhla align"
    )
    size = ["--height", "64", "--width", "64", "--vae_stride", "1", "--data", data]
    choose.main(["--aligned", out, "--budget", "0.8", "--out", student, *size], "mhla choose")
    assert MHLAPipeline.from_pretrained(student).transformer.layer_attention.count("mhla") >= 1
    page = ["--teacher", teacher, "--students", f"[{student}]", "--out", str(tmp_path / "report")]
    report.main([*page, *size, "--settings.calls", "1"], "mhla report conversion", "conversion")
    content = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [model["name"] for model in content["models"]] == ["teacher", "student, plain", "student"]


def test_a_budget_that_no_choice_meets_says_the_nearest(
    stored_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "aligned")
    align.main(["--model", str(stored_teacher), "--data", "noise", "--out", out, *STEPS], "mhla align")
    arguments = [
        *("--aligned", out, "--budget", "0.01", "--out", str(tmp_path / "student"), "--data", "noise"),
        *("--height", "64", "--width", "64", "--vae_stride", "1"),
    ]
    assert exit_code(lambda: choose.main(arguments, "mhla choose")) == 1
    message = capsys.readouterr().err
    assert "error: no choice costs 0.01 or less of the teacher's self-attention; the nearest costs" in message
    assert not (tmp_path / "student").exists()


def test_a_plan_on_paper(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", "configs/conversion/linearize_wan_1.3b_480p.yaml", "--plan_only", "true"]
    assert linearize.main(arguments, "mhla linearize") == 0
    printed = capsys.readouterr().out
    assert "Wan2.1-1.3B, 480 x 832 pixels, 81 frames: 1.42 B parameters" in printed
    assert "GPU-hours" in printed


def test_a_plan_is_of_the_batch_size_of_the_run(
    stored_teacher: Path, write_run: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    planned = ("--model", str(stored_teacher), "--out", str(tmp_path / "out"), "--plan_only", "true")
    size = ("--height", "64", "--width", "64", "--vae_stride", "1", "--settings.steps", "100000")
    printed = []
    for data, more in (
        (str(write_run()), ()),
        (str(write_run()), ("--settings.batch_size", "4")),
        ("noise", ()),
    ):
        assert linearize.main([*planned, *size, "--data", data, *more], "mhla linearize") == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != printed[2]


def test_an_experiment_needs_all_forms(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    forms = tmp_path / "forms.yaml"
    forms.write_text("mhla: {blocks: 4}\n")
    arguments = [
        *("--teacher", str(write_run()), "--out", str(tmp_path / "out"), "--height", "8", "--width", "8"),
        *("--candidates", str(forms)),
    ]
    with pytest.raises(ValueError, match="has mhla and lacks linear, mhla-local"):
        experiment.main(arguments, "mhla experiment conversion", "conversion")


CONFIGS = Path(__file__).parents[2] / "configs" / "conversion"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_in_the_repository_is_valid(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = path.stem.partition("_")[0]
    monkeypatch.chdir(CONFIGS.parents[1])
    if kind == "candidates":
        assert set(load_candidates(path)) == set(FORMS)
    elif kind == "linearize":
        assert linearize.main(["--config", str(path), "--plan_only", "true"], "mhla linearize") == 0
        assert "GPU-hours" in capsys.readouterr().out
        data = yaml.safe_load(path.read_text())["data"]
        assert data.startswith("samples") or read_run_config(data)
    elif kind == "experiment":
        config, _ = parse_config(ExperimentConfig, ["--config", str(path)])
        assert set(load_candidates(config.candidates)) == set(FORMS)
        run: Any = read_run_config(config.teacher)
        assert run.model.attention == "softmax"
        assert config.steps <= 0.05 * run.trainer.max_steps
    else:
        pytest.fail(f"no command takes {path.name}")
