"""Launchers that say something else than the run's config, and runs that would train nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from torch.optim.optimizer import register_optimizer_step_pre_hook

from mhla_diffusion import MHLAPipeline
from mhla_diffusion.training import ImageTrainingConfig, launcher, train_image
from mhla_diffusion.training.config import parse_config
from mhla_diffusion.training.data.stream import BatchShare
from mhla_diffusion.training.launcher import require_agreement, tell_deepspeed
from mhla_diffusion.training.settings import TrainerConfig
from mhla_diffusion.training.trainer import Trainer
from tests.processes import Script, start_processes

ROOT = Path(__file__).parents[2]


@pytest.fixture
def train(write_settings: Callable[[], Path]) -> Callable[..., int]:
    """Trains in this process, with the settings as a test changed them."""

    def train(*arguments: str) -> int:
        config, resume = parse_config(ImageTrainingConfig, ["--config", str(write_settings()), *arguments])
        return train_image(config, resume=resume)

    return train


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MIXED_PRECISION", "bf16", "mixed_precision bf16 beside trainer.mixed_precision no of the run"),
        ("GRADIENT_ACCUMULATION_STEPS", "4", "gradient_accumulation_steps 4 beside .* 1 of the run"),
        ("GRADIENT_CLIPPING", "0.5", r"gradient_clipping 0\.5 beside trainer\.max_grad_norm 1\.0 of the run"),
    ],
)
def test_a_launcher_that_says_something_else_is_refused_before_any_step(
    name: str,
    value: str,
    message: str,
    train: Callable[..., int],
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    with pytest.raises(ValueError, match=message):
        train()
    assert not (Path(settings["output_dir"]) / "metrics.jsonl").exists()


def test_an_option_that_accelerate_launch_would_lose_is_held_against_the_run(
    write_settings: Callable[[], Path],
) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu"]
    launch += ["--gradient_accumulation_steps", "4"]
    result = subprocess.run(
        [*launch, "scripts/train_image.py", "--config", str(write_settings())],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert "error: the launcher asks for gradient_accumulation_steps 4 beside trainer." in result.stderr
    assert result.returncode != 0


def test_what_a_launcher_leaves_open_is_the_run_s(
    train: Callable[..., int], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings["trainer"] |= {"max_steps": 2, "gradient_accumulation_steps": 2, "mixed_precision": "bf16"}
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # as accelerate launch writes when nobody chose
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto")
    assert train() == 0


def test_what_deepspeed_is_configured_for_is_held_against_the_run() -> None:
    config = TrainerConfig(batch_size=64, max_steps=10, gradient_accumulation_steps=8, max_grad_norm=1.0)
    require_agreement({"gradient_accumulation_steps": "auto", "gradient_clipping": 1.0}, config)
    with pytest.raises(
        ValueError, match=r"steps 1 beside trainer\.gradient_accumulation_steps 8; for train_batch"
    ):
        require_agreement({"gradient_accumulation_steps": 1, "train_batch_size": 32}, config)


def test_deepspeed_is_told_what_the_run_is_and_leaves_precision_to_it() -> None:
    config = TrainerConfig(
        batch_size=64, max_steps=10, gradient_accumulation_steps=8, max_grad_norm=0.5, mixed_precision="bf16"
    )

    def told(settings: dict[str, Any]) -> dict[str, Any]:
        plugin = SimpleNamespace(deepspeed_config=settings)
        accelerator: Any = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
        tell_deepspeed(accelerator, config, BatchShare(64, 2, 0, 8))
        return settings

    off = {"enabled": False}
    assert told({"bf16": {"enabled": True}, "gradient_clipping": "auto"}) == {
        "bf16": off, "fp16": off, "gradient_clipping": 0.5, "gradient_accumulation_steps": 8,
        "train_micro_batch_size_per_gpu": 4,
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"mixed_precision fp16 beside trainer\.mixed_precision bf16"):
        told({"fp16": {"enabled": True}})
    with pytest.raises(ValueError, match="ZeRO stage 3 of DeepSpeed shards weights, but not the averages"):
        told({"zero_optimization": {"stage": 3}})


@pytest.mark.parametrize(
    ("on_cpu", "precision", "message"),
    [
        ("true", "no", "asks for DeepSpeed and for a CPU, with which accelerate trains without it"),
        ("false", "fp16", "fp16 has no loss scaling under DeepSpeed here: take bf16"),
    ],
)
def test_deepspeed_that_would_not_train_as_asked_is_refused_before_any_step(
    on_cpu: str,
    precision: str,
    message: str,
    train: Callable[..., int],
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_USE_CPU", on_cpu)
    with pytest.raises(ValueError, match=message):
        train("--trainer.mixed_precision", precision)
    assert not (Path(settings["output_dir"]) / "metrics.jsonl").exists()


def use_fsdp(join: Callable[[], object]) -> None:
    """Before the script, in its process: join the other, and ask for FSDP as a launcher does."""
    join()
    os.environ.update(ACCELERATE_USE_CPU="true", ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")


@pytest.mark.parametrize("num_processes", [1, 2])
def test_fsdp_that_accelerate_would_leave_out_is_refused_before_any_step(
    num_processes: int, write_settings: Callable[[], Path], settings: dict[str, Any]
) -> None:
    options = ("--config", write_settings())
    scripts = start_processes(
        lambda join: Script("train_image", *options, stderr_to_stdout=True, before=partial(use_fsdp, join)),
        num_processes,
    )
    for result in [script.finish() for script in scripts]:
        assert result.returncode == 1, result.stdout
        told = (
            f"error: the launcher asks for FSDP, .* leaves out on {num_processes} process.es. of type cpu: "
        )
        assert re.search(told, result.stdout), result.stdout
    assert not (Path(settings["output_dir"]) / "metrics.jsonl").exists()


def test_fp16_on_a_cpu_is_refused_before_any_step(
    train: Callable[..., int], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    told = r"trainer\.mixed_precision fp16 needs a GPU, and this run is on a CPU: take bf16 or no; a run that"
    with pytest.raises(ValueError, match=told):
        train("--trainer.mixed_precision", "fp16")
    run = Path(settings["output_dir"])
    assert not (run / "metrics.jsonl").exists()
    with monkeypatch.context() as gpu:
        gpu.setattr(launcher, "process_state", lambda: SimpleNamespace(device=torch.device("cuda")))
        assert train("--trainer.mixed_precision", "fp16") == 0
    steps = (run / "metrics.jsonl").read_text()
    settings["trainer"]["max_steps"] = 8
    with pytest.raises(ValueError, match=told):
        train("--trainer.mixed_precision", "fp16", "--resume", "latest")
    assert (run / "metrics.jsonl").read_text() == steps


@pytest.mark.parametrize("name", ["ddp", "fsdp", "deepspeed"])
def test_launch_settings_of_the_repository_leave_the_run_its_own(name: str) -> None:
    launch = load_config_from_file(str(ROOT / "configs" / "accelerate" / f"{name}.yaml"))
    said = getattr(launch, "deepspeed_config", None) or {}
    assert not {"gradient_accumulation_steps", "gradient_clipping"} & said.keys()


def test_a_compiled_run_is_the_plain_one_and_leaves_a_pipeline(
    train: Callable[..., int], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert train() == 0
    plain = Path(settings["output_dir"])
    settings["output_dir"] = str(tmp_path / "compiled")
    settings["sampling"] |= {"every": 3}
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    torch.compiler.reset()
    counters["frames"].clear()
    assert train() == 0
    assert counters["frames"]["ok"] > 0
    compiled = Path(settings["output_dir"])
    MHLAPipeline.from_pretrained(compiled / "pipeline")
    losses = [
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (plain, compiled)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    names = [
        load_file(run / "checkpoints" / "step-00000006" / "model.safetensors").keys()
        for run in (plain, compiled)
    ]
    assert names[0] == names[1]
    # A run goes on whether it is compiled or not.
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND")
    branch = ["--output_dir", str(tmp_path / "branch"), "--resume"]
    settings["sampling"] |= {"every": 0}
    settings["trainer"] |= {"max_steps": 7}
    assert train(*branch, str(compiled / "checkpoints" / "step-00000006")) == 0


@pytest.mark.parametrize("max_steps", [1, 1000])
def test_a_run_that_trains_nothing_says_why_and_stops(
    max_steps: int, train: Callable[..., int], settings: dict[str, Any]
) -> None:
    settings["trainer"]["max_steps"] = max_steps
    with pytest.raises(
        ValueError, match=r"trains nothing.*proj_out_2\.weight.*start at 0.*Set trainable to all"
    ):
        train("--trainable", "attention")
    metrics = Path(settings["output_dir"]) / "metrics.jsonl"
    assert not metrics.exists() or len(metrics.read_text().splitlines()) < 4


def test_attention_of_a_trained_model_is_trained(
    train: Callable[..., int], settings: dict[str, Any], tmp_path: Path
) -> None:
    assert train() == 0
    settings["model"] = {"init_from": str(Path(settings["output_dir"]) / "pipeline")}
    settings["output_dir"] = str(tmp_path / "attention")
    assert train("--trainable", "attention") == 0


def test_every_setting_of_the_optimizer_reaches_adamw(
    train: Callable[..., int], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[dict[str, Any]] = []
    monkeypatch.setattr(Trainer, "train", lambda self: groups.extend(self.optimizer.param_groups) or 0)
    settings["trainer"]["optimizer"] = {
        "learning_rate": 0.01, "betas": [0.8, 0.95], "eps": 1e-6, "weight_decay": 0.1, "mixing_rate": 3,
    }  # fmt: skip
    assert train() == 0
    assert len(groups) == 2, "mixing has a rate of its own"
    for group, rate in zip(groups, (0.01, 0.03), strict=True):
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.95), 1e-6, 0.1)
        assert group["lr"] == pytest.approx(rate)
        assert group["params"]


def test_gradients_are_clipped_and_logged_as_they_were(
    train: Callable[..., int], settings: dict[str, Any]
) -> None:
    settings["trainer"]["max_grad_norm"] = 1e-3
    norms: list[float] = []

    def note(optimizer: torch.optim.Optimizer, *_: object) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(float(torch.nn.utils.get_total_norm(g for g in gradients if g is not None)))

    handle = register_optimizer_step_pre_hook(note)
    try:
        assert train() == 0
    finally:
        handle.remove()
    assert norms == pytest.approx([1e-3] * 6, rel=1e-2)
    lines = (Path(settings["output_dir"]) / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["grad_norm"] > 1e-2 for line in lines)


def test_a_sheet_leaves_the_model_in_training_and_none_is_made_on_the_way_out(
    train: Callable[..., int], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings["sampling"]["every"] = 1
    loss_of, seen = Trainer._loss, list[tuple[bool, int]]()

    def noted(self: Trainer, *arguments: Any) -> torch.Tensor:
        seen.append((self.model.training, torch.initial_seed()))
        return loss_of(self, *arguments)

    monkeypatch.setattr(Trainer, "_loss", noted)
    monkeypatch.setattr(
        Trainer, "_agree_to_stop", lambda self, _: signal.SIGTERM if self.progress.step == 3 else 0
    )
    assert train("--trainer.seed", "11") == signal.SIGTERM
    assert seen == [(True, 11)] * 3
    sheets = sorted(path.name for path in Path(settings["output_dir"]).glob("samples/*.png"))
    assert sheets == ["step-00000001.png", "step-00000002.png"]
