"""Linearize: align, choose, distil and report, one after the other; what is done is not done again."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..backbones.teacher import load_teacher
from ..config import MHLAConfig
from ..files.sums import file_sha256, json_sha256
from ..files.text import changes
from ..files.writing import write_file
from ..hub import component_subfolder, expert_times
from ..planning import Plan
from ..processes import in_first_process, process_state
from ..training import DistillationConfig, OptimizerConfig, train
from ..training.checkpoints import list_checkpoints
from ..training.config import decisive_settings
from ..training.export import read_run_config
from .align import align, default_candidates
from .calls import DataCalls, open_calls
from .choose import RECORD as CHOICE
from .choose import choose, require_reachable, save_student
from .job import AlignConfig
from .knapsack import require_share
from .report import ReportConfig, report, require_scores

logger = logging.getLogger(__name__)

# Hidden, as training takes no folder with visible files that are not its own.
_STUDENT = ".student.json"


@dataclass(frozen=True)
class LinearizeConfig:
    """Settings of the four stages.

    Args:
        budget: most cost of self-attention, without its projections, as a share of the teacher's.
        keep: layers that stay as they are.
        align: see :class:`AlignConfig`.
        steps: of distillation; 0 for none.
        batch_size: of distillation; that of the run by default.
        learning_rate: of distillation, which falls to 0 as a cosine.
        distillation: see :class:`DistillationConfig`; attention outputs fade over half of the steps.
        report: see :class:`ReportConfig`.

    Raises:
        ValueError: for steps below 0, and a budget that is no share.
    """

    budget: float = 0.5
    keep: tuple[int, ...] = (0,)
    align: AlignConfig = field(default_factory=AlignConfig)
    steps: int = 2000
    batch_size: int | None = None
    learning_rate: float = 1e-4
    distillation: DistillationConfig | None = None
    report: ReportConfig = field(default_factory=ReportConfig)

    def __post_init__(self) -> None:
        require_share(self.budget)
        if self.steps < 0:
            raise ValueError(f"steps must be 0 (no distillation) or more, got {self.steps}")


def linearize(
    model: str,
    data: str,
    out: str | Path,
    size: Plan,
    *,
    config: LinearizeConfig | None = None,
    candidates: Mapping[str, MHLAConfig] | None = None,
    dtype: torch.dtype = torch.float32,
    grid: Sequence[int] | None = None,
    component: str = "transformer",
) -> int:
    """Convert a softmax model: ``out`` gets aligned/, student/, distilled/ and report/.

    Stopped anywhere, the same call goes on from there; what is done is not done again with other settings.

    Args:
        model: teacher, folder or hub id.
        data: as for :func:`open_calls`. Distillation needs the YAML of a training run.
        out: folder.
        size: that costs, speed and memory are for.
        config: see :class:`LinearizeConfig`.
        candidates: forms by name; :func:`default_candidates` by default.
        dtype: of the teacher in alignment, and of the student.
        grid: of tokens, for data ``samples`` and ``noise``.
        component: of the pipeline.

    Returns:
        0, or the number of the signal that stopped distillation.

    Raises:
        ValueError: what the stages refuse; for a budget that no choice meets and nothing to score against;
            and for other settings than ``out`` was made with, or a distillation of another student than
            that of ``out``, naming them.
    """
    config, out = config or LinearizeConfig(), Path(out)
    if config.steps and component != "transformer":
        raise ValueError(f"training is of the component transformer alone: steps must be 0 for {component}")
    teacher = load_teacher(model, component=component, dtype=dtype, device=process_state().device)
    grid = None if grid is None else tuple(grid)
    calls = open_calls(teacher, data, grid=grid, times=expert_times(model, component))
    require_scores(calls, config.report)
    forms = dict(candidates or default_candidates(calls.grid))
    require_reachable(teacher, forms, size, config.budget, config.keep)
    student, students = out / "student", [str(out / "student")]
    _require_same_choice(student / CHOICE, config, size, forms)
    align(teacher, calls, out / "aligned", candidates=forms, config=config.align, name=model)

    def assemble() -> None:
        if not (student / CHOICE).is_file():
            made, facts = choose(
                teacher, calls, out / "aligned", size, budget=config.budget, keep=config.keep
            )
            save_student(made, facts, model, student, component=component)

    in_first_process(assemble)
    if config.steps and isinstance(calls, DataCalls):
        stopped = distil(model, calls.config, out, config)
        if stopped:
            return stopped
        students.append(str(out / "distilled"))
    elif config.steps:
        logger.warning("no distillation: it needs data, the YAML of a training run, got %s", data)
    report(
        model, students, data, out / "report", size=size, config=config.report, grid=grid,
        component=component, dtype=dtype,
    )  # fmt: skip
    return 0


def _require_same_choice(
    record: Path, config: LinearizeConfig, size: Plan, forms: Mapping[str, MHLAConfig]
) -> None:
    """Check that a student that is there was chosen as it would be now: for this grid, among these forms."""
    if record.is_file():
        old = json.loads(record.read_text())
        given = {name: form.to_dict() for name, form in forms.items()}
        new = {
            "budget": config.budget, "keep": list(config.keep), "size": size.size,
            "candidates": {**old["candidates"], **json.loads(json.dumps(given))},
            "grid": list(size.layout.grid),
        }  # fmt: skip
        # Older records have no grid.
        _refuse(record.parent, changes({key: old.get(key, new[key]) for key in new}, new))


def _what_counts(run: Any) -> dict[str, Any]:
    """Settings of a distillation, without the places of student and teacher."""
    settings = {**decisive_settings(run), "trainer.max_steps": run.trainer.max_steps}
    places = ("model.init_from", "objective.teacher")
    return {key: value for key, value in settings.items() if key not in places}


def _refuse(folder: Path, differences: list[str]) -> None:
    if differences:
        raise ValueError(
            f"{folder} was made with other settings, and is not made again; choose another --out, or remove "
            "it and what came after it:\n  " + "\n  ".join(differences)
        )


def _require_same_student(folder: Path, student: Path) -> None:
    """Check that a distillation that is there began from this student, and note the student of a new one."""
    place = _transformer(student)
    config = _stored_config(place)
    weights = {path.name: file_sha256(path) for path in place.glob("*.safetensors")}
    now = {"student": json_sha256({"config": config, "weights": weights})}
    finished, record = folder / "pipeline", folder / _STUDENT
    if not finished.is_dir() and not list_checkpoints(folder):
        write_file(record, json.dumps(now))
    elif record.is_file():
        _refuse(folder, changes(json.loads(record.read_text()), now))
    elif finished.is_dir():
        # Earlier versions wrote no record. Training changes weights, but not which layers are converted; and
        # a checkpoint of other layers cannot be loaded.
        before = _stored_config(_transformer(finished))
        old, new = ({"attention": its.get("attention")} for its in (before, config))
        _refuse(folder, changes(old, new))


def _transformer(folder: Path) -> Path:
    return folder / (component_subfolder(str(folder), "transformer") or "")


def _stored_config(folder: Path) -> dict[str, Any]:
    """Settings of a stored model, without those of the version and the place that it was written by."""
    found = json.loads((folder / "config.json").read_text("utf-8"))
    return {key: value for key, value in found.items() if not key.startswith("_")}


def distil(teacher: str, run: Any, out: Path, config: LinearizeConfig) -> int:
    """Train the student of ``out`` with its teacher, on the data of a run; see :func:`train`."""
    folder = out / "distilled"
    settings = config.distillation or DistillationConfig(fade_steps=max(1, config.steps // 2))
    trainer = replace(
        run.trainer,
        max_steps=config.steps,
        batch_size=config.batch_size or run.trainer.batch_size,
        optimizer=OptimizerConfig(learning_rate=config.learning_rate, schedule="cosine"),
        # An average that is as long as a short run would be that of its start.
        ema_decay=min(run.trainer.ema_decay, 1 - 10 / max(config.steps, 20)),
        max_grad_norm=run.trainer.max_grad_norm or 1.0,
    )
    if settings.guidance_scale > 1:  # which is in the student then
        run = replace(run, sampling=replace(run.sampling, guidance_scale=1.0))
    whole = replace(
        run,
        model=type(run.model)(init_from=str(out / "student")),
        objective=replace(run.objective, teacher=teacher, distillation=settings),
        trainer=trainer,
        output_dir=str(folder),
    )
    if (folder / "config.yaml").is_file():
        before, after = (_what_counts(its) for its in (read_run_config(folder / "config.yaml"), whole))
        _refuse(folder, changes(before, after))
    in_first_process(lambda: _require_same_student(folder, out / "student"))
    if in_first_process((folder / "pipeline").is_dir):
        return 0
    return train(whole, resume="auto")
