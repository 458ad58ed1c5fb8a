"""DeepSpeed's ZeRO on two processes of a CPU: the run that one plain process makes. Needs its package."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mhla_diffusion import MHLADiTTransformer2DModel, MHLAPipeline
from tests.backbones.cases import randomize
from tests.processes import Script, free_port, start_processes

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


def step_by_hand(stage: int, port: int, out: Path) -> None:
    """A loop of one's own, in a process of its own: three steps far out of range, and what mixing is then."""
    os.environ.update(DS_ACCELERATOR="cpu", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    torch.manual_seed(0)
    model = MHLADiTTransformer2DModel(
        num_layers=1, num_attention_heads=2, attention_head_dim=8, sample_size=8, patch_size=2, in_channels=1,
        num_embeds_ada_norm=2, mhla_config={"blocks": 4},
    )  # fmt: skip
    randomize(model)
    (mixing,) = (weight for name, weight in model.named_parameters() if name.endswith("mixing"))
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.5),
        config={
            "train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage},
        },
    )  # fmt: skip
    for _ in range(3):
        engine.backward(engine(**model.example_inputs((4, 4))).sample.square().mean())
        engine.step()
    save_file({"mixing": safe_get_full_fp32_param(mixing).contiguous()}, out)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_mixing_stays_in_range_in_a_loop_of_ones_own(stage: int, tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(
        target=step_by_hand, args=(stage, free_port(), tmp_path / "mixing.safetensors")
    )
    process.start()
    process.join(200)
    assert process.exitcode == 0
    mixing = load_file(tmp_path / "mixing.safetensors")["mixing"]
    assert (mixing.min(), mixing.max()) == (0, 1)


def test_what_deepspeed_does_not_do_here_is_refused(write_settings: Callable[[], Path]) -> None:
    for result in run_partitioned(3, "--config", write_settings()):
        assert result.returncode != 0
        assert "ZeRO stage 3 of DeepSpeed shards weights, but not the averages" in result.stdout
