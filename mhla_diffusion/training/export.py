"""Checkpoints as pipelines: what a run has learned so far, without going on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.other import load
from safetensors.torch import load_file
from torch import nn

from mhla_diffusion.pipelines.model_card import CardedPipeline

from ..files.writing import require_new_folder, write_folder
from . import checkpoints
from .adapters import merge_adapters, set_trainable
from .config import parse_config
from .data.fingerprint import fingerprint_of
from .objectives import build_objective
from .settings import RunConfig, Weights, run_facts
from .task import TrainingTask

logger = logging.getLogger(__name__)

# As accelerate names what the trainer registers: the learning rate, the average, the progress.
_AVERAGE = "custom_checkpoint_1.pkl"


def is_run(folder: Path) -> bool:
    """Tell the output folder of a training from one that holds a pipeline."""
    return (folder / "config.yaml").is_file() and not (folder / "model_index.json").is_file()


def newest_model(run: Path) -> Path:
    """Find the newest that a run has written: its finished pipeline, or a checkpoint that is newer than that.

    Raises:
        ValueError: when there is neither, or no checkpoint is whole.
    """
    finished, found = run / "pipeline", checkpoints.list_checkpoints(run)
    if not finished.is_dir() and not found:
        raise ValueError(f"{run} has no pipeline and no checkpoint yet: it is written every checkpoint_every")
    if finished.is_dir() and (not found or found[-1].stat().st_mtime <= finished.stat().st_mtime):
        return finished
    return checkpoints.latest_whole(run)


def open_checkpoint(
    checkpoint: Path, weights: Weights = "averaged", *, dtype: torch.dtype = torch.float32
) -> Any:
    """Load a checkpoint as the pipeline that its run will leave, with all that belongs to it.

    The data of the run must be where they were, as they say what the classes are called.

    Args:
        checkpoint: ``<run>/checkpoints/step-00000100``.
        weights: ``"averaged"``, which is what a finished run leaves, or ``"raw"``, as the optimizer has them.
        dtype: of all weights but those that a model keeps in float32.

    Raises:
        ValueError: when it is not whole, or sharded, or the run's config does not fit what is there.
    """
    task, model, facts = _open(checkpoint, weights)
    facts = task.all_facts(facts)
    pipeline = task.pipeline(transformer=model, training=facts)
    if not isinstance(pipeline, CardedPipeline):  # those of diffusers have no place for it
        pipeline.register_to_config(_training=task.beside(facts))
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            _cast(part, dtype)
    return pipeline


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast weights in place as ``from_pretrained`` does; ``to`` would cast those that are kept, too."""
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, weight in model.state_dict(keep_vars=True).items():
        if weight.is_floating_point() and not kept & set(name.split(".")):
            weight.data = weight.data.to(dtype)


def _open(checkpoint: Path, weights: Weights) -> tuple[TrainingTask, Any, dict[str, Any]]:
    """Return the task of a checkpoint's run, its model and the facts of its training."""
    checkpoints.require_whole(checkpoint)
    config = checkpoints.as_it_began(read_run_config(checkpoint.parents[1] / "config.yaml"), checkpoint)
    objective = build_objective(config.objective)
    model, source, task = config.build(objective)
    set_trainable(model, config.trainable, config.lora)
    _load_weights(model, checkpoint, weights)
    merge_adapters(model)
    step = checkpoints.checkpoint_step(checkpoint)
    facts = run_facts(
        config, len(source), step, objective.facts(), data=fingerprint_of(source), weights=weights
    )
    return task, model.eval(), facts


def export_checkpoint(
    run: str | Path, out: str | Path, *, checkpoint: str | None = None, weights: Weights = "averaged"
) -> Path:
    """Write a checkpoint as a pipeline, with a model card; see :func:`open_checkpoint`.

    Args:
        run: output folder of a training.
        out: a folder that does not exist yet.
        checkpoint: such as ``"step-00000100"``; the last that is whole by default.
        weights: ``"averaged"`` or ``"raw"``.

    Returns:
        The checkpoint.

    Raises:
        ValueError: when there is no such run or checkpoint, or ``out`` is there.
    """
    target, run = require_new_folder(out), Path(run)
    if not is_run(run):
        raise ValueError(f"{run} is no output folder of a training (it has no config.yaml)")
    names = [path.name for path in checkpoints.list_checkpoints(run)]
    if checkpoint is not None and checkpoint not in names:
        raise ValueError(f"{run} has no checkpoint {checkpoint!r}; it has {', '.join(names) or 'none'}")
    folder = checkpoints.latest_whole(run) if checkpoint is None else run / "checkpoints" / checkpoint
    task, model, facts = _open(folder, weights)
    write_folder(target, lambda path: task.save_pipeline(model, path, facts))
    return folder


def read_run_config(path: str | Path) -> RunConfig:
    """Read the config of a run, of whichever kind it is.

    Raises:
        ValueError: when it is of none, with what is wrong for each.
    """
    from .image import ImageTrainingConfig
    from .video import VideoTrainingConfig

    errors: list[str] = []
    for kind in (ImageTrainingConfig, VideoTrainingConfig):
        try:
            return parse_config(kind, ["--config", str(path)])[0]
        except ValueError as error:
            errors.append(f"{kind.__name__}: {error}")
    raise ValueError(f"{path} is of no kind of training. {' '.join(errors)}")


@torch.no_grad()
def _load_weights(model: Any, checkpoint: Path, weights: Weights) -> None:
    file = checkpoint / "model.safetensors"
    if not file.is_file():
        raise ValueError(
            f"{checkpoint} has no {file.name}: it is of a sharded run (FSDP, DeepSpeed); resume it for no "
            "more steps, which leaves a pipeline"
        )
    with checkpoints.read_errors(checkpoint):
        model.load_state_dict(load_file(file))
        if weights == "averaged":
            averages: Sequence[torch.Tensor] = load(checkpoint / _AVERAGE)["shadow_params"]
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            for parameter, average in zip(trained, averages, strict=True):
                parameter.copy_(average)
