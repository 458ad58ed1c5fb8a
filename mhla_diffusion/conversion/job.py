"""Job of alignment: one layer in one form, trained on cached activations to give the teacher's output."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..arguments import require_seed
from ..backbones.teacher import LayerCall
from ..training.data.stream import FOR_ORDER, sample_generator
from .cache import Activations

# That errors are relative to where a layer gives 0, far below what any other does.
_LEAST = 1e-12


@dataclass(frozen=True)
class AlignConfig:
    """Settings of the alignment of layers.

    Args:
        samples: calls of the teacher that layers are trained on.
        held_out: further calls, that errors are measured on.
        steps: of each layer, at most.
        batch_size: samples in a step.
        learning_rate: of what is new in a layer, by AdamW.
        old_learning_rate: of its projections and norms; 0 freezes them.
        evaluate_every: steps between measurements; the best weights are kept.
        patience: measurements without a better one, after which a layer is done.
        disk: GB of activations at a time, at most; layers are done in groups that fit.
        dtype: of the activations on disk.
        seed: of the order of the samples.

    Raises:
        ValueError: for a number outside its range.
    """

    samples: int = 64
    held_out: int = 20
    steps: int = 400
    batch_size: int = 4
    learning_rate: float = 1e-3
    old_learning_rate: float = 1e-4
    evaluate_every: int = 50
    patience: int = 3
    disk: float = 20.0
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("samples", "held_out", "steps", "batch_size", "evaluate_every", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if not (0 < self.learning_rate < math.inf and 0 < self.disk < math.inf):
            raise ValueError(
                "learning_rate and disk must be positive and finite, got "
                f"{self.learning_rate} and {self.disk}"
            )
        if not 0 <= self.old_learning_rate < math.inf:
            raise ValueError(f"old_learning_rate must be 0 or more, and finite, got {self.old_learning_rate}")
        require_seed(self.seed)

    @property
    def all_samples(self) -> int:
        """Samples to train on and held out."""
        return self.samples + self.held_out

    @property
    def held_out_numbers(self) -> range:
        """Numbers of the calls that are held out."""
        return range(self.samples, self.all_samples)

    def kept(self) -> dict[str, Any]:
        """Return everything that the result depends on."""
        return {name: value for name, value in asdict(self).items() if name != "disk"}


def train_layer(
    layer: nn.Module,
    call: LayerCall,
    activations: Activations,
    config: AlignConfig,
    buckets: Sequence[int],
) -> dict[str, Any]:
    """Train a layer by the mean of ``|y' - y|``, and leave it with the weights of least held-out error.

    Args:
        layer: in its new form, with what is new under ``processor``.
        call: of the teacher's layer, for all that is no hidden state.
        activations: of the layer.
        config: see :class:`AlignConfig`.
        buckets: tenth of the way to noise of each held-out sample.

    Returns:
        ``error`` and ``before``, held out; ``by_time``, errors by tenth; ``curve``, (step, error) pairs;
        ``steps``; ``seconds``.
    """
    started, optimizer = time.perf_counter(), _optimizer(layer, config)
    errors = held_out_errors(layer, call, activations, config)
    before = best = _mean(errors)
    curve, kept, waited, step = [(0, before)], _copy(layer), 0, 0
    order = _Order(config)
    while step < config.steps and waited < config.patience:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * (1 - step / config.steps)
        inputs, outputs = activations.read(order.take())
        difference = call.replay(layer, inputs.to(call.hidden_states.device)) - outputs.to(
            call.hidden_states.device
        )
        loss = difference.abs().mean() / outputs.abs().mean().clamp_min(_LEAST)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % config.evaluate_every == 0 or step == config.steps:
            found = held_out_errors(layer, call, activations, config)
            curve.append((step, _mean(found)))
            waited = 0 if curve[-1][1] < best else waited + 1
            if curve[-1][1] < best:
                best, errors, kept = curve[-1][1], found, _copy(layer)
    layer.load_state_dict(kept)
    return {
        "error": best, "before": before, "by_time": _by_bucket(errors, buckets), "curve": curve,
        "steps": step, "seconds": time.perf_counter() - started,
    }  # fmt: skip


@torch.no_grad()
def held_out_errors(
    layer: nn.Module, call: LayerCall, activations: Activations, config: AlignConfig
) -> list[float]:
    """Return ``sum |y' - y| / sum |y|`` of each held-out sample, a very large number where y is 0."""
    errors = []
    for number in config.held_out_numbers:
        inputs, outputs = activations.read([number])
        outputs = outputs.to(call.hidden_states.device)
        difference = call.replay(layer, inputs.to(call.hidden_states.device)) - outputs
        errors.append(float(difference.abs().sum() / outputs.abs().sum().clamp_min(_LEAST)))
    return errors


class _Order:
    """Numbers of the samples of each batch: permutations, one after the other."""

    def __init__(self, config: AlignConfig) -> None:
        self._config, self._epoch, self._left = config, 0, list[int]()

    def take(self) -> list[int]:
        while len(self._left) < self._config.batch_size:
            generator = sample_generator(self._config.seed, self._epoch, FOR_ORDER)
            self._left += torch.randperm(self._config.samples, generator=generator).tolist()
            self._epoch += 1
        batch, self._left = self._left[: self._config.batch_size], self._left[self._config.batch_size :]
        return batch


def _optimizer(layer: nn.Module, config: AlignConfig) -> torch.optim.Optimizer:
    """AdamW, in which what is new learns faster; the clamp of mixing follows every step of it."""
    parts: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in layer.named_parameters():
        parts[name.startswith("processor.")].append(parameter)
    groups = [
        {"params": parts[is_new], "lr": rate, "peak": rate}
        for is_new, rate in ((True, config.learning_rate), (False, config.old_learning_rate))
        if parts[is_new] and rate > 0
    ]
    if not groups:
        raise ValueError("nothing in the layer is new, and old_learning_rate 0 freezes the rest; raise it")
    return torch.optim.AdamW(groups, weight_decay=0.0)


def _copy(layer: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in layer.state_dict().items()}


def _mean(errors: Sequence[float]) -> float:
    mean = sum(errors) / len(errors)
    return mean if math.isfinite(mean) else math.inf


def _by_bucket(errors: Sequence[float], buckets: Sequence[int]) -> dict[str, float]:
    """Mean error of each tenth of the time that has samples."""
    return {
        str(bucket): _mean([error for error, its in zip(errors, buckets, strict=True) if its == bucket])
        for bucket in sorted(set(buckets))
    }
