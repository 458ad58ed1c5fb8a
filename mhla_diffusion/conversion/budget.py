"""Budget of a conversion, before it is begun: bytes of the cache, memory, and GPU-hours by stage.

FLOPs are those of :mod:`mhla_diffusion.planning`; a backward costs two forwards. Hours assume a sustained
rate, which is the one number here that is not computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..config import MHLAConfig
from ..planning import Plan, count_parameters
from ..training import DistillationConfig
from .cache import sample_bytes
from .costs import form_flops
from .job import AlignConfig
from .knapsack import STOCK

# Of full training in mixed precision: float32 weights, gradients, two moments of Adam, average.
_TRAINED_BYTES = 4 + 4 + 8 + 4


@dataclass(frozen=True)
class ConversionBudget:
    """Budget of a conversion; ``str(budget)`` is a table.

    Args:
        model, size: what the table calls them.
        parameters: of the model.
        layer_bytes: of the activations of a layer.
        cache_bytes: of the largest group of layers, on disk at a time.
        groups: passes of the teacher that fill the cache.
        gpus: that share the work.
        memory: bytes of weights, gradients, optimizer, average and teacher on a GPU in distillation, sharded.
        hours: GPU-hours by stage.
    """

    model: str
    size: str
    parameters: int
    layer_bytes: int
    cache_bytes: int
    groups: int
    gpus: int
    memory: float
    hours: Mapping[str, float]

    def __str__(self) -> str:
        lines = [
            f"{self.model}, {self.size}: {self.parameters / 1e9:.2f} B parameters",
            f"activations: {self.layer_bytes / 1e9:.3g} GB a layer, {self.cache_bytes / 1e9:.3g} GB at a "
            f"time, in {self.groups} passes of the teacher",
            f"distillation: {self.memory / 1e9:.3g} GB of weights and states on each of {self.gpus} GPUs, "
            "activations aside",
            *(f"  {stage:10} {hours:10.3g} GPU-hours" for stage, hours in self.hours.items()),
        ]
        return "\n".join(lines)


def conversion_budget(
    plan: Plan,
    candidates: Mapping[str, MHLAConfig],
    align: AlignConfig,
    *,
    steps: int,
    batch_size: int,
    distillation: DistillationConfig | None = None,
    gpus: int = 1,
    tflops: float = 300.0,
) -> ConversionBudget:
    """Return what a conversion takes.

    Args:
        plan: of the model and size.
        candidates, align: of the alignment.
        steps, batch_size: of distillation, all weights trained, with gradient checkpointing.
        distillation: whose teacher has a dtype, and is asked twice where guidance is distilled.
        gpus: that share the work.
        tflops: sustained by each, 1e12 FLOPs a second; an H100 does about 300 to 400 in bfloat16 of its 990.

    Raises:
        ValueError: for no GPU, or one that does nothing.
    """
    if gpus < 1 or not 0 < tflops < math.inf:
        raise ValueError(f"gpus must be at least 1 and tflops above 0, got {gpus} and {tflops:g}")
    distillation = distillation or DistillationConfig()
    asked = 2 if distillation.guidance_scale > 1 else 1
    tokens, width = plan.layout.num_tokens, plan.heads * plan.head_dim
    layer_bytes = align.all_samples * sample_bytes(tokens, width, getattr(torch, align.dtype))
    layers = min(plan.operators, max(1, int(align.disk * 1e9 // layer_bytes)))
    groups = math.ceil(plan.operators / layers)
    teacher = plan.rest + plan.operators * plan.operator_flops(plan.stock_attention)
    forms = form_flops(plan, candidates)
    measured = align.held_out * (align.steps // align.evaluate_every)
    passes = 3 * align.steps * align.batch_size + measured
    job = sum((plan.projections + flops) * passes for name, flops in forms.items() if name != STOCK)
    student = plan.rest + plan.operators * max(flops for name, flops in forms.items() if name != STOCK)
    flops = {
        "cache": groups * align.all_samples * teacher,
        "align": plan.operators * job,
        "distil": steps * batch_size * (4 * student + asked * teacher),  # forward, again, backward
    }
    parameters = count_parameters(plan.model)
    return ConversionBudget(
        model=plan.model, size=plan.size, parameters=parameters, layer_bytes=layer_bytes,
        cache_bytes=layers * layer_bytes, groups=groups, gpus=gpus,
        memory=parameters * (_TRAINED_BYTES + getattr(torch, distillation.teacher_dtype).itemsize) / gpus,
        hours={stage: count / (tflops * 1e12) / 3600 for stage, count in flops.items()},
    )  # fmt: skip
