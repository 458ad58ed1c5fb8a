"""Distillation: its loss by hand, a teacher that stays out of the run, and runs that go on to the bit."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn

from mhla_diffusion import MHLADiTPipeline, MHLAPipeline, convert_to_mhla
from mhla_diffusion.backbones.teacher import recording
from mhla_diffusion.training import (
    ImageTrainingConfig,
    LoraConfig,
    ObjectiveConfig,
    build_objective,
    parse_config,
    train_image,
)
from mhla_diffusion.training.adapters import set_trainable
from mhla_diffusion.training.objectives import Distillation, DistillationConfig
from mhla_diffusion.training.objectives.distillation import share_frozen
from mhla_diffusion.training.run import warn_of_guidance
from mhla_diffusion.training.task import SampleSheetConfig
from tests.conversion.conftest import make_teacher
from tests.training.test_runs import check_same_weights

Run = Callable[..., Any]


def make_pair(name: str = "flow") -> tuple[Any, Any]:
    teacher = make_teacher(num_layers=2, out_channels=2 if name == "ddpm" else 1)
    student = convert_to_mhla(copy.deepcopy(teacher), {"blocks": 4})
    return teacher, student.requires_grad_(True).train()


def make_batch() -> dict[str, Any]:
    generators = [torch.Generator().manual_seed(n) for n in range(3)]
    samples = torch.randn(3, 1, 8, 8, generator=generators[0])
    return {
        "samples": samples, "conditioning": {"class_labels": torch.tensor([0, 1, 0])},
        "generators": generators,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["flow", "ddpm"])
@pytest.mark.parametrize("step", [0, 25, 100, 150])
def test_the_loss_by_hand(name: str, step: int) -> None:
    teacher, student = make_pair(name)
    objective = build_objective(ObjectiveConfig(name=name))  # type: ignore[arg-type]
    config = DistillationConfig(data=0.7, attention=0.3, every=1, fade_steps=100)
    distillation = Distillation(objective, teacher, config)
    distillation.step = step
    batch = make_batch()
    samples, conditioning = batch["samples"], batch["conditioning"]
    times, noise = objective.draw(samples, batch["generators"])
    found = distillation.loss_at(student, samples, conditioning, times=times, noise=noise)
    names = [f"transformer_blocks.{i}.attn1" for i in range(2)]
    noisy = objective.noisy(samples, times, noise)
    with recording(student, names) as ours, recording(teacher, names) as theirs:
        p = objective.predict(student, noisy, times, conditioning)
        t = objective.predict(teacher, noisy, times, conditioning)
    expected = 0.7 * objective.loss_of(p, samples, times=times, noise=noise)
    errors = ((p - t) ** 2).flatten(2).mean(2)  # [B, C]
    expected = expected + 0.5 * errors[:, 0] + (0.05 * errors[:, 1] if name == "ddpm" else 0)
    for its in names:
        a, b = ours[its].output, theirs[its].output
        relative = ((a - b) ** 2).flatten(1).mean(1) / (b**2).flatten(1).mean(1)  # type: ignore[operator]
        expected = expected + 0.3 * max(0, 1 - step / 100) * relative / 2
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "settings", [{}, {"weighting_scheme": "sigma_sqrt"}, {"prediction_type": "sample"}], ids=str
)
def test_a_perfect_teacher_counts_as_data_do_at_every_time(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, student = make_pair()
    objective = build_objective(ObjectiveConfig(**settings))
    distillation = Distillation(objective, teacher, DistillationConfig(attention=0))
    batch = make_batch()
    samples, conditioning = batch["samples"], batch["conditioning"]
    times, noise = torch.tensor([0.02, 0.3, 0.9]), torch.randn(samples.shape)
    perfect = samples if settings.get("prediction_type") else noise - samples
    monkeypatch.setattr(distillation, "_ask", lambda *_: perfect)
    found = distillation.loss_at(student, samples, conditioning, times=times, noise=noise)
    alone = objective.loss_at(student, samples, conditioning, times=times, noise=noise)
    torch.testing.assert_close(found, 1.5 * alone)


def test_guided_layers_are_held_against_those_with_the_condition() -> None:
    teacher, student = make_pair()
    objective = build_objective(ObjectiveConfig())
    config = DistillationConfig(data=0, prediction=0, attention=0.3, every=1, guidance_scale=3)
    distillation = Distillation(objective, teacher, config)
    distillation.unconditional = lambda given: {"class_labels": torch.full_like(given["class_labels"], 2)}
    batch = make_batch()
    samples, conditioning = batch["samples"], batch["conditioning"]
    times, noise = objective.draw(samples, batch["generators"])
    found = distillation.loss_at(student, samples, conditioning, times=times, noise=noise)
    distillation.config = dataclasses.replace(config, guidance_scale=1)
    expected = distillation.loss_at(student, samples, conditioning, times=times, noise=noise)
    torch.testing.assert_close(found, expected)
    assert (found > 1e-3).all()


def test_every_second_layer_from_the_first_is_compared() -> None:
    teacher = make_teacher(num_layers=3)
    compared = []
    for every in (1, 2, 3):
        config = DistillationConfig(every=every)
        compared.append(Distillation(build_objective(ObjectiveConfig()), teacher, config)._layers(teacher))
    assert compared == [[f"transformer_blocks.{i}.attn1" for i in range(0, 3, every)] for every in (1, 2, 3)]


def test_an_expert_is_distilled_at_its_own_times() -> None:
    objective = build_objective(ObjectiveConfig(times=(0.7, 1.0)))
    distillation = Distillation(objective, make_pair()[0], DistillationConfig())
    times = torch.cat([distillation.draw_time(torch.Generator().manual_seed(n)) for n in range(200)])
    assert times.min() >= 0.7


def test_gradients_reach_the_student_alone_also_through_checkpointing() -> None:
    teacher, student = make_pair()
    distillation = Distillation(build_objective(ObjectiveConfig()), teacher, DistillationConfig(every=1))
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            student.enable_gradient_checkpointing()
        student.zero_grad()
        distillation.loss(student, **make_batch()).mean().backward()
        gradients.append([p.grad.clone() for p in student.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(list(student.parameters()))
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)
    assert all(p.grad is None for p in teacher.parameters())


def test_the_teacher_is_asked_in_its_own_dtype() -> None:
    teacher, student = make_pair()
    seen: list[torch.dtype] = []
    teacher.to(torch.bfloat16).register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    distillation = Distillation(build_objective(ObjectiveConfig()), teacher, DistillationConfig())
    loss = distillation.loss(student, **make_batch())
    assert seen == [torch.bfloat16]
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("data", [0, 1])
def test_guidance_is_distilled_whole_where_that_is_asked_for(data: float) -> None:
    teacher, _ = make_pair()
    objective = build_objective(ObjectiveConfig())
    config = DistillationConfig(data=data, attention=0, prediction=1, guidance_scale=3)
    distillation = Distillation(objective, teacher, config)
    distillation.unconditional = lambda given: {"class_labels": torch.full_like(given["class_labels"], 2)}
    batch = make_batch()
    times, noise = objective.draw(batch["samples"], batch["generators"])
    noisy = objective.noisy(batch["samples"], times, noise)
    held = objective.predict(teacher, noisy, times, batch["conditioning"])
    free = objective.predict(teacher, noisy, times, {"class_labels": torch.tensor([2, 2, 2])})
    wanted = free + 3 * (held - free)

    class Guided(nn.Module):
        def forward(self, *_: Any, **__: Any) -> tuple[Tensor]:
            return (wanted,)

    found = distillation.loss_at(Guided(), batch["samples"], batch["conditioning"], times=times, noise=noise)
    torch.testing.assert_close(found, torch.zeros(3))
    assert distillation.facts()["guidance"] == "distilled at 3: sample without it"


@pytest.mark.parametrize("lora", [0, 2])
def test_frozen_weights_are_there_once(lora: int) -> None:
    teacher, student = make_pair()
    expected = teacher(**example(teacher)).sample
    set_trainable(student, "attention", LoraConfig(rank=lora))
    shared = share_frozen(teacher, student)
    outside = sum(p.numel() for name, p in teacher.named_parameters() if ".attn1." not in name)
    assert shared == 4 * outside
    first = teacher.transformer_blocks[0].ff.net[2].weight
    its = student.transformer_blocks[0].ff.net[2]
    assert first.data_ptr() == (its.base_layer if lora else its).weight.data_ptr()
    torch.testing.assert_close(teacher(**example(teacher)).sample, expected)


def test_frozen_weights_that_differ_stay_the_teachers() -> None:
    teacher, student = make_pair()
    set_trainable(student, "attention", LoraConfig(rank=0))
    own = teacher.transformer_blocks[0].ff.net[2].weight
    before = own.clone()
    with torch.no_grad():
        student.transformer_blocks[0].ff.net[2].weight.add_(1)
    share_frozen(teacher, student)
    assert torch.equal(teacher.transformer_blocks[0].ff.net[2].weight, before)


def example(model: Any) -> dict[str, Any]:
    return model.example_inputs((4, 4), generator=torch.Generator().manual_seed(0))


def test_a_student_of_another_shape_is_refused() -> None:
    teacher, _ = make_pair()
    distillation = Distillation(build_objective(ObjectiveConfig()), teacher, DistillationConfig(), name="T")
    wider = make_teacher(num_layers=2, attention_head_dim=12)
    with pytest.raises(
        ValueError, match=r"the student and the teacher T differ in \d+ weights, first \S+: \("
    ):
        distillation.check(wider)
    deeper = make_teacher(num_layers=3)
    with pytest.raises(
        ValueError, match=r"first transformer_blocks.2\S+: \(.*\) and none; a student is made"
    ):
        distillation.check(deeper)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prediction": -1}, "distillation.prediction must be 0 or more, got -1"),
        ({"fade_steps": 0}, "distillation.fade_steps must be 1 or more, got 0"),
        ({"guidance_scale": 0.5}, "distillation.guidance_scale must be 1 or more"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillationConfig(**settings)


def test_distillation_needs_a_teacher() -> None:
    with pytest.raises(ValueError, match=r"objective\.distillation needs a teacher"):
        ObjectiveConfig(distillation=DistillationConfig(every=2))


@pytest.fixture
def distilled(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The settings of a run that distils a teacher into its conversion."""
    teacher = make_teacher(num_layers=2)
    scheduler = build_objective(ObjectiveConfig()).scheduler()
    MHLADiTPipeline(teacher, scheduler).save_pretrained(tmp_path / "teacher")
    student = convert_to_mhla(teacher, {"blocks": 4, "local": "gate", "feature_map": "hedgehog"})
    student.save_pretrained(tmp_path / "student")
    settings["model"] = {"init_from": str(tmp_path / "student")}
    settings["objective"] = {
        "teacher": str(tmp_path / "teacher"), "distillation": {"every": 1, "fade_steps": 5}
    }  # fmt: skip
    return settings


