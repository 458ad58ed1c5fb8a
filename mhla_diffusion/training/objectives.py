"""What a diffusion model is trained to predict, and the scheduler that samples from what it learnt.

An objective sees a model, clean samples and one random generator per sample, and returns one loss per sample:
nothing here knows images from video.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000

Denoiser = Callable[..., Any]


@dataclass(frozen=True)
class ObjectiveConfig:
    """Which objective, and its settings.

    Args:
        name: ``"flow"`` (flow matching) or ``"ddpm"`` (noise and variance, as DiT was trained).
        prediction_type: flow only. What the model returns, by diffusers' names: ``"flow_prediction"``, the
            velocity, or ``"sample"``, the clean sample, for models on pixels whose patches hold about as many
            numbers as a token is wide, or more.
        weighting_scheme: flow only. How times are drawn and losses weighted, by diffusers' names:
            ``"logit_normal"`` and ``"mode"`` draw times unevenly, ``"sigma_sqrt"`` and ``"cosmap"`` weight
            losses at even times, ``"none"`` does neither.
        logit_mean, logit_std: of ``logit(t)`` in ``logit_normal``; a higher mean means noisier samples.
        mode_scale: of ``mode``.
        shift: flow only. Moves times towards noise, ``s t / (1 + (s - 1) t)``; the saved scheduler has the
            same shift.

    Raises:
        ValueError: for a scale or shift that is not positive, or a flow setting given to ``ddpm``.
    """

    name: Literal["flow", "ddpm"] = "flow"
    prediction_type: Literal["flow_prediction", "sample"] = "flow_prediction"
    weighting_scheme: Literal["logit_normal", "mode", "sigma_sqrt", "cosmap", "none"] = "logit_normal"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    shift: float = 1.0

    def __post_init__(self) -> None:
        for name in ("logit_std", "shift"):
            if not getattr(self, name) > 0:
                raise ValueError(f"objective.{name} must be positive, got {getattr(self, name)}")
        flow_only = [field for field in fields(self) if field.name != "name"]
        given = [field.name for field in flow_only if getattr(self, field.name) != field.default]
        if self.name == "ddpm" and given:
            raise ValueError(
                f"objective.{given[0]} is for objective.name flow alone; remove it, or set the name to flow"
            )


class Objective(ABC):
    """One loss per sample, for any model called as ``model(noisy, timestep=..., **conditioning)``."""

    predicts_variance: bool
    """Whether the model has 2C output channels: the prediction, then its variance."""

    def loss(
        self,
        model: Denoiser,
        samples: Tensor,
        conditioning: Mapping[str, Any],
        generators: Sequence[torch.Generator],
    ) -> Tensor:
        """The loss at times and noise drawn from each sample's own generator.

        Args:
            model: returns a tuple whose first element is the prediction when ``return_dict=False``.
            samples: clean data ``[B, C, ...]``, about unit scale.
            conditioning: further keyword arguments of the model, each with B rows.
            generators: B generators on the CPU.

        Returns:
            ``[B]``, the mean over the values of each sample.
        """
        times = torch.cat([self.draw_time(generator) for generator in generators]).to(samples.device)
        noise = randn_tensor(
            tuple(samples.shape), generator=list(generators), device=samples.device, dtype=samples.dtype
        )
        return self.loss_at(model, samples, conditioning, times=times, noise=noise)

    @abstractmethod
    def draw_time(self, generator: torch.Generator) -> Tensor:
        """One time, ``[1]``."""

    @abstractmethod
    def loss_at(
        self,
        model: Denoiser,
        samples: Tensor,
        conditioning: Mapping[str, Any],
        *,
        times: Tensor,
        noise: Tensor,
    ) -> Tensor:
        """The loss ``[B]`` at given times ``[B]`` and standard normal noise of the samples' shape."""

    @abstractmethod
    def scheduler(self) -> Any:
        """The diffusers scheduler that samples from a model trained on this objective."""

    def out_channels(self, in_channels: int) -> int:
        """How many channels the model must return."""
        return in_channels * (2 if self.predicts_variance else 1)


