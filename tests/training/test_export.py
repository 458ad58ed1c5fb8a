"""Checkpoints as pipelines."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mhla_diffusion import MHLAPipeline
from mhla_diffusion.commands.generate import load
from mhla_diffusion.evaluation import compare_reports, evaluate_images
from mhla_diffusion.pipelines.generation import generate_images
from mhla_diffusion.training.export import export_checkpoint, newest_model, open_checkpoint
from tests.extractors import quarters
from tests.processes import run_script

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def finished(run: Run, settings: dict[str, Any], tmp_path: Path) -> Path:
    """A run of 6 steps with checkpoints at 3 and 6, and a moving average that is not the last."""
    settings["trainer"]["ema_decay"] = 0.5
    result = run()
    assert result.returncode == 0, result.stdout
    return tmp_path / "run"


def weights(pipeline: Any) -> dict[str, torch.Tensor]:
    return pipeline.transformer.state_dict()


def test_a_checkpoint_is_exported_as_the_pipeline_that_its_run_leaves(finished: Path, tmp_path: Path) -> None:
    left = weights(MHLAPipeline.from_pretrained(finished / "pipeline"))
    result = run_script("export_checkpoint", "--run", finished, "--out", tmp_path / "last")
    assert result.returncode == 0, result.stderr
    last = MHLAPipeline.from_pretrained(tmp_path / "last")
    assert all(torch.equal(value, left[name]) for name, value in weights(last).items())
    assert last.labels == {"cat": 0, "dog": 1}

    export_checkpoint(finished, tmp_path / "first", checkpoint="step-00000003", weights="raw")
    first = MHLAPipeline.from_pretrained(tmp_path / "first")
    assert first.config.training["steps"] == "3 of batch size 8"
    settings = first.config.training["settings"]
    assert settings["trainer.optimizer.learning_rate"] == 0.01
    assert settings["trainer.max_steps"] == 6, "on which the cosine of its learning rates depends"
    assert not {"trainer.seed", "trainer.log_every", "output_dir", "data.path"} & set(settings)
    assert len(first.config.training["data fingerprint"]) == 64
    assert "not averaged" in first.config.training["weights"]
    averaged = weights(open_checkpoint(finished / "checkpoints" / "step-00000003"))
    assert not torch.equal(weights(first)["proj_out_2.weight"], averaged["proj_out_2.weight"])


def test_the_folder_of_a_run_is_a_model_its_newest(finished: Path, tmp_path: Path) -> None:
    assert newest_model(finished) == finished / "pipeline"
    command = ["generate", "image", "--model", finished, "--num", "2", "--steps", "2"]
    result = run_script(*command, "--out", tmp_path / "made")
    assert result.returncode == 0, result.stderr
    assert f"{finished}: taking {finished / 'pipeline'}" in result.stderr
    last = finished / "checkpoints" / "step-00000006"
    os.utime(last, (4e9, 4e9))
    assert newest_model(finished) == last
    result = run_script(*command, "--out", tmp_path / "of-checkpoint")
    assert result.returncode == 0, result.stderr
    files = [(tmp_path / name / "000000.png").read_bytes() for name in ("made", "of-checkpoint")]
    assert files[0] == files[1]
    assert load(str(last), "float32", "images").config.training["steps"] == "6 of batch size 8"


def test_what_cannot_be_exported_is_named(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no checkpoint 'step-9'; it has step-00000003, step-00000006"):
        export_checkpoint(finished, tmp_path / "out", checkpoint="step-9")
    with pytest.raises(ValueError, match="is no output folder of a training"):
        export_checkpoint(tmp_path / "images", tmp_path / "out")
    (finished / "checkpoints" / "step-00000003" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"is damaged: model\.safetensors; take another one"):
        export_checkpoint(finished, tmp_path / "out", checkpoint="step-00000003")
    assert not (tmp_path / "out").exists()


def test_means_are_over_trainings_that_differ_in_their_seed_alone(
    finished: Path, run: Run, image_folder: Path, tmp_path: Path
) -> None:
    """From training over generation and scores to the comparison, through manifests."""

    def score(model: Path, seed: int = 0) -> Path:
        name = f"{model.name}-{seed}"
        pipeline = MHLAPipeline.from_pretrained(model / "pipeline")
        made = generate_images(
            pipeline, tmp_path / name, num_images=6, seed=seed, num_inference_steps=2
        ).parent
        report = evaluate_images(image_folder, made, extractor=quarters(), metrics=["frechet"], bootstrap=0)
        report.save(tmp_path / f"report-{name}")
        return tmp_path / f"report-{name}"

    for name, rate in (("seed", "0.01"), ("rate", "0.02")):
        options = ["--trainer.seed", "1", "--trainer.optimizer.learning_rate", rate]
        assert run("--output_dir", str(tmp_path / name), *options).returncode == 0
    first, seed = score(finished), score(tmp_path / "seed")
    (group,) = compare_reports([first, seed]).groups
    assert (group.averaged, group.reason) == (True, "that differ in the seed of the training (0, 1)")
    table = compare_reports([first, score(tmp_path / "rate")])
    assert [group.averaged for group in table.groups] == [False, False]
    assert table.made_differently["training.settings.trainer.optimizer.learning_rate"] == ["0.01", "0.02"]
    (group,) = compare_reports([first, score(finished, seed=6)]).groups
    assert (group.averaged, group.reason) == (True, "of one model, whose samples have other seeds")
    (group,) = compare_reports([first, score(finished, seed=5)]).groups
    assert not group.averaged
    assert "have 1 seeds in common" in str(group.flaw)


def test_every_checkpoint_is_scored_by_one_command_which_goes_on(
    finished: Path, image_folder: Path, tmp_path: Path
) -> None:
    command = ["evaluate", "steps", "--run", finished, "--real", image_folder, "--out", tmp_path / "steps"]
    options = ["--num", "4", "--num_inference_steps", "2", "--metrics", "frechet", "--bootstrap", "0"]
    result = run_script(*command, *options)
    assert result.returncode == 0, result.stderr
    table = (tmp_path / "steps" / "comparison.md").read_text()
    assert "| score | step-00000003 | step-00000006 |" in table
    assert (tmp_path / "steps" / "step-00000003" / "report" / "report.html").is_file()
    again = run_script(*command, *options)
    assert again.returncode == 0, again.stderr
    assert "step-00000006 is scored already" in again.stderr
    run = tmp_path / "retrained"
    shutil.copytree(finished, run)
    first, last = (run / "checkpoints" / f"step-0000000{step}" for step in (3, 6))
    shutil.rmtree(last)
    shutil.copytree(first, last)
    (tmp_path / "steps" / "settings.json").write_text(
        (tmp_path / "steps" / "settings.json").read_text().replace(str(finished), str(run))
    )
    command[3] = run
    trained_anew = run_script(*command, *options)
    assert trained_anew.returncode == 1
    assert "step-00000006/report is of other weights than" in trained_anew.stderr
    other = run_script(*command, *options[2:])
    assert other.returncode == 1
    assert "holds other scores; choose another --out: num: 4 -> 1000" in other.stderr
