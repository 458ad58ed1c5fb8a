"""scripts/train_image.py as a user runs it: whole runs in processes of their own."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from mhla_diffusion import MHLAPipeline
from mhla_diffusion.pipelines.identity import training_of
from mhla_diffusion.training.data.stream import BatchShare, StreamSampler
from mhla_diffusion.training.launcher import warn_of_idle_cores
from tests.processes import Script
from tests.weights import weights

Run = Callable[..., subprocess.CompletedProcess[str]]
Losses = Callable[[Path], list[float]]


def check_same_weights(first: Path, second: Path) -> None:
    expected = weights(first)
    actual = weights(second)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.fixture
def whole(run: Run, tmp_path: Path) -> Path:
    """An uninterrupted run."""
    output_dir = tmp_path / "whole"
    result = run("--output_dir", str(output_dir))
    assert result.returncode == 0, result.stdout
    return output_dir


def test_a_run_leaves_a_pipeline_that_generates(whole: Path, losses: Losses) -> None:
    values = losses(whole)
    assert len(values) == 6
    assert all(math.isfinite(value) for value in values)
    pipeline = MHLAPipeline.from_pretrained(whole / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    (image,) = pipeline("dog", num_inference_steps=2).images
    assert (image.size, image.mode) == ((8, 8), "L")
    mixing = [value for name, value in weights(whole).items() if name.endswith(".mixing")]
    assert mixing
    assert all(0 <= value.min() <= value.max() <= 1 for value in mixing)
    card = (whole / "pipeline" / "README.md").read_text()
    assert "| steps | 6 of batch size 8 |" in card
    assert "| transparent pixels | on white |" in card


def test_a_resumed_run_is_the_uninterrupted_run_to_the_bit(
    whole: Path, run: Run, losses: Losses, tmp_path: Path
) -> None:
    # Step 3 is in the middle of the second epoch of 20 images.
    branch = tmp_path / "branch"
    result = run("--output_dir", str(branch), "--resume", str(whole / "checkpoints" / "step-00000003"))
    assert result.returncode == 0, result.stdout
    lines = [json.loads(line) for line in (branch / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 5, 6]
    assert [line["loss"] for line in lines] == losses(whole)[3:]
    check_same_weights(whole, branch)
    # Into a folder that holds something else it does not branch.
    checkpoint, before = whole / "checkpoints" / "step-00000003", sorted(branch.rglob("*"))
    result = run("--output_dir", str(branch), "--resume", str(checkpoint))
    assert result.returncode != 0
    assert f"{branch} holds another run than {checkpoint}: choose an empty --output_dir" in result.stdout
    assert sorted(branch.rglob("*")) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_saves_and_the_run_goes_on_to_the_bit(
    number: signal.Signals,
    write_settings: Callable[[], Path],
    run: Run,
    losses: Losses,
    settings: dict[str, Any],
    tmp_path: Path,
) -> None:
    settings["trainer"] |= {"max_steps": 100, "checkpoint_every": 1000}
    stopped = tmp_path / "stopped"
    script = Script("train_image", "--config", write_settings(), "--output_dir", stopped)
    assert script.says("step 2 ")
    script.send(number)
    result = script.finish(timeout=120)
    assert result.returncode == 128 + number, result.stdout + result.stderr
    assert f"stopped by {number.name}: --resume latest goes on" in result.stdout + result.stderr
    (checkpoint,) = (stopped / "checkpoints").glob("step-*")
    step = int(checkpoint.name.removeprefix("step-"))
    assert 2 <= step < 100
    if number == signal.SIGTERM:
        uninterrupted = tmp_path / "uninterrupted"
        for folder in (stopped, uninterrupted):  # one command for both
            assert run("--output_dir", str(folder), "--resume", "auto").returncode == 0
        assert losses(stopped) == losses(uninterrupted)
        check_same_weights(stopped, uninterrupted)


def test_two_processes_give_the_losses_of_one(whole: Path, run: Run, losses: Losses, tmp_path: Path) -> None:
    pair = tmp_path / "pair"
    result = run("--output_dir", str(pair), "--trainer.checkpoint_every", "6", num_processes=2)
    assert result.returncode == 0, result.stdout
    assert losses(pair) == pytest.approx(losses(whole), rel=1e-4)
    states = [
        torch.load(path, weights_only=False)["torch_manual_seed"]
        for path in sorted(pair.glob("checkpoints/*/random_states_*.pkl"))
    ]
    assert len(states) == 2
    assert not torch.equal(*states)  # or both would drop the same units


def test_accumulated_micro_batches_give_the_losses_of_one_batch(
    whole: Path, run: Run, losses: Losses, tmp_path: Path
) -> None:
    split = tmp_path / "split"
    result = run("--output_dir", str(split), "--trainer.gradient_accumulation_steps", "4")
    assert result.returncode == 0, result.stdout
    assert losses(split) == pytest.approx(losses(whole), rel=1e-4)


def test_a_run_goes_on_in_other_micro_batches(whole: Path, run: Run, tmp_path: Path) -> None:
    """From step 3, which is no multiple of them."""
    split, checkpoint = tmp_path / "split", whole / "checkpoints" / "step-00000003"
    changed = ("--trainer.gradient_accumulation_steps", "2")
    result = run("--output_dir", str(split), "--resume", str(checkpoint), *changed)
    assert result.returncode == 0, result.stdout
    found, wanted = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (split, whole)
    )
    assert [line["step"] for line in found] == [4, 5, 6]
    for key in ("loss", "grad_norm"):  # else a step has micro-batches of another
        assert [line[key] for line in found] == pytest.approx([its[key] for its in wanted[3:]], rel=1e-3)


def test_a_longer_run_says_what_becomes_of_its_schedule(
    run: Run, write_settings: Callable[[], Path], settings: dict[str, Any], tmp_path: Path
) -> None:
    settings["trainer"]["optimizer"] = {"learning_rate": 0.01, "schedule": "cosine"}
    settings["trainer"]["max_steps"] = 2
    write_settings()
    settings["trainer"] |= {"checkpoint_every": 1, "keep_checkpoints": 4}
    write_settings()
    out = ("--output_dir", str(tmp_path / "cosine"))
    assert run(*out).returncode == 0
    longer = run(*out, "--resume", "latest", "--trainer.max_steps", "4")
    assert longer.returncode == 0, longer.stdout
    said = "trainer.max_steps was 2 and is 4: the schedule cosine goes on as one of 4 steps"
    assert f"{said}, at a rate of 0.005 after one of 0;" in longer.stdout
    before, after = (
        load_file(tmp_path / "cosine" / "checkpoints" / f"step-{step:08d}" / "model.safetensors")
        for step in (2, 3)
    )
    moved = max((after[name] - weight).abs().max().item() for name, weight in before.items())
    assert 0.002 < moved < 0.02, "by the rate of the longer schedule, not by that of an end"
    pipeline = MHLAPipeline.from_pretrained(tmp_path / "cosine" / "pipeline")
    assert training_of(pipeline)["settings"]["trainer.max_steps"] == 4


def test_what_cannot_go_on_is_refused_before_any_work(whole: Path, run: Run, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    again = run("--output_dir", str(whole))
    assert again.returncode == 1
    assert "is not empty: go on with --resume latest, or choose another --output_dir" in again.stdout
    arguments = ["--trainer.optimizer.learning_rate", "0.5", "--model.num_layers", "2"]
    changed = run("--output_dir", str(whole), "--resume", "latest", *arguments)
    assert changed.returncode == 1
    assert "trainer.optimizer.learning_rate: 0.01 -> 0.5" in changed.stdout
    assert "model.num_layers: 1 -> 2" in changed.stdout
    assert (
        "begin another run from these weights: another --output_dir, and --model.init_from" in changed.stdout
    )
    for resume in ("latest", "step-00000006"):
        ended = run("--output_dir", str(whole), "--resume", resume, "--trainer.max_steps", "5")
        assert "step-00000006 is beyond trainer.max_steps 5: give 6 or more" in ended.stdout
    unknown = run("--output_dir", str(whole), "--resume", "step-00000004")
    assert "step-00000004 is no checkpoint: give 'latest', 'auto', one of " in unknown.stdout
    assert "(step-00000003, step-00000006)" in unknown.stdout
    nothing = run("--output_dir", str(tmp_path / "new"), "--resume", "latest")
    assert "has no checkpoint to resume from; start with --resume auto" in nothing.stdout
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def break_images(folder: Path, indices: Iterable[int]) -> list[Path]:
    """Cut files of the folder short, by their number in the data."""
    files = sorted(folder.rglob("*.png"))
    broken = [files[index] for index in indices]
    for path in broken:
        path.write_bytes(path.read_bytes()[:40])
    return broken


def test_truncated_images_are_named_skipped_and_counted_also_of_before_a_resume(
    run: Run, image_folder: Path, tmp_path: Path
) -> None:
    broken = break_images(image_folder, range(10, 14))
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    result = run("--output_dir", str(whole))
    assert result.returncode == 0, result.stdout
    assert all(str(path) in result.stdout for path in broken)
    # In another place, where messages are others; its one step meets no more than 8 of the 20.
    moved = image_folder.rename(tmp_path / "moved")
    checkpoint = str(whole / "checkpoints" / "step-00000003")
    changed = ("--resume", checkpoint, "--trainer.max_steps", "4", "--data.path", str(moved))
    again = run("--output_dir", str(resumed), *changed)
    assert again.returncode == 0, again.stdout
    for folder, output in ((whole, result.stdout), (resumed, again.stdout)):
        assert output.count("4 samples could not be read and were skipped") == 1
        config = MHLAPipeline.from_pretrained(folder / "pipeline").config
        assert config.training["unreadable samples"] == 4


def test_what_another_process_could_not_read_is_counted(run: Run, image_folder: Path, tmp_path: Path) -> None:
    source = mock.Mock(buckets=None, __len__=lambda _: 20)
    first, second = (
        [index for _, index in next(iter(StreamSampler(source, BatchShare(8, 2, i), range(1), seed=0)))]
        for i in range(2)
    )
    # None that process 0 would take in the place of its own.
    others = [index for index in second if index - 1 not in first][:2]
    assert others
    broken = break_images(image_folder, others)
    result = run("--output_dir", str(tmp_path / "run"), "--trainer.max_steps", "1", num_processes=2)
    assert result.returncode == 0, result.stdout
    assert all(str(path) in result.stdout for path in broken)
    config = MHLAPipeline.from_pretrained(tmp_path / "run" / "pipeline").config
    assert config.training["unreadable samples"] == len(broken)


def test_ddpm_in_bf16_with_samples_and_tensorboard(
    run: Run, settings: dict[str, Any], tmp_path: Path
) -> None:
    settings["objective"] = {"name": "ddpm"}
    settings["trainer"] |= {
        "mixed_precision": "bf16",
        "trackers": ["tensorboard"],
        "gradient_checkpointing": True,
    }
    settings["sampling"]["every"] = 3
    output_dir = tmp_path / "run"
    result = run("--output_dir", str(output_dir))
    assert result.returncode == 0, result.stdout
    pipeline = MHLAPipeline.from_pretrained(output_dir / "pipeline")
    assert pipeline.config.prediction_type == "epsilon"
    assert pipeline.transformer.out_channels == 2
    assert sorted(path.name for path in (output_dir / "samples").iterdir()) == [
        "step-00000003.png",
        "step-00000006.png",
    ]
    assert list((output_dir / "logs").rglob("events.out.tfevents.*"))


def test_a_sheet_that_fails_costs_no_step(
    run: Run, settings: dict[str, Any], losses: Losses, tmp_path: Path
) -> None:
    settings["sampling"]["every"] = 2
    output_dir, others = tmp_path / "run", tmp_path / "others"
    in_the_way = output_dir / "samples" / "step-00000004.png"
    assert run("--output_dir", str(output_dir), "--trainer.max_steps", "2").returncode == 0
    in_the_way.mkdir()
    resumed = ("--output_dir", str(output_dir), "--resume", "latest")
    result = run(*resumed, "--trainer.checkpoint_every", "100")
    assert result.returncode != 0
    assert "step-00000004" in result.stdout.splitlines()[-1]
    assert (output_dir / "checkpoints" / "step-00000004").is_dir()
    in_the_way.rmdir()
    assert run(*resumed).returncode == 0
    assert run("--output_dir", str(others)).returncode == 0
    assert losses(output_dir) == losses(others)


def test_a_run_on_fewer_threads_than_cores_says_how_to_use_them(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    warn_of_idle_cores(num_processes=8)
    assert not caplog.text
    warn_of_idle_cores(num_processes=2)
    assert "training on 2 of 8 cores: accelerate launch --num_cpu_threads_per_process 4" in caplog.text
