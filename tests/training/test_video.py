"""scripts/train_video.py as a user runs it, and what its parts refuse."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mhla_diffusion import MHLAPipeline, MHLAWanTransformer3DModel
from mhla_diffusion.files.videos import open_video
from mhla_diffusion.training import (
    LoraConfig,
    ObjectiveConfig,
    TextConfig,
    TrainerConfig,
    VideoDataConfig,
    VideoModelConfig,
    VideoSamplingConfig,
    VideoTrainingConfig,
)
from mhla_diffusion.training.objectives import build_objective
from mhla_diffusion.training.video import build_model
from tests.weights import weights

Run = Callable[..., subprocess.CompletedProcess[str]]

MODEL: dict[str, Any] = {
    "patch_size": [2, 4, 4], "in_channels": 1, "num_layers": 2, "num_attention_heads": 2,
    "attention_head_dim": 12, "ffn_dim": 32, "mhla": {"blocks": [1, 2, 2], "gate": True},
}  # fmt: skip


@pytest.fixture
def settings(tmp_path: Path, text_parts: dict[str, Any]) -> dict[str, Any]:
    """A run of 6 steps on moving digits, with the tiny text encoder."""
    for part in text_parts.values():
        part.save_pretrained(tmp_path / "text")
    return {
        "model": MODEL,
        "data": {
            "source": "moving_mnist", "frames": 4, "sizes": [[24, 24]],
            "moving_digits": {"digits": 1, "digit_size": 12, "num_clips": 10},
        },
        "text": {"encoder": str(tmp_path / "text"), "max_length": 32},
        "objective": {"shift": 2.0},
        "trainer": {
            "max_steps": 6, "batch_size": 4, "log_every": 1, "checkpoint_every": 3,
            "optimizer": {"learning_rate": 0.01},
        },
        "sampling": {"every": 3, "prompts": ["digit 3 moving up"], "num_inference_steps": 2},
    }  # fmt: skip


def test_a_run_leaves_a_pipeline_and_a_resumed_one_the_same(run_video: Run, tmp_path: Path) -> None:
    whole, branch = tmp_path / "whole", tmp_path / "branch"
    result = run_video("--output_dir", str(whole))
    assert result.returncode == 0, result.stdout
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 7))
    assert all(0 <= line["waiting_for_data"] <= 1 for line in lines)
    assert (whole / "samples" / "step-00000003.png").is_file()
    assert open_video(whole / "samples" / "step-00000006.mp4").num_frames == 4
    pipeline = MHLAPipeline.from_pretrained(whole / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("digit 3", num_inference_steps=2).frames.shape == (1, 4, 24, 24, 1)
    assert "| caption dropout | 0.1 |" in (whole / "pipeline" / "README.md").read_text()

    result = run_video("--output_dir", str(branch), "--resume", str(whole / "checkpoints" / "step-00000003"))
    assert result.returncode == 0, result.stdout
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(branch).items())


def test_lora_trains_attention_and_adapters_that_are_merged_at_the_end(
    run_video: Run, settings: dict[str, Any], tmp_path: Path
) -> None:
    first, tuned = tmp_path / "first", tmp_path / "tuned"
    assert run_video("--output_dir", str(first), "--trainer.max_steps", "1").returncode == 0
    settings["model"] = {"init_from": str(first / "pipeline")}
    result = run_video(
        "--output_dir", str(tuned), "--lora.rank", "2", "--trainer.gradient_checkpointing", "true"
    )
    assert result.returncode == 0, result.stdout
    before, after = weights(first), weights(tuned)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in before if ".attn1." in name} <= changed
    assert "blocks.0.ffn.net.2.weight" in changed
    assert "blocks.0.ffn.net.2.bias" not in changed
    delta = after["blocks.0.ffn.net.2.weight"] - before["blocks.0.ffn.net.2.weight"]
    assert torch.linalg.matrix_rank(delta, rtol=1e-3) <= 2

    merged = MHLAPipeline.from_pretrained(tuned / "pipeline")
    beside = MHLAPipeline.from_pretrained(first / "pipeline")
    beside.load_lora_weights(tuned / "lora")
    mixing = [pipe.transformer.blocks[0].attn1.processor.mixing for pipe in (merged, beside)]
    assert torch.equal(*mixing)
    call: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt", "prompt": "digit 3"}
    videos = [pipe(**call, generator=torch.Generator().manual_seed(0)).frames for pipe in (merged, beside)]
    torch.testing.assert_close(*videos)
    other = MHLAPipeline.from_pretrained(first / "pipeline", mhla_config={"blocks": [1, 1, 2], "gate": True})
    with pytest.raises(ValueError, match=r"adapters were trained with .*mixing \(4, 4\), and this model has"):
        other.load_lora_weights(tuned / "lora")


def test_a_run_from_a_converted_model_makes_what_its_data_are(
    run_video: Run, settings: dict[str, Any], tmp_path: Path
) -> None:
    """The model was made for 81 frames of 480 x 832."""
    converted = MHLAWanTransformer3DModel(
        patch_size=(2, 4, 4), num_attention_heads=2, attention_head_dim=12, in_channels=1, out_channels=1,
        text_dim=16, freq_dim=16, ffn_dim=32, num_layers=1, mhla_config={"blocks": 8},
    )  # fmt: skip
    converted.save_pretrained(tmp_path / "converted")
    settings["model"] = {"init_from": str(tmp_path / "converted")}
    result = run_video("--output_dir", str(tmp_path / "run"), "--trainer.max_steps", "3")
    assert result.returncode == 0, result.stdout
    assert open_video(tmp_path / "run" / "samples" / "step-00000003.mp4").read([0]).shape == (1, 24, 24, 3)
    pipeline = MHLAPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert pipeline.default_size == (4, 24, 24)
    assert "4 frames of 24 x 24 pixels" in (tmp_path / "run" / "pipeline" / "README.md").read_text()


@pytest.fixture
def model() -> MHLAWanTransformer3DModel:
    return build_model(
        VideoModelConfig(**{**MODEL, "mhla": None}),
        text_dim=16,
        sizes=[(4, 16, 16)],
    )


def test_a_new_model_has_the_grid_of_the_data(model: MHLAWanTransformer3DModel) -> None:
    assert tuple(model.config.sample_grid) == (2, 4, 4)
    assert (model.config.in_channels, model.config.out_channels) == (1, 1)
    assert not model.proj_out.weight.any(), "its first prediction is that of its bias alone"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"caption_dropout": 1.0}, r"caption_dropout must be in \[0, 1\), got 1.0"),
        ({"model": {"num_layers": 2}}, r"a new model needs model.patch_size, model.in_channels"),
        ({"model": {"init_from": "x", "num_layers": 2}}, r"init_from brings its own shape"),
        ({"text": {"encoder": "minilm", "max_length": 0}}, r"text.max_length must be 1 or more, got 0"),
        ({"objective": {"name": "ddpm"}}, r"Wan is trained by flow matching"),
        ({"sampling": {"every": 5}}, r"sampling.prompts must have at least one"),
        ({"lora": {"rank": 4}}, r"lora.rank 4 trains adapters beside .* give the trained model as"),
        ({"lora": {"rank": -1}}, r"lora.rank must be 0 or more, got -1"),
        ({"lora": {"alpha": 2.0}}, r"lora.alpha must be positive and needs a lora.rank"),
    ],
)
def test_configs_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    settings = {"model": MODEL, "text": {"encoder": "minilm"}, **change}
    with pytest.raises(ValueError, match=message):
        VideoTrainingConfig(
            model=VideoModelConfig(**{**settings["model"], "mhla": None}),
            data=VideoDataConfig(source="films"),
            text=TextConfig(**settings["text"]),
            trainer=TrainerConfig(batch_size=1, max_steps=1),
            output_dir="x",
            sampling=VideoSamplingConfig(**settings.get("sampling", {})),
            objective=ObjectiveConfig(**settings.get("objective", {})),
            lora=LoraConfig(**settings.get("lora", {})),
            caption_dropout=settings.get("caption_dropout", 0.1),
        )


def test_one_of_two_experts_is_trained_at_its_own_times(tmp_path: Path) -> None:
    index = {"boundary_ratio": 0.875, "transformer_2": ["diffusers", "WanTransformer3DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))

    def build(
        times: tuple[float, float],
        model: Any = None,
        init_from: str = str(tmp_path),
        teacher: str | None = None,
    ) -> None:
        config = VideoTrainingConfig(
            model=VideoModelConfig(init_from=init_from),
            data=VideoDataConfig(source="films"),
            text=TextConfig(encoder="minilm"),
            trainer=TrainerConfig(batch_size=1, max_steps=1),
            objective=ObjectiveConfig(times=times, teacher=teacher),
            output_dir="x",
        )
        config.build(build_objective(ObjectiveConfig(times=times)), model)

    with pytest.raises(ValueError, match=r"for times 0.875 to 1, but objective.times are 0 to 1: set"):
        build((0.0, 1.0))
    with pytest.raises(ValueError, match=r"objective.times are 0.5 to 1"):
        build((0.5, 1.0))
    with pytest.raises((ValueError, OSError), match=r"^(?!.*objective.times)"):  # of what comes after it
        build((0.875, 1.0))
    with pytest.raises((ValueError, OSError, AttributeError), match=r"^(?!.*objective.times)"):
        build((0.0, 1.0), model=object())  # as alignment asks, which knows its component
    with pytest.raises(ValueError, match=r"objective.times are 0 to 1: set"):
        build((0.0, 1.0), model=None, init_from=str(tmp_path / "student"), teacher=str(tmp_path))


def test_clips_that_do_not_divide_into_patches_are_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"got \(5, 16, 18\); the nearest are \(4, 16, 16\)"):
        build_model(VideoModelConfig(**{**MODEL, "mhla": None}), text_dim=16, sizes=[(5, 16, 18)])


def test_weights_for_another_text_encoder_are_refused(
    model: MHLAWanTransformer3DModel, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"takes text of width 16, but text.encoder gives 384"):
        build_model(VideoModelConfig(init_from=str(tmp_path)), text_dim=384, sizes=[(4, 16, 16)])
