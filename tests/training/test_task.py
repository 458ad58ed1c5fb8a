"""Sample sheets and the finished pipeline."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from mhla_diffusion import MHLADiTPipeline, MHLADiTTransformer2DModel, MHLAPipeline
from mhla_diffusion.training import ObjectiveConfig, SamplingConfig, TrainingTask, build_objective
from mhla_diffusion.training.conditioning import ClassLabels


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
    sheet, again = (task.sample(model, torch.device("cpu")) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert sheet.size == (2 * 8, 3 * 8)
    pixels = np.asarray(sheet)
    assert np.array_equal(pixels, np.asarray(again))
    assert np.array_equal(pixels[:8], pixels[16:]), "the same class and noise"
    task.sampling = replace(task.sampling, seed=1)
    assert not np.array_equal(pixels, np.asarray(task.sample(model, torch.device("cpu"))))


def test_the_pipeline_knows_what_it_was_trained_on(
    model: MHLADiTTransformer2DModel, task: TrainingTask, tmp_path: Path
) -> None:
    task.save_pipeline(model, tmp_path, {"data": "7 samples", "steps": "5"})
    training = MHLAPipeline.from_pretrained(tmp_path).config.training
    assert training == {"data": "letters, 7 samples of 2 classes", "steps": "5", "class dropout": 0.1}
