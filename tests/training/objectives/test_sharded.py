"""Distillation with student and teacher sharded by FSDP 2, over two processes."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.tensor import DTensor

from mhla_diffusion import MHLAPipeline
from mhla_diffusion.training import trainer
from mhla_diffusion.training.objectives import Distillation
from tests.processes import Script, start_processes

from .test_distillation import distilled  # noqa: F401 (a fixture)


def start_sharding(start: Callable[..., Accelerator], *arguments: Any, **settings: Any) -> Accelerator:
    """Start accelerate as it starts on GPUs: of processes without one it lets none shard."""
    accelerator = start(*arguments, **settings)
    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", state_dict_type="SHARDED_STATE_DICT"
    )
    return accelerator


def ranks_of(model: nn.Module) -> list[int]:
    """How many ranks the weights are shared out over."""
    weights = list(model.parameters())
    return sorted({weight.device_mesh.size() if isinstance(weight, DTensor) else 1 for weight in weights})


def prepare_and_note(prepare: Callable[..., None], out: Path, *arguments: Any) -> None:
    prepare(*arguments)
    distillation, model, accelerator = arguments
    found = [ranks_of(model), ranks_of(distillation.teacher), len(accelerator._models)]
    out.mkdir(exist_ok=True)
    (out / f"rank-{accelerator.process_index}.json").write_text(json.dumps(found))


def shard(join: Callable[[], object], out: Path) -> None:
    """Before the script, in its process: join the other, and let it shard."""
    join()
    trainer.start_accelerator = functools.partial(start_sharding, trainer.start_accelerator)
    prepare = functools.partial(prepare_and_note, Distillation.prepare, out)
    Distillation.prepare = lambda *arguments: prepare(*arguments)  # type: ignore[method-assign]


def test_two_processes_distil_with_a_sharded_student_and_teacher(
    distilled: dict[str, Any],  # noqa: F811
    write_settings: Callable[[], Path],
    run: Callable[..., Any],
    losses: Callable[[Path], list[float]],
    tmp_path: Path,
) -> None:
    one, two, noted = (tmp_path / name for name in ("one", "two", "noted"))
    command = ("train_image", "--config", write_settings(), "--output_dir", two)
    scripts = start_processes(
        lambda join: Script(*command, stderr_to_stdout=True, before=functools.partial(shard, join, noted))
    )
    for script in scripts:
        result = script.finish()
        assert result.returncode == 0, result.stdout
    # Both are sharded over two ranks, and checkpoints know the student alone.
    assert [json.loads((noted / f"rank-{rank}.json").read_text()) for rank in (0, 1)] == [[[2], [2], 1]] * 2
    assert run("--output_dir", str(one)).returncode == 0
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    pipelines = [MHLAPipeline.from_pretrained(path / "pipeline") for path in (one, two)]
    expected, found = (pipeline.transformer.state_dict() for pipeline in pipelines)
    for name, weight in expected.items():
        assert found[name].numpy() == pytest.approx(weight.numpy(), abs=1e-4), name
