"""Choose: the form of each layer, of least summed error within a budget, and the student put together."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file

from mhla_diffusion.pipelines import MHLAPipeline
from mhla_diffusion.pipelines.identity import mark_converted

from ..backbones import convert_to_mhla
from ..backbones.teacher import attention_layers, fingerprint
from ..config import MHLAConfig
from ..files.writing import require_new_folder, write_folder
from ..hub import component_subfolder
from ..planning import Plan
from .align import job_files, read_aligned
from .calls import Calls
from .costs import layer_costs
from .knapsack import STOCK, Choice, Limits, frontier, require_share, within
from .trial import Trial

logger = logging.getLogger(__name__)

RECORD = "choice.json"


def choose(
    teacher: Any,
    calls: Calls,
    aligned: str | Path,
    plan: Plan,
    *,
    budget: float,
    keep: Sequence[int] = (0,),
    cost: Literal["flops", "latency"] = "flops",
    check: int = 8,
    repairs: int = 20,
) -> tuple[Any, dict[str, Any]]:
    """Choose a form for each layer, check the choice on the assembled model, and assemble it.

    Args:
        teacher: as :func:`load_teacher` gives it.
        calls: as for :func:`align`.
        aligned: its folder.
        plan: of the teacher at the size that costs are for.
        budget: most cost of self-attention, without its projections, as a share of the teacher's.
        keep: layers that stay as they are; a negative number counts from the last.
        cost: FLOPs, or seconds measured here.
        check: calls that assembled models are measured on; 0 for no check.
        repairs: models that a greedy repair may measure, where the sum of errors does not predict that of
            the assembled model.

    Returns:
        The student, and the record that stands beside it.

    Raises:
        ValueError: for numbers below 0, when the layers are of another teacher, a layer to keep does not
            exist, or no choice is within the budget.
    """
    require_share(budget)
    for name, value in (("check", check), ("repairs", repairs)):
        if value < 0:
            raise ValueError(f"{name} must be 0 (none) or more, got {value}")
    record = read_aligned(aligned)
    if record["teacher"] != fingerprint(teacher):
        raise ValueError(f"the layers in {aligned} were aligned to another model than this; align this one")
    count = len(teacher.layer_attention)
    kept = _numbers(keep, count)
    errors = layer_errors(record, count)
    costs = layer_costs(teacher, record, plan, errors, by=cost)
    choices = frontier(errors, costs, keep=kept)
    chosen, notes = within(choices, budget), dict[str, Any]()
    if check:
        made = partial(assemble, record=record, aligned=aligned)
        trial = Trial.of_aligned(teacher, calls, record, check, made)
        chosen, notes = trial.check(choices, chosen, Limits(errors, costs, budget, kept), repairs=repairs)
    asked = Limits(errors, costs, budget, keep)  # layers from the end are kept by negative numbers
    facts = {**describe(record, plan, chosen, choices, asked), "cost_by": cost, "check": notes}
    logger.info(
        "%d of %d layers converted, cost %.3f, error %.4f",
        count - chosen.forms.count(STOCK), count, chosen.cost, chosen.error,
    )  # fmt: skip
    return assemble(teacher, chosen.forms, record, aligned), facts


def require_reachable(
    teacher: Any, candidates: Mapping[str, MHLAConfig], plan: Plan, budget: float, keep: Sequence[int]
) -> None:
    """Check by FLOPs, before layers are aligned, that some choice among candidates is within a budget.

    Raises:
        ValueError: when all cost more, naming the cheapest, or a layer to keep does not exist.
    """
    layers = {name: layer.layer_number for name, layer in attention_layers(teacher).items()}
    forms = {name: form.to_dict() for name, form in candidates.items()}
    count = len(teacher.layer_attention)
    errors = [dict.fromkeys((STOCK, *forms), 0.0) for _ in range(count)]
    costs = layer_costs(teacher, {"candidates": forms, "layers": layers}, plan, errors, by="flops")
    within(frontier(errors, costs, keep=_numbers(keep, count)), budget)


def _numbers(keep: Sequence[int], count: int) -> list[int]:
    """Numbers of layers to keep, counted from the first."""
    if outside := [number for number in keep if not -count <= number < count]:
        raise ValueError(f"keep names layer {outside[0]}, but the layers are 0 to {count - 1}")
    return [number % count for number in keep]


def describe(
    record: Mapping[str, Any], plan: Plan, chosen: Choice, choices: Sequence[Choice], limits: Limits
) -> dict[str, Any]:
    """Return the content of choice.json, for a choice by FLOPs that was not checked."""
    return {
        "model": record["model"], "teacher": record["teacher"], "budget": limits.budget, "cost_by": "flops",
        "size": plan.size, "grid": list(plan.layout.grid), "keep": list(limits.keep),
        "chosen": asdict(chosen), "check": {},
        "curve": [{"cost": choice.cost, "error": choice.error} for choice in choices],
        "errors": limits.errors, "costs": limits.costs, "candidates": record["candidates"],
        "align_seconds": sum(job["seconds"] for jobs in record["jobs"].values() for job in jobs.values()),
    }  # fmt: skip


def layer_errors(record: Mapping[str, Any], count: int) -> list[dict[str, float]]:
    """Return the error of each layer in each form, summed over the branches that have it."""
    errors: list[dict[str, float]] = [{STOCK: 0.0} for _ in range(count)]
    for form, jobs in record["jobs"].items():
        for layer, job in jobs.items():
            of_layer = errors[record["layers"][layer]]
            of_layer[form] = of_layer.get(form, 0.0) + job["error"]
    return errors


def kinds_of(teacher: Any, forms: Sequence[str]) -> list[str]:
    """Return the attention of layers of these forms, as :func:`convert_to_mhla` takes it."""
    return [teacher.stock_attention if form == STOCK else "mhla" for form in forms]


def assemble(teacher: Any, forms: Sequence[str], record: Mapping[str, Any], aligned: str | Path) -> Any:
    """Return the model of aligned layers; the teacher's weights elsewhere are shared with it."""
    any_form = next(iter(record["candidates"]))
    configs = [
        MHLAConfig.from_dict(record["candidates"][any_form if form == STOCK else form]) for form in forms
    ]
    student = convert_to_mhla(teacher, configs, attention=kinds_of(teacher, forms))
    for name, layer in attention_layers(student).items():
        form = forms[layer.layer_number]
        if form != STOCK:
            tensors = load_file(job_files(Path(aligned), name, form)[0])
            own = {key: value.to(teacher.device, teacher.dtype) for key, value in tensors.items()}
            layer.load_state_dict(own, assign=True)
    return student


def save_student(
    student: Any, facts: Mapping[str, Any], teacher: str, out: str | Path, *, component: str = "transformer"
) -> None:
    """Write a student as the pipeline that the teacher came in, or alone, with choice.json beside it.

    Args:
        student, facts: as :func:`choose` gives them.
        teacher: folder or hub id that the teacher was loaded from.
        out: a folder that is not there yet.
        component: of the pipeline.

    Raises:
        ValueError: when ``out`` is there already.
    """
    whole: Any = student
    if component_subfolder(teacher, component) is not None:
        whole = MHLAPipeline.from_pretrained(teacher, dtype=student.dtype)
        whole.register_modules(**{component: student})
        mark_converted(whole, teacher)

    def write(folder: Path) -> None:
        whole.save_pretrained(folder)
        (folder / RECORD).write_text(json.dumps(facts, indent=2))

    write_folder(require_new_folder(out), write)
