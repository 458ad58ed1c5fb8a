"""DeepSpeed's ZeRO on two processes of a CPU: the run that one plain process makes. Needs its package."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from mhla_diffusion import MHLAPipeline
from tests.processes import Script, start_processes

pytest.importorskip("deepspeed")


def use_deepspeed(join: Callable[[], object], stage: int) -> None:
    """Before the script, in its process: join the other, and ask for ZeRO as a launcher does."""
    join()
    os.environ.update(
        DS_ACCELERATOR="cpu", ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_ZERO_STAGE=str(stage)
    )


def run_partitioned(stage: int, *options: Any) -> list[Any]:
    scripts = start_processes(
        lambda join: Script(
            "train_image", *options, stderr_to_stdout=True, before=partial(use_deepspeed, join, stage)
        )
    )
    return [script.finish() for script in scripts]


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_partitioned_runs_are_the_plain_one_and_keep_mixing_in_range(
    stage: int,
    precision: str,
    settings: dict[str, Any],
    write_settings: Callable[[], Path],
    run: Callable[..., Any],
    losses: Callable[[Path], list[float]],
    tmp_path: Path,
) -> None:
    settings["trainer"] |= {
        "ema_decay": 0.5, "gradient_accumulation_steps": 2, "mixed_precision": precision,
        "max_grad_norm": 0.5,
    }  # fmt: skip
    settings["trainer"]["optimizer"]["mixing_rate"] = 50  # weights leave [0, 1] at once
    one, two, branch = (tmp_path / name for name in ("one", "two", "branch"))
    assert run("--output_dir", str(one)).returncode == 0
    for result in run_partitioned(stage, "--config", write_settings(), "--output_dir", two):
        assert result.returncode == 0, result.stdout
    checkpoint = two / "checkpoints" / "step-00000003"
    assert len(list(checkpoint.glob("pytorch_model/zero_pp_rank_*_optim_states.pt"))) == 2
    for result in run_partitioned(
        stage, "--config", write_settings(), "--output_dir", branch, "--resume", checkpoint
    ):
        assert result.returncode == 0, result.stdout
    tolerance = 1e-4 if precision == "no" else 1e-2
    assert losses(two) == pytest.approx(losses(one), rel=tolerance)
    expected, found, resumed = (
        MHLAPipeline.from_pretrained(path / "pipeline").transformer.state_dict()
        for path in (one, two, branch)
    )
    for name, weight in expected.items():
        assert found[name].numpy() == pytest.approx(weight.numpy(), abs=tolerance), name
        assert resumed[name].numpy() == pytest.approx(found[name].numpy(), abs=1e-5), name
    name = next(name for name in expected if name.endswith("mixing"))
    assert (load_file(one / "checkpoints" / "step-00000006" / "model.safetensors")[name] == 0).any()
    assert 0 <= found[name].min() < found[name].max() <= 1


def test_what_deepspeed_does_not_do_here_is_refused(write_settings: Callable[[], Path]) -> None:
    for result in run_partitioned(3, "--config", write_settings()):
        assert result.returncode != 0
        assert "ZeRO stage 3 of DeepSpeed shards weights, but not the averages" in result.stdout
