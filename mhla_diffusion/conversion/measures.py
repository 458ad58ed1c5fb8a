"""Measures of a converted model beside its teacher: losses, samples, branches, speed."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from diffusers.utils import make_image_grid
from PIL import Image
from torch import nn

from ..attention import MHLA
from ..backbones.teacher import place, predict
from ..files.pages import data_uri, written
from ..timing import interleaved, peak_bytes, spread
from ..training.task import TrainingTask
from .calls import TIME_BUCKETS, Calls, DataCalls
from .trial import prediction_error

BRANCHES = ("mixing", "convolution", "gate", "window", "linear")

# A weight of the window, in exponent, beside which the other side is nothing.
_ALL = 1e4


@torch.no_grad()
def losses(model: Any, calls: DataCalls, numbers: Sequence[int]) -> list[float]:
    """Return the loss of a model at each call."""
    return [calls.loss(model, number) for number in numbers]


def by_time(values: Sequence[float], numbers: Sequence[int]) -> list[float]:
    """Return the mean of each tenth of the model's part of the way from data to noise."""
    sums, counts = np.zeros(TIME_BUCKETS), np.zeros(TIME_BUCKETS)
    for value, number in zip(values, numbers, strict=True):
        sums[number % TIME_BUCKETS] += value
        counts[number % TIME_BUCKETS] += 1
    return (sums / counts.clip(1)).tolist()


def ratio(values: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
    """Return sum over sum with its 95 % interval, by bootstrap over pairs: the noise of calls is shared."""
    pairs = np.array([values, others])
    picks = np.random.default_rng(0).integers(pairs.shape[1], size=(1000, pairs.shape[1]))
    sums = pairs[:, picks].sum(-1)
    low, high = np.quantile(sums[0] / sums[1], (0.025, 0.975))
    return {"value": float(pairs[0].sum() / pairs[1].sum()), "interval": [float(low), float(high)]}


@contextmanager
def without(model: nn.Module, branch: str) -> Iterator[int]:
    """Switch a branch off in every layer that has it, inside the with block.

    Args:
        model: with MHLA in it.
        branch: ``"mixing"`` (blocks weigh alike), ``"convolution"`` (those of v, q and k), ``"gate"``,
            ``"window"`` (MHLA alone) or ``"linear"`` (the window alone).

    Yields:
        In how many layers.
    """
    undo: list[tuple[MHLA, str, Any]] = []
    changed: list[tuple[MHLA, nn.Parameter, torch.Tensor]] = []
    for module in (part for part in model.modules() if isinstance(part, MHLA)):
        parts = {"convolution": ("cpe", "conv_q", "conv_k"), "gate": ("gate",)}.get(branch, ())
        for name in (part for part in parts if getattr(module, part) is not None):
            undo.append((module, name, getattr(module, name)))
            setattr(module, name, None)
        if branch == "window" and module.local is not None:
            undo.append((module, "config", module.config))
            module.config = module.config.without_window()
        weights = {"mixing": module.mixing, "linear": module.local}.get(branch)
        if weights is not None:
            changed.append((module, weights, weights.detach().clone()))
            off = _ALL if module.config.window == "gate" else -_ALL
            weights.data.fill_(off if branch == "linear" else 1 / weights.shape[-1])
        if branch == "mixing" and module.strength is not None:  # that of content
            undo.append((module, "strength", module.strength))
            module.strength = None
    try:
        yield len({module for module, *_ in (*undo, *changed)})
    finally:
        for module, name, value in undo:
            setattr(module, name, value)
        for _, weights, before in changed:
            weights.data.copy_(before)


def branch_errors(model: Any, teacher: Any, calls: Calls, numbers: Sequence[int]) -> dict[str, float]:
    """Return the error of prediction against the teacher's with each branch that there is switched off."""
    errors = {}
    for branch in BRANCHES:
        with without(model, branch) as layers:
            if layers:
                errors[branch] = prediction_error(teacher, model, calls, numbers)
    return errors


@torch.no_grad()
def speed(model: Any, teacher: Any, grid: Sequence[int]) -> dict[str, float]:
    """Return the time and the peak bytes of a forward on a grid of tokens.

    Returns:
        ``seconds``, the median of 7 calls that take turns with the teacher's; ``over_teacher``, that median
        over the teacher's; ``spread``, the distance between its quartiles over it; ``bytes``.
    """
    inputs = place(model, model.example_inputs(tuple(grid)))
    device = str(model.device)
    own, others = interleaved([partial(predict, which, inputs) for which in (model, teacher)], device, 7)
    return {
        "seconds": statistics.median(own),
        "over_teacher": statistics.median(own) / statistics.median(others),
        "spread": spread(own) or 0.0,
        "bytes": float(peak_bytes(lambda: predict(model, inputs), device)),
    }


def pictures(model: Any, task: TrainingTask, *, playing: bool) -> list[str]:
    """Draw a run's sample sheet, the same seeds for every model: data URIs of rows, or of playing clips."""
    sheet = task.sample(model, model.device)
    return [_clip(row) if playing else _strip(row) for row in sheet.rows]


def _strip(images: Sequence[Image.Image]) -> str:
    return _uri(make_image_grid(list(images), rows=1, cols=len(images)), "png")


def _clip(frames: Sequence[Image.Image]) -> str:
    first, *rest = (frame.convert("RGB") for frame in frames)
    return _uri(first, "webp", save_all=True, append_images=rest, duration=125, loop=0, lossless=True)


def _uri(image: Image.Image, kind: str, **options: Any) -> str:
    return data_uri(written(image.save, kind, **options), kind)


def training_hours(run: Path) -> float:
    """Return the hours of a training run, from its metrics.jsonl, sampling and saving left out."""
    path, hours, step = run / "metrics.jsonl", 0.0, 0
    if not path.is_file():
        return 0.0
    batch = yaml.safe_load((run / "config.yaml").read_text())["trainer"]["batch_size"]
    for line in map(json.loads, path.read_text().splitlines()):
        hours += (line["step"] - step) * batch / line["samples_per_second"] / 3600
        step = line["step"]
    return hours
