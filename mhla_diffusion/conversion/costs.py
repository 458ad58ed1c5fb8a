"""Costs of the forms of a layer: FLOPs by formula, or seconds measured here."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from ..backbones.teacher import attention_layers, layer_calls, place
from ..config import MHLAConfig
from ..planning import Plan
from ..timing import interleaved
from .align import aligned_layer
from .knapsack import STOCK


def layer_costs(
    teacher: Any,
    record: Mapping[str, Any],
    plan: Plan,
    errors: Sequence[Mapping[str, float]],
    *,
    by: str,
) -> list[dict[str, float]]:
    """Return the cost of each layer in each of its forms, as a share of the teacher's self-attention.

    Args:
        teacher: the model.
        record: of the alignment.
        plan: of the size.
        errors: of each layer, by form.
        by: ``"flops"``, of the operator and what is beside it, without projections; or ``"latency"``, of
            whole self-attention layers.

    Raises:
        ValueError: for another word.
    """
    if by not in ("flops", "latency"):
        raise ValueError(f"cost must be flops or latency, got {by!r}")
    forms = {name: MHLAConfig.from_dict(settings) for name, settings in record["candidates"].items()}
    costs = form_flops(plan, forms) if by == "flops" else form_seconds(teacher, plan, forms)
    # A layer and the branches that have its form.
    counts = [list(record["layers"].values()).count(number) for number in range(len(errors))]
    total = costs[STOCK] * sum(counts)
    return [
        {form: count * costs[form] / total for form in table}
        for table, count in zip(errors, counts, strict=True)
    ]


def form_flops(plan: Plan, forms: Mapping[str, MHLAConfig]) -> dict[str, float]:
    """Return the FLOPs of self-attention in a layer without its projections, by form."""
    costs: dict[str, float] = {STOCK: plan.operator_flops(plan.stock_attention)}
    for name, form in forms.items():
        layer = plan.with_config(form).layer_flops("mhla")
        costs[name] = layer["attention operator"] + layer["gate and convolution"]
    return costs


@torch.no_grad()
def form_seconds(teacher: Any, plan: Plan, forms: Mapping[str, MHLAConfig]) -> dict[str, float]:
    """Return the seconds of a self-attention layer on the plan's grid, by form: medians of 5 calls here."""
    name = next(iter(attention_layers(teacher)))
    inputs = place(teacher, teacher.example_inputs(plan.layout.grid))
    call = layer_calls(teacher, inputs, [name])[name]
    layers = {STOCK: copy.deepcopy(teacher.get_submodule(name))}
    for form, config in forms.items():
        layers[form] = aligned_layer(teacher, name, config).to(teacher.device, teacher.dtype)
    runs: list[Callable[[], Any]] = [
        partial(layer, call.hidden_states, *call.args, **call.kwargs) for layer in layers.values()
    ]
    times = interleaved(runs, str(teacher.device), 5)
    return {form: statistics.median(its) for form, its in zip(layers, times, strict=True)}