@pytest.mark.parametrize(
    ("learned", "sampled", "warned"), [(3, 4, True), (3, 1, False), (3, 0, False), (1, 4, False)]
)
def test_sheets_that_would_be_guided_twice_are_warned_of(
    learned: float, sampled: float, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    config = DistillationConfig(data=0 if learned > 1 else 1, guidance_scale=learned)
    objective = Distillation(build_objective(ObjectiveConfig()), make_pair()[0], config)
    warn_of_guidance(objective, SampleSheetConfig(every=5, guidance_scale=sampled))
    assert ("learns a guidance of 3, and sheets are sampled with" in caplog.text) is warned


def test_layers_count_less_from_step_to_step_of_a_run(
    distilled: dict[str, Any], write_settings: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    del distilled["sampling"]
    steps, loss_at = list[int](), Distillation.loss_at

    def noted(self: Distillation, *args: Any, **kwargs: Any) -> Tensor:
        steps.append(self.step)
        return loss_at(self, *args, **kwargs)

    monkeypatch.setattr(Distillation, "loss_at", noted)
    train_image(parse_config(ImageTrainingConfig, ["--config", str(write_settings())])[0])
    assert steps == list(range(6))


@pytest.mark.parametrize("trainable", [[], ["--trainable", "attention"], ["--lora.rank", "2"]], ids=str)
def test_a_run_goes_on_to_the_bit_and_leaves_the_student_alone(
    distilled: dict[str, Any], run: Run, losses: Callable[[Path], list[float]], tmp_path: Path,
    trainable: Sequence[str],
) -> None:  # fmt: skip
    whole, branch = tmp_path / "whole", tmp_path / "branch"
    result = run("--output_dir", str(whole), *trainable)
    assert result.returncode == 0, result.stdout
    checkpoint = whole / "checkpoints" / "step-00000003"
    result = run("--output_dir", str(branch), *trainable, "--resume", str(checkpoint))
    assert result.returncode == 0, result.stdout
    check_same_weights(whole, branch)
    stored = load_file(whole / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
    pipeline = MHLAPipeline.from_pretrained(whole / "pipeline")
    assert stored.keys() == pipeline.transformer.state_dict().keys()
    assert pipeline.transformer.layer_attention == ["mhla", "mhla"]
    saved = {path.name for path in checkpoint.iterdir()}
    assert not {name for name in saved if "_1." in name and name.startswith("model")}, "the teacher is not"
    card = (whole / "pipeline" / "README.md").read_text()
    assert "| guidance | kept: sample with it |" in card
    assert "FlowMatching, distilled" in card


def test_several_processes_distil_what_one_does(
    distilled: dict[str, Any], run: Run, losses: Callable[[Path], list[float]], tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert run("--output_dir", str(one)).returncode == 0
    result = run("--output_dir", str(two), num_processes=2)
    assert result.returncode == 0, result.stdout
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)


def test_preparing_moves_the_teacher_and_no_checkpoint_knows_it() -> None:
    teacher, student = make_pair()
    accelerator = Accelerator(cpu=True)
    distillation = Distillation(build_objective(ObjectiveConfig()), teacher, DistillationConfig())
    prepared = accelerator.prepare(student)
    distillation.prepare(prepared, accelerator)
    assert accelerator._models == [prepared]
