"""Runs: a config becomes a model, data and a task, and these go to the trainer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed

from ..backbones.quantised import require_not_quantised
from ..files.locking import only_writer
from ..hub import component_subfolder
from ..processes import in_first_process, one_fate, process_state
from .checkpoints import as_it_began, find_checkpoint
from .config import as_dict
from .objectives import Distillation, build_objective
from .settings import RunConfig
from .task import SampleSheetConfig
from .trainer import Trainer

logger = logging.getLogger(__name__)


def train(config: RunConfig, *, resume: str | None = None, model: Any = None) -> int:
    """Train, and leave ``<output_dir>/pipeline``.

    Args:
        config: of the run.
        resume: ``"latest"``, ``"auto"`` for the latest checkpoint or a new run where there is none, or the
            name or folder of one.
        model: in place of the one that the config builds, as which it has the same weights but their values.

    Returns:
        0, or the number of the signal after which it stopped.

    Raises:
        ValueError: before any work, when parts of the config do not fit together, the data is not what it
            should be, the output folder holds another run, or another process is writing there.
        ConnectionError: when another process of this run has ended.
    """
    output_dir = Path(config.output_dir)
    with one_fate(), ExitStack() as stack:

        def enter() -> Path | None:
            stack.enter_context(only_writer(output_dir))
            return find_checkpoint(output_dir, resume, config)

        checkpoint = in_first_process(enter)
        if checkpoint is not None:
            config = as_it_began(config, checkpoint)
        set_seed(config.trainer.seed)
        objective = build_objective(config.objective)
        model, source, task = config.build(objective, model)
        if isinstance(objective, Distillation):
            objective.check(model)
            objective.unconditional = task.conditioning.unconditional
            warn_of_guidance(objective, task.sampling)
        trainer = Trainer(
            model=model, objective=objective, source=source, task=task, run_config=config,
            checkpoint=checkpoint,
        )  # fmt: skip
        task.conditioning.to(trainer.accelerator.device)
        return trainer.train()


def warn_of_guidance(objective: Distillation, sampling: SampleSheetConfig) -> None:
    """Warn where a student learns guidance, and its sheets of samples would have it twice."""
    learned, wanted = objective.config.guidance_scale, sampling.guidance_scale
    if learned > 1 and sampling.every and wanted > 1 and process_state().is_main_process:
        logger.warning(
            "the student learns a guidance of %g, and sheets are sampled with sampling.guidance_scale %g "
            "on top of it: set that to 1 to see what it has learned",
            learned, wanted,
        )  # fmt: skip


def require_patches(patch: Sequence[int], sizes: Sequence[tuple[int, ...]]) -> None:
    """Check that samples divide into patches.

    Args:
        patch: height and width of a token, of clips frames first.
        sizes: of the samples, along the same axes.

    Raises:
        ValueError: naming one that does not, and the nearest that does.
    """
    axes = ("frames", "height", "width")[-len(patch) :]
    names = "data.frames and data.sizes" if len(patch) == 3 else "data.sizes"
    for size in sizes:
        if any(side % p for side, p in zip(size, patch, strict=True)):
            raise ValueError(
                f"{names} must be multiples of the patch {tuple(patch)} ({', '.join(axes)}), got "
                f"{tuple(size)}; the nearest are "
                f"{tuple(max(1, round(side / p)) * p for side, p in zip(size, patch, strict=True))}"
            )


def new_or_loaded(model_class: Any, config: Any, *, without: Sequence[str] = (), **arguments: Any) -> Any:
    """Build a transformer of a class, or load the one that ``init_from`` names, in fp32.

    Args:
        model_class: of the backbones.
        config: fields of its own, ``mhla`` and ``init_from``; those that are None are left to the class.
        without: fields that are no arguments of the class.
        arguments: further ones, of a new model.

    Raises:
        ValueError: when the model of ``init_from`` is quantised.
    """
    if config.init_from is not None:
        subfolder = component_subfolder(config.init_from, "transformer")
        model = model_class.from_pretrained(config.init_from, subfolder=subfolder, dtype=torch.float32)
        require_not_quantised(model, config.init_from, "training")
        return model
    shape = {
        name: value for name, value in as_dict(config).items() if value is not None and name not in without
    }
    mhla_config = shape.pop("mhla", None)
    return model_class(**shape, mhla_config=mhla_config, **arguments)
