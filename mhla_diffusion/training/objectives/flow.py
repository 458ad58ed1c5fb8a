"""Flow matching: the objective of SD3, Wan and Sana."""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from torch import Tensor

from .objective import NUM_TRAIN_TIMESTEPS, Objective, ObjectiveConfig, as_column, mean_flat


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
        self.config, self.times = config, config.times

    def time_at(self, fractions: Tensor) -> Tensor:
        return fractions.clamp(1 / NUM_TRAIN_TIMESTEPS, 1)

    def _draw_time(self, generator: torch.Generator) -> Tensor:
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

    def timestep(self, times: Tensor) -> Tensor:
        return NUM_TRAIN_TIMESTEPS * times

    def noisy(self, samples: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        t = as_column(times, samples)
        return (1 - t) * samples + t * noise

    def loss_of(self, prediction: Tensor, samples: Tensor, *, times: Tensor, noise: Tensor) -> Tensor:
        target = samples if self.config.prediction_type == "sample" else noise - samples
        return self.difference(prediction, target, times=times)

    def difference(self, prediction: Tensor, other: Tensor, *, times: Tensor) -> Tensor:
        error = prediction - other
        if self.config.prediction_type == "sample":
            error = error / as_column(times, error).clamp_min(self.LEAST_TIME)
        weighting = compute_loss_weighting_for_sd3(self.config.weighting_scheme, times)
        return weighting * mean_flat(error**2)

    def scheduler(self) -> FlowMatchEulerDiscreteScheduler | UniPCMultistepScheduler:
        shift = self.config.shift
        if self.config.prediction_type == "sample":  # which the scheduler of Euler steps does not take
            return UniPCMultistepScheduler(
                num_train_timesteps=NUM_TRAIN_TIMESTEPS, prediction_type="sample",
                use_flow_sigmas=True, flow_shift=shift,
            )  # fmt: skip
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=NUM_TRAIN_TIMESTEPS, shift=shift)
