"""Schedulers held against what a model was trained to predict.

diffusers lets any scheduler step with any prediction: one of another kind gives noise, or a picture that is
merely wrong. What a scheduler takes is not read off its name and settings but measured: a model that knows
the clean sample is asked at every step, and the scheduler must end there.
"""

from __future__ import annotations

import copy
import inspect
import math
from typing import Any

import torch
from diffusers import DDPMParallelScheduler, DDPMScheduler
from torch import Tensor

# What models predict: of noise as in DDPM, ``sqrt(a) x_0 + sqrt(1 - a) noise`` with a = alphas_cumprod[t], or
# as in flow matching, ``(1 - t) x_0 + t noise``: its velocity, or the clean sample.
PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow_prediction", "flow_sample")

_FLOW_SOLVERS = "DPMSolverMultistepScheduler or UniPCMultistepScheduler with use_flow_sigmas=True and"
_FITTING = {
    "flow_prediction": f"FlowMatchEulerDiscreteScheduler, or {_FLOW_SOLVERS} "
    "prediction_type='flow_prediction'",
    "flow_sample": "UniPCMultistepScheduler with use_flow_sigmas=True and prediction_type='sample'",
}

LEARNED_VARIANCES = ("learned", "learned_range")
_STEPS = 32
# What the schedulers of diffusers 0.42 that are right come to: an error at the end of 0.03 where noise has 1,
# and noise on the way that has 1.14 times, or a 1.14th of, what it has in training (DDPM in few steps).
_MAX_ERROR, _MAX_DRIFT = 0.05, 0.14

_measured: dict[tuple[Any, ...], str] = {}


def prediction_of(
    scheduler: Any, *, scaled: bool = True, mu: bool = False, alphas_cumprod: Tensor | None = None
) -> str | None:
    """Return what a model must predict for a scheduler: one of :data:`PREDICTIONS`, or None.

    Args:
        scaled: whether the pipeline scales noise and inputs as the scheduler says (``init_noise_sigma``,
            ``scale_model_input``).
        mu: whether it gives the mu that ``use_dynamic_shifting`` asks for.
        alphas_cumprod: noise of the training, where it was no flow; the scheduler's own by default.
    """
    if scheduler is None:  # pipelines are also made for their encoders alone
        return None
    found = _measure(scheduler, scaled, mu, alphas_cumprod)
    return found if found in PREDICTIONS else None


def require_scheduler(
    scheduler: Any,
    prediction_type: str | None,
    *,
    scaled: bool = True,
    mu: bool = False,
    alphas_cumprod: Tensor | None = None,
) -> None:
    """Check that a scheduler samples from a model that was trained to predict this.

    See :func:`prediction_of` for the arguments.

    Raises:
        ValueError: otherwise, saying which would.
    """
    found = _measure(scheduler, scaled, mu, alphas_cumprod)
    if found == prediction_type:
        return
    does = f"expects {found}" if found in PREDICTIONS else f"cannot sample here ({found})"
    other = (
        f"DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, ... with prediction_type="
        f"{prediction_type!r}, made with from_config(pipe.scheduler.config)"
    )
    raise ValueError(
        f"the model was trained for {prediction_type or 'what its scheduler took'}, but the scheduler "
        f"{type(scheduler).__name__} {does}. "
        f"Take {_FITTING.get(prediction_type or '', other)}"
    )


def scales_inputs(pipeline_class: type[Any]) -> bool:
    """Return True when a pipeline of diffusers scales what the model is shown as its scheduler says."""
    if (own := getattr(pipeline_class, "scales_inputs", None)) is not None:
        return own
    return "scale_model_input" in inspect.unwrap(pipeline_class.__call__).__code__.co_names


def reads_variance(scheduler: Any) -> bool:
    """Return True when a scheduler takes the learned variance behind the prediction."""
    readers = (DDPMScheduler, DDPMParallelScheduler)
    return isinstance(scheduler, readers) and scheduler.config.variance_type in LEARNED_VARIANCES


def _measure(scheduler: Any, scaled: bool, mu: bool, bar: Tensor | None) -> str:
    """Return the prediction that leads to the clean sample, or why none does."""
    bar = getattr(scheduler, "alphas_cumprod", None) if bar is None else bar
    if bar is None:
        bar = (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0)
    key = (type(scheduler), scheduler.to_json_string(), scaled, mu, tuple(bar[::100].tolist()))
    if key not in _measured:
        try:
            distances = {
                name: _distance(copy.deepcopy(scheduler), name, scaled, mu, bar) for name in PREDICTIONS
            }
        except Exception as error:  # whatever a scheduler of diffusers raises
            _measured[key] = f"{type(error).__name__}: {str(error).strip()}"
        else:
            best = min(distances, key=lambda name: distances[name])
            fits = math.isfinite(distances[best])
            _measured[key] = best if fits else "no prediction leads it to a known sample"
    return _measured[key]


@torch.no_grad()
def _distance(scheduler: Any, prediction: str, scaled: bool, mu: bool, bar: Tensor) -> float:
    """How far from the clean sample it ends, and the noise on the way is from training; infinity: too far."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(1, 3, 16, 16, generator=generator) - 0.5
    latents = torch.randn(clean.shape, generator=generator)
    shifted = {"mu": 1.0} if mu and scheduler.config.get("use_dynamic_shifting") else {}
    scheduler.set_timesteps(_STEPS, device="cpu", **shifted)
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    arguments: dict[str, Any] = {"generator": generator} if takes_generator else {}
    if scaled:
        latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)
    logs = []
    for t in scheduler.timesteps:
        shown = latents
        if scaled and hasattr(scheduler, "scale_model_input"):
            shown = scheduler.scale_model_input(latents, t)
        signal, noise_level = _levels(float(t), None if prediction.startswith("flow") else bar)
        noise = (shown - signal * clean) / noise_level
        logs.append(abs(noise.std().log().item()))
        answer = _answer(prediction, clean, noise, signal, noise_level)
        if reads_variance(scheduler):
            answer = torch.cat((answer, torch.zeros_like(answer)), dim=1)
        latents = scheduler.step(answer, t, latents, return_dict=False, **arguments)[0]
    error, drift = (latents - clean).square().mean().sqrt().item(), sum(logs) / len(logs)
    fits = error <= _MAX_ERROR and drift <= _MAX_DRIFT
    return error / _MAX_ERROR + drift / _MAX_DRIFT if fits else math.inf


def _levels(time: float, bar: Tensor | None) -> tuple[float, float]:
    """Factors of the clean sample and of the noise that training puts together at a time, 0 to 1000."""
    if bar is None:  # a flow
        return 1 - time / 1000, max(time / 1000, 1e-3)
    position = min(max(time, 0.0), len(bar) - 1.0)
    below = int(position)
    between = torch.lerp(bar[below].double(), bar[min(below + 1, len(bar) - 1)].double(), position - below)
    return between.sqrt().item(), max((1 - between).sqrt().item(), 1e-3)


def _answer(prediction: str, clean: Tensor, noise: Tensor, signal: float, noise_level: float) -> Tensor:
    """What a model that knows the clean sample returns."""
    if prediction == "epsilon":
        return noise
    if prediction == "v_prediction":
        return signal * noise - noise_level * clean
    return noise - clean if prediction == "flow_prediction" else clean
