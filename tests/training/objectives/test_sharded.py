"""Runs whose model and teacher are sharded by FSDP 2, over two processes."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from mhla_diffusion import MHLAPipeline
from mhla_diffusion.training import trainer
from mhla_diffusion.training.objectives import Distillation
from mhla_diffusion.training.sharding import AveragedWeights
from tests.processes import Script, start_processes

from .test_distillation import distilled  # noqa: F401 (a fixture)


def start_sharding(start: Callable[..., Accelerator], *arguments: Any, **settings: Any) -> Accelerator:
    """Start accelerate as it starts on GPUs: of processes without one it lets none shard."""
    accelerator = start(*arguments, **settings)
    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", state_dict_type="SHARDED_STATE_DICT"
    )
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    accelerator.state.fsdp_plugin = plugin
    return accelerator


def ranks_of(model: nn.Module) -> list[int]:
    """How many ranks the weights are shared out over."""
    weights = list(model.parameters())
    return sorted({weight.device_mesh.size() if isinstance(weight, DTensor) else 1 for weight in weights})


def note_dtypes(file: Path, model: nn.Module, _: Any, inputs: dict[str, Any], output: Any) -> None:
    weight = next(model.parameters())
    found = [inputs["timestep"].dtype, weight.dtype, output[0].dtype]
    file.write_text(json.dumps([str(dtype).removeprefix("torch.") for dtype in found]))


def prepare_and_note(prepare: Callable[..., None], out: Path, *arguments: Any) -> None:
    prepare(*arguments)
    distillation, model, accelerator = arguments
    found = [ranks_of(model), ranks_of(distillation.teacher), len(accelerator._models)]
    out.mkdir(exist_ok=True)
    (out / f"rank-{accelerator.process_index}.json").write_text(json.dumps(found))
    for name, net in (("student", model), ("teacher", distillation.teacher)):
        note = functools.partial(note_dtypes, out / f"{name}-{accelerator.process_index}.json")
        net.register_forward_hook(note, with_kwargs=True)


def shard(join: Callable[[], object], out: Path) -> None:
    """Before the script, in its process: join the other, and let it shard."""
    join()
    trainer.start_accelerator = functools.partial(start_sharding, trainer.start_accelerator)
    prepare = functools.partial(prepare_and_note, Distillation.prepare, out)
    Distillation.prepare = lambda *arguments: prepare(*arguments)  # type: ignore[method-assign]


def run_sharded(noted: Path, *options: Any) -> None:
    """Run to the end in two processes."""
    scripts = start_processes(
        lambda join: Script(
            "train_image", *options, stderr_to_stdout=True, before=functools.partial(shard, join, noted)
        )
    )
    for script in scripts:
        result = script.finish()
        assert result.returncode == 0, result.stdout


def check_near(one: Path, two: Path) -> None:
    pipelines = [MHLAPipeline.from_pretrained(path / "pipeline") for path in (one, two)]
    expected, found = (pipeline.transformer.state_dict() for pipeline in pipelines)
    for name, weight in expected.items():
        assert found[name].numpy() == pytest.approx(weight.numpy(), abs=1e-4), name


def test_two_processes_distil_with_a_sharded_student_and_teacher(
    distilled: dict[str, Any],  # noqa: F811
    write_settings: Callable[[], Path],
    run: Callable[..., Any],
    losses: Callable[[Path], list[float]],
    tmp_path: Path,
) -> None:
    distilled["trainer"]["ema_decay"] = 0.5  # so that it is not the last weights
    one, two, branch, noted = (tmp_path / name for name in ("one", "two", "branch", "noted"))
    # A sheet behind every step, which must leave no trace in the next.
    sheets = ("--sampling.every", "1", "--sampling.num_inference_steps", "1")
    run_sharded(noted, "--config", write_settings(), "--output_dir", two, *sheets)
    # Both are sharded over two ranks, and checkpoints know the student alone.
    assert [json.loads((noted / f"rank-{rank}.json").read_text()) for rank in (0, 1)] == [[[2], [2], 1]] * 2
    assert run("--output_dir", str(one), *sheets).returncode == 0
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    check_near(one, two)
    checkpoint = two / "checkpoints" / "step-00000003"
    run_sharded(noted, "--config", write_settings(), "--output_dir", branch, "--resume", checkpoint)
    check_near(two, branch)


def test_in_bfloat16_weights_are_gathered_so_and_times_are_not_rounded(
    distilled: dict[str, Any],  # noqa: F811
    write_settings: Callable[[], Path],
    run: Callable[..., Any],
    losses: Callable[[Path], list[float]],
    tmp_path: Path,
) -> None:
    one, two, noted = (tmp_path / name for name in ("one", "two", "noted"))
    bf16 = ("--trainer.mixed_precision", "bf16")
    run_sharded(noted, "--config", write_settings(), "--output_dir", two, *bf16)
    for rank in (0, 1):
        dtypes = [json.loads((noted / f"{name}-{rank}.json").read_text()) for name in ("student", "teacher")]
        assert dtypes == [["float32", "bfloat16", "float32"], ["float32"] * 3]
    assert run("--output_dir", str(one), *bf16).returncode == 0
    assert losses(two) == pytest.approx(losses(one), rel=1e-2)


def test_averages_of_one_process_alone_are_refused() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        weights = [distribute_tensor(torch.arange(4.0), mesh, [Shard(0)])]
        average = AveragedWeights(weights, foreach=False)
        state = average.state_dict()
        assert type(state["shadow_params"][0]) is torch.Tensor
        average.load_state_dict({**state, "shadow_params": [torch.ones(4)]})
        assert isinstance(average.shadow_params[0], DTensor)
        assert torch.equal(average.shadow_params[0].full_tensor(), torch.ones(4))
        with pytest.raises(ValueError, match="kept one process' part of the averaged weights"):
            average.load_state_dict({**state, "shadow_params": weights})
    finally:
        dist.destroy_process_group()