class FlowMatching(Objective):
    """Rectified flow: ``x_t = (1 - t) x_0 + t noise``, and the loss is the error of ``noise - x_0``.

    Times are drawn and losses weighted as in Stable Diffusion 3 (Esser et al. 2024, section 3.1). The model
    is given ``1000 t``, as FlowMatchEulerDiscreteScheduler gives it.

    A model of prediction type sample returns ``x_0``, so that it need not carry the noise through its tokens,
    and its velocity is ``(x_t - x_0) / t`` (Li and He 2025, arXiv 2511.13720). That t is at least
    ``LEAST_TIME`` (0.05 there): nearer to the data the error would be weighted without bound.
    """

    LEAST_TIME = 0.1

    predicts_variance = False

    def __init__(self, config: ObjectiveConfig) -> None:
        self.config = config

    def draw_time(self, generator: torch.Generator) -> Tensor:
        config = self.config
        time = compute_density_for_timestep_sampling(
            config.weighting_scheme,
            batch_size=1,
            logit_mean=config.logit_mean,
            logit_std=config.logit_std,
            mode_scale=config.mode_scale,
            generator=generator,
        )
        time = config.shift * time / (1 + (config.shift - 1) * time)
        # The scheduler never asks for less noise than this, and sigma_sqrt has no bound at 0.
        return time.clamp(1 / NUM_TRAIN_TIMESTEPS, 1)

    def loss_at(
        self,
        model: Denoiser,
        samples: Tensor,
        conditioning: Mapping[str, Any],
        *,
        times: Tensor,
        noise: Tensor,
    ) -> Tensor:
        t = _as_column(times, samples)
        noisy = (1 - t) * samples + t * noise
        prediction = model(
            noisy, timestep=NUM_TRAIN_TIMESTEPS * times, return_dict=False, **conditioning
        )[0].float()  # fmt: skip
        if self.config.prediction_type == "sample":
            error = (samples - prediction) / t.clamp_min(self.LEAST_TIME)
        else:
            error = prediction - (noise - samples)
        weighting = compute_loss_weighting_for_sd3(self.config.weighting_scheme, times)
        return weighting * _mean_flat(error**2)

    def scheduler(self) -> FlowMatchEulerDiscreteScheduler | UniPCMultistepScheduler:
        shift = self.config.shift
        if self.config.prediction_type == "sample":  # which the scheduler of Euler steps does not take
            return UniPCMultistepScheduler(
                num_train_timesteps=NUM_TRAIN_TIMESTEPS, prediction_type="sample",
                use_flow_sigmas=True, flow_shift=shift,
            )  # fmt: skip
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=NUM_TRAIN_TIMESTEPS, shift=shift)


