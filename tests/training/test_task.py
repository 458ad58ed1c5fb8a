"""Sample sheets and the finished pipeline."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, PixArtSigmaPipeline
from PIL import Image

from mhla_diffusion import (
    MHLADiTPipeline,
    MHLADiTTransformer2DModel,
    MHLAPipeline,
    MHLAPixArtTransformer2DModel,
)
from mhla_diffusion.files.videos import open_video
from mhla_diffusion.training import ObjectiveConfig, SamplingConfig, TrainingTask, build_objective
from mhla_diffusion.training.conditioning import ClassLabels
from mhla_diffusion.training.sheets import SampleSheet, SheetClock
from tests.processes import run_script


@pytest.fixture
def model() -> MHLADiTTransformer2DModel:
    return MHLADiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=1, out_channels=1, num_layers=1,
        sample_size=8, patch_size=2, num_embeds_ada_norm=2, attention="linear",
    )  # fmt: skip


@pytest.fixture
def task() -> TrainingTask:
    pipeline = partial(MHLADiTPipeline, scheduler=build_objective(ObjectiveConfig()).scheduler())
    sampling = SamplingConfig(class_labels=(1, 0, 1), images_per_class=2, num_inference_steps=2)
    return TrainingTask(ClassLabels(["a", "b"], 2, 0.1), sampling, pipeline, "letters")


def test_the_sheet_has_a_row_for_each_class_and_is_the_same_each_time(
    model: MHLADiTTransformer2DModel, task: TrainingTask
) -> None:
    torch.nn.init.normal_(model.proj_out_2.weight)
    state = torch.get_rng_state()
    clock = SheetClock(1, 0.25, hidden=True)

    def draw() -> Image.Image:
        return task.sample(model, torch.device("cpu"), clock).picture()

    sheet, again = draw(), draw()
    assert torch.equal(torch.get_rng_state(), state)
    assert sheet.size == (2 * 8, 3 * 8)
    pixels = np.asarray(sheet)
    assert np.array_equal(pixels, np.asarray(again))
    assert np.array_equal(pixels[:8], pixels[16:]), "the same class and noise"
    task.sampling = replace(task.sampling, seed=1)
    assert not np.array_equal(pixels, np.asarray(draw()))


def test_the_pipeline_knows_what_it_was_trained_on(
    model: MHLADiTTransformer2DModel, task: TrainingTask, tmp_path: Path
) -> None:
    task.save_pipeline(model, tmp_path, {"data": "7 samples", "steps": "5"})
    training = MHLAPipeline.from_pretrained(tmp_path).config.training
    assert training == {"data": "letters, 7 samples of 2 classes", "steps": "5", "class dropout": 0.1}


def test_a_pipeline_of_diffusers_has_a_card_that_is_written_again_with_the_same_facts(
    task: TrainingTask, text_parts: dict[str, Any], tmp_path: Path
) -> None:
    model = MHLAPixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=1,
        sample_size=8, patch_size=2, caption_channels=4, cross_attention_dim=16, attention="linear",
    )  # fmt: skip
    scheduler = build_objective(ObjectiveConfig(name="ddpm")).scheduler()
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2)
    task.pipeline = lambda transformer, training: PixArtSigmaPipeline(
        **text_parts, vae=vae, transformer=transformer, scheduler=scheduler
    )
    task.save_pipeline(model, tmp_path, {"data": "7 samples", "steps": "5", "trained": "all weights"})
    card = (tmp_path / "README.md").read_text()
    for row in ("| data | letters, 7 samples of 2 classes |", "| steps | 5 |", "| prediction | epsilon |"):
        assert row in card
    assert "Trained: all weights, from scratch." in card
    assert run_script("card", "--model", tmp_path, "--license", "mit").returncode == 0
    again = (tmp_path / "README.md").read_text()
    assert "license: mit" in again
    assert "| steps | 5 |" in again
    assert isinstance(MHLAPipeline.from_pretrained(tmp_path), PixArtSigmaPipeline)


def test_a_sheet_of_videos_is_a_file_that_plays_and_a_picture_of_a_few_frames(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (480, 320), (3 * i, 0, 0)) for i in range(33)]
    sheet = SampleSheet([frames, frames[::-1]], fps=8)
    sheet.save(tmp_path / "step-1")
    assert Image.open(tmp_path / "step-1.png").size == (8 * 256, 2 * 171)
    video = open_video(tmp_path / "step-1.mp4")
    assert (video.num_frames, video.fps) == (33, 8)
    assert video.read([0]).shape == (1, 640, 480, 3)


def test_a_sheet_that_takes_more_than_its_share_says_so_after_its_first_step(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr("mhla_diffusion.training.sheets.time.perf_counter", lambda: now[0])
    clock = SheetClock(10, 0.25, hidden=False)
    for training in (1000.0, 10.0, 10.0):  # steps of a sheet take 3 seconds
        now[0] += training
        clock.start(20)
        now[0] += 3
        clock(None, 0, None, {})
        clock.end()
    (record,) = caplog.records
    assert "a sample sheet takes about 60 s, 86 % of the time" in record.message
    assert "set sampling.every to 180" in record.message
    assert "sample sheet" in capsys.readouterr().err
