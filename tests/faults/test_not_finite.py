"""A batch that makes the loss NaN."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors import safe_open

from mhla_diffusion.training import (
    DataConfig,
    ImageTrainingConfig,
    LatentCacheConfig,
    parse_config,
    train_image,
)
from mhla_diffusion.training.data.shards import write_shards
from mhla_diffusion.training.progress import Progress
from mhla_diffusion.training.trainer import Trainer


@pytest.fixture
def poisoned(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Training on 20 latents of 2 channels, of which row 13 is infinite, with checkpoints at every step."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(4,), latent_channels=2, norm_num_groups=2, sample_size=8,
    )  # fmt: skip
    vae.save_pretrained(tmp_path / "vae")
    data = DataConfig("folder", path="unused")
    cache = LatentCacheConfig(output_dir=str(tmp_path / "cache"), vae=str(tmp_path / "vae"), data=data)

    def rows(numbers: range) -> list[dict[str, torch.Tensor]]:
        means = [torch.full((2, 8, 8), float("inf") if number == 13 else number / 20) for number in numbers]
        zero = torch.zeros(2, 8, 8)
        return [{"mean": mean, "std": zero, "label": torch.tensor(i % 2)} for i, mean in enumerate(means)]

    facts = {"class_names": ["cat", "dog"], "scaling_factor": 1.0, "shift_factor": 0.0}
    write_shards(cache, keep=("vae", "data"), facts=facts, num_samples=20, make_rows=rows)
    settings["model"]["in_channels"] = 2
    settings["data"] = {"source": "latents", "path": str(tmp_path / "cache")}
    settings["trainer"] |= {"log_every": 100, "checkpoint_every": 1, "keep_checkpoints": 10, "seed": 1}


@pytest.fixture
def train(write_settings: Callable[[], Path]) -> Callable[..., int]:
    def train(*arguments: str, resume: str | None = None) -> int:
        parsed = ["--config", str(write_settings()), *arguments]
        return train_image(parse_config(ImageTrainingConfig, parsed)[0], resume=resume)

    return train


@pytest.mark.usefixtures("poisoned")
def test_a_batch_that_is_not_finite_is_named_kept_and_can_be_skipped(
    train: Callable[..., int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    skipped = []
    for micro_batches in (1, 2):
        run = tmp_path / f"run-{micro_batches}"
        arguments = (
            "--output_dir", str(run), "--trainer.gradient_accumulation_steps", str(micro_batches),
        )  # fmt: skip
        with pytest.raises(FloatingPointError, match=r"latents-00000.safetensors, row 13") as first:
            train(*arguments)
        (kept,) = (run / "not-finite").iterdir()
        assert str(kept) in str(first.value)
        with safe_open(kept, framework="pt") as file:
            facts = file.metadata()
            step, names = int(facts["step"]), json.loads(facts["samples"])
            samples = torch.cat([file.get_tensor(f"{part}.samples") for part in range(micro_batches)])
            numbers = [json.loads(facts[f"{part}.numbers"]) for part in range(micro_batches)]
        assert [len(its) for its in numbers] == [8 // micro_batches] * micro_batches
        assert sorted(itertools.chain(*numbers)) == list(range(8 * (step - 1), 8 * step))
        assert len(names) == 8
        (bad,) = torch.nonzero(~samples.isfinite().flatten(1).all(1)).flatten().tolist()
        assert names[bad].endswith("row 13")
        checkpoints = sorted(path.name for path in (run / "checkpoints").iterdir())
        assert checkpoints == [f"step-{number:08d}" for number in range(1, step)]
        assert step > 1
        message = rf'not finite at step {step}, .*--trainer.skip_steps "\[{step}\]"'
        with pytest.raises(ValueError, match=message):
            train(*arguments, resume="latest")
        # Row 13 comes once in each epoch of 20 samples, which is 2.5 steps.
        again = [step]
        while True:
            try:
                assert train(*arguments, "--trainer.skip_steps", str(again), resume="latest") == 0
                break
            except FloatingPointError as error:
                again.append(int(str(error).partition("at step ")[2].partition(",")[0]))
                assert len(again) < 4
        assert f"skipped step {step}, as trainer.skip_steps asks" in caplog.text
        assert (run / "pipeline").is_dir()
        skipped.append(again)
    assert skipped[0] == skipped[1]


def test_a_skipped_step_passes_over_its_batch_and_its_rate(
    train: Callable[..., int], settings: dict[str, Any], losses: Callable[[Path], list[float]], tmp_path: Path
) -> None:
    settings["trainer"]["optimizer"]["learning_rate"] = 1e-12  # so that losses are those of the batches
    lines = []
    for name, skip in (("whole", "[]"), ("skipping", "[3]")):
        train("--output_dir", str(tmp_path / name), "--trainer.skip_steps", skip)
        lines.append([json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()])
    whole, skipping = lines
    assert [line["lr"] for line in skipping] == [line["lr"] for line in whole]
    assert len({line["lr"] for line in whole}) > 3
    assert skipping[2]["loss"] is None, "JSON has no NaN"
    with pytest.raises(ValueError, match="skip_steps names all of the 6 steps: nothing would be trained"):
        train("--output_dir", str(tmp_path / "none"), "--trainer.skip_steps", "[1, 2, 3, 4, 5, 6]")
    kept = [i for i in range(6) if i != 2]
    assert [skipping[i]["loss"] for i in kept] == pytest.approx([whole[i]["loss"] for i in kept], rel=1e-5)


def test_a_gradient_that_is_not_finite_is_found_at_its_own_step(
    train: Callable[..., int],
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    settings["trainer"]["checkpoint_every"] = 1
    whole = Trainer._loss

    def spoiled(self: Trainer, numbers: list[int], batch: dict[str, Any]) -> torch.Tensor:
        loss = whole(self, numbers, batch)
        if self.progress.step == 1:
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    monkeypatch.setattr(Trainer, "_loss", spoiled)
    with pytest.raises(FloatingPointError, match="not finite at step 2, whose samples are"):
        train()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000001"]


def test_the_first_step_that_is_not_finite_is_remembered() -> None:
    progress, nan = Progress(), torch.tensor(float("nan"))
    progress.add(torch.tensor(1.0), torch.tensor(1.0))
    progress.skip()
    progress.add(torch.tensor(3.0))
    assert (progress.step, progress.mean_loss(), progress.first_not_finite()) == (3, 2.0, 0)
    progress.add(torch.tensor(1.0), nan)
    progress.add(nan, nan)
    assert progress.first_not_finite() == 4
    progress.start_interval()
    progress.add(nan)
    assert progress.first_not_finite() == 6


def test_the_mean_of_the_loss_goes_on_where_a_run_does() -> None:
    before, after = Progress(), Progress()
    before.add(torch.tensor(1.0))
    after.load_state_dict(before.state_dict())
    after.add(torch.tensor(3.0))
    assert (after.step, after.mean_loss()) == (2, 2.0)
