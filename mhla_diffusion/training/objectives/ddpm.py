"""Denoising diffusion with learnt variance: the objective of DiT."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from torch import Tensor

from .objective import NUM_TRAIN_TIMESTEPS, Objective, ObjectiveConfig, as_column, mean_flat


class DDPM(Objective):
    """Noise by mean squared error, variance by the variational bound: the objective of DiT and PixArt.

    ``L = |noise - eps|^2 + L_vlb`` (Nichol and Dhariwal 2021, equations 14 to 16), with L_vlb in bits per
    dimension and its gradient stopped at the mean, so that it trains the variance alone. The model returns 2C
    channels: eps, and v in [-1, 1], which interpolates the log variance between its two bounds. Without
    ``learn_variance`` it returns eps, and the loss is the first term.

    In place of eps a model may return ``x_0`` (sample) or ``sqrt(bar) eps - sqrt(1 - bar) x_0``
    (v_prediction; Salimans and Ho 2022, arXiv 2202.00512); the error is that of what it returns.
    """

    def __init__(self, config: ObjectiveConfig | None = None) -> None:
        config = config or ObjectiveConfig(name="ddpm")
        given = config.prediction_type
        self.prediction_type = "epsilon" if given == "flow_prediction" else given
        self.predicts_variance, self.times = config.learn_variance, config.times
        names = ("beta_schedule", "beta_start", "beta_end")
        self.schedule = {name: getattr(config, name) for name in names}
        self.schedule["prediction_type"] = self.prediction_type
        power = 2 if config.beta_schedule == "scaled_linear" else 1
        ends = (config.beta_start ** (1 / power), config.beta_end ** (1 / power))
        betas = torch.linspace(*ends, NUM_TRAIN_TIMESTEPS, dtype=torch.float64) ** power
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

    def time_at(self, fractions: Tensor) -> Tensor:
        return (NUM_TRAIN_TIMESTEPS * fractions).long()

    def _draw_time(self, generator: torch.Generator) -> Tensor:
        return torch.randint(NUM_TRAIN_TIMESTEPS, (1,), generator=generator)

    def noisy(self, samples: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        return self._at("signal", times, samples) * samples + self._at("noise", times, samples) * noise

    def loss_of(self, prediction: Tensor, samples: Tensor, *, times: Tensor, noise: Tensor) -> Tensor:
        mean, *variance = prediction.chunk(2, dim=1) if self.predicts_variance else (prediction,)
        error = self.difference(mean, self._target(samples, times, noise), times=times)
        if not variance:
            return error
        noisy = self.noisy(samples, times, noise)
        eps = self._eps(mean.detach(), noisy, times)
        return error + self.variational_bound(samples, noisy, times, eps=eps, v=variance[0])

    def difference(self, prediction: Tensor, other: Tensor, *, times: Tensor) -> Tensor:
        return mean_flat((prediction - other) ** 2)

    def _target(self, samples: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        if self.prediction_type == "v_prediction":
            return self._at("signal", times, samples) * noise - self._at("noise", times, samples) * samples
        return samples if self.prediction_type == "sample" else noise

    def _eps(self, prediction: Tensor, noisy: Tensor, times: Tensor) -> Tensor:
        signal, noise = self._at("signal", times, noisy), self._at("noise", times, noisy)
        if self.prediction_type == "v_prediction":
            return signal * prediction + noise * noisy
        return (noisy - signal * prediction) / noise if self.prediction_type == "sample" else prediction

    def variational_bound(
        self, samples: Tensor, noisy: Tensor, times: Tensor, *, eps: Tensor, v: Tensor
    ) -> Tensor:
        """Return the term of the bound at each sample's time, in bits per dimension, ``[B]``.

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
        return torch.where(times == 0, mean_flat(nll), mean_flat(kl)) / math.log(2)

    def scheduler(self) -> DDIMScheduler:
        return DDIMScheduler(
            num_train_timesteps=NUM_TRAIN_TIMESTEPS,
            clip_sample=False,
            **self.schedule,
        )

    def _at(self, name: str, times: Tensor, samples: Tensor) -> Tensor:
        return as_column(self._tables[name].to(samples.device)[times].float(), samples)


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