class DDPM(Objective):
    """Noise by mean squared error, variance by the variational bound: the objective of DiT.

    ``L = |noise - eps|^2 + L_vlb`` (Nichol and Dhariwal 2021, equations 14 to 16), with L_vlb in bits per
    dimension and its gradient stopped at the mean, so that it trains the variance alone. The model returns 2C
    channels: eps, and v in [-1, 1], which interpolates the log variance between its two bounds.
    """

    predicts_variance = True

    def __init__(self) -> None:
        betas = torch.linspace(1e-4, 0.02, NUM_TRAIN_TIMESTEPS, dtype=torch.float64)
        bar = (1 - betas).cumprod(0)  # alpha bar of t
        previous = F.pad(bar[:-1], (1, 0), value=1.0)  # alpha bar of t - 1
        posterior_variance = betas * (1 - previous) / (1 - bar)
        # At t = 0 the posterior variance is 0: its log takes the value of t = 1.
        log_posterior_variance = torch.cat((posterior_variance[1:2], posterior_variance[1:])).log()
        self._tables = {
            "signal": bar.sqrt(),
            "noise": (1 - bar).sqrt(),
            "posterior_x0": previous.sqrt() * betas / (1 - bar),
            "posterior_xt": (1 - betas).sqrt() * (1 - previous) / (1 - bar),
            "min_log_variance": log_posterior_variance,
            "max_log_variance": betas.log(),
        }

    def draw_time(self, generator: torch.Generator) -> Tensor:
        return torch.randint(NUM_TRAIN_TIMESTEPS, (1,), generator=generator)

    def loss_at(
        self,
        model: Denoiser,
        samples: Tensor,
        conditioning: Mapping[str, Any],
        *,
        times: Tensor,
        noise: Tensor,
    ) -> Tensor:
        noisy = self._at("signal", times, samples) * samples + self._at("noise", times, samples) * noise
        prediction = model(noisy, timestep=times, return_dict=False, **conditioning)[0].float()
        eps, v = prediction.chunk(2, dim=1)
        bound = self.variational_bound(samples, noisy, times, eps=eps.detach(), v=v)
        return _mean_flat((eps - noise) ** 2) + bound

    def variational_bound(
        self, samples: Tensor, noisy: Tensor, times: Tensor, *, eps: Tensor, v: Tensor
    ) -> Tensor:
        """The term of the bound at each sample's time, in bits per dimension, ``[B]``.

        ``KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))``, and ``-log p(x_0 | x_1)`` at t = 0.
        """
        at = {name: self._at(name, times, samples) for name in self._tables}
        predicted_x0 = (noisy - at["noise"] * eps) / at["signal"]
        mean = at["posterior_x0"] * predicted_x0 + at["posterior_xt"] * noisy
        true_mean = at["posterior_x0"] * samples + at["posterior_xt"] * noisy
        fraction = (v + 1) / 2
        log_variance = fraction * at["max_log_variance"] + (1 - fraction) * at["min_log_variance"]
        kl = normal_kl(true_mean, at["min_log_variance"], mean, log_variance)
        nll = discretized_gaussian_nll(samples, mean, log_variance / 2)
        return torch.where(times == 0, _mean_flat(nll), _mean_flat(kl)) / math.log(2)

    def scheduler(self) -> DDIMScheduler:
        return DDIMScheduler(
            num_train_timesteps=NUM_TRAIN_TIMESTEPS,
            beta_start=1e-4,
            beta_end=0.02,
            beta_schedule="linear",
            clip_sample=False,
        )

    def _at(self, name: str, times: Tensor, samples: Tensor) -> Tensor:
        return _as_column(self._tables[name].to(samples.device)[times].float(), samples)


def build_objective(config: ObjectiveConfig) -> Objective:
    """The objective that a config names."""
    return DDPM() if config.name == "ddpm" else FlowMatching(config)


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """``KL(N(mean1, variance1) || N(mean2, variance2))`` of each value, in nats."""
    difference = log_variance2 - log_variance1
    return 0.5 * (difference - 1 + (-difference).exp() + (mean1 - mean2) ** 2 * (-log_variance2).exp())


def discretized_gaussian_nll(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """``-log`` of the mass that a Gaussian puts on the bin of each value, in nats.

    Bins are those of 8-bit images in [-1, 1]: 2 / 255 wide, the outermost ones open (Ho et al. 2020,
    equation 13).
    """
    inverse_std = (-log_std).exp()
    upper = (x - mean + 1 / 255) * inverse_std
    lower = (x - mean - 1 / 255) * inverse_std
    inside = (torch.special.ndtr(upper) - torch.special.ndtr(lower)).clamp_min(1e-12).log()
    log_mass = torch.where(x > 0.999, torch.special.log_ndtr(-lower), inside)
    return -torch.where(x < -0.999, torch.special.log_ndtr(upper), log_mass)


def _as_column(values: Tensor, samples: Tensor) -> Tensor:
    """``[B]`` to ``[B, 1, ...]``."""
    return values.view(-1, *[1] * (samples.ndim - 1))


def _mean_flat(x: Tensor) -> Tensor:
    """``[B, ...]`` to ``[B]``."""
    return x.flatten(1).mean(1)
