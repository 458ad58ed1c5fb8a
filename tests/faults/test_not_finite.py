"""A batch that makes the loss NaN."""

from __future__ import annotations

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


@pytest.mark.usefixtures("poisoned")
def test_a_batch_that_is_not_finite_is_named_kept_and_can_be_skipped(
    write_settings: Callable[[], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def train(*arguments: str, resume: str | None = None) -> int:
        parsed = ["--config", str(write_settings()), *arguments]
        return train_image(parse_config(ImageTrainingConfig, parsed)[0], resume=resume)

    with pytest.raises(FloatingPointError, match=r"latents-00000.safetensors, row 13") as first:
        train()
    (kept,) = (tmp_path / "run" / "not-finite").iterdir()
    assert str(kept) in str(first.value)
    with safe_open(kept, framework="pt") as file:
        step, names = int(file.metadata()["step"]), json.loads(file.metadata()["samples"])
        samples = file.get_tensor("0.samples")
        assert len(json.loads(file.metadata()["0.numbers"])) == len(names) == 8
    (bad,) = torch.nonzero(~samples.isfinite().flatten(1).all(1)).flatten().tolist()
    assert names[bad].endswith("row 13")
    checkpoints = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert checkpoints == [f"step-{number:08d}" for number in range(1, step)]
    assert step > 1
    with pytest.raises(ValueError, match=rf'not finite at step {step}, .*--trainer.skip_steps "\[{step}\]"'):
        train(resume="latest")
    # Row 13 comes once in each epoch of 20 samples, which is 2.5 steps.
    again = [step]
    while True:
        try:
            assert train("--trainer.skip_steps", str(again), resume="latest") == 0
            break
        except FloatingPointError as error:
            again.append(int(str(error).partition("at step ")[2].partition(",")[0]))
            assert len(again) < 4
    assert f"skipped step {step}, as trainer.skip_steps asks" in caplog.text
    assert (tmp_path / "run" / "pipeline").is_dir()


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
