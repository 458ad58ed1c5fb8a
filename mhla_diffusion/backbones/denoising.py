"""A model as one that denoises: its times, and its arguments and prediction in the terms of training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from .grid import Grid


class DenoisingMixin:
    """Calls of a model by what every kind of diffusion has: noisy samples, a time, and conditions.

    Attributes:
        time_scale: times are 0 to this.
        time_in_dtype: whether times are given in the dtype of the model, as its pipeline gives them.
        one_by_one: whether texts of several lengths have no place in a call, as the model takes no mask.
    """

    time_scale: ClassVar[int] = 1000
    time_in_dtype: ClassVar[bool] = False
    one_by_one: ClassVar[bool] = False

    config: Any

    @property
    def sample_channels(self) -> int:
        """Channels of samples, with those of what stands beside them."""
        return self.config.in_channels

    @property
    def predicted_channels(self) -> int:
        """Channels of what it predicts for a sample, with those of a variance."""
        return self.config.get("out_channels") or self.config.in_channels

    @property
    def text_shapes(self) -> tuple[tuple[int | None, int], ...]:
        """Tokens, None for any number, and width of the embeddings that it takes, of each text encoder."""
        names = ("caption_channels", "text_embed_dim", "text_dim", "cross_attention_dim")
        return tuple((None, self.config[name]) for name in names if self.config.get(name))[:1]

    def example_inputs(
        self, grid: Grid, *, batch_size: int = 1, generator: torch.Generator | None = None
    ) -> dict[str, Any]:
        """Draw arguments of the forward on a grid of tokens: noise, times, conditions as the pipeline's."""
        raise NotImplementedError

    def time_of(self, timestep: Any) -> Any:
        """Return a time from 0, of data, to 1,000, of noise, as the model counts it."""
        return timestep if self.time_scale == 1000 else timestep * self.time_scale / 1000

    def at_time(
        self, inputs: Mapping[str, Any], timestep: float, *, until: float | None = None
    ) -> dict[str, Any]:
        """Return arguments of the forward at a time from 0, of data, to 1,000, of noise.

        Args:
            inputs: as :meth:`example_inputs` gives them.
            timestep: of the latents.
            until: where the step ends, for models that are told; left as drawn, but no later, by default.
        """
        return {**inputs, "timestep": torch.full_like(inputs["timestep"], self.time_of(timestep))}

    def denoising_arguments(
        self, samples: Tensor, timestep: Tensor, conditions: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return arguments of the forward as the model's pipeline gives them.

        Args:
            samples: noisy, ``[B, C, ...]``.
            timestep: ``[B]``, from 0, of data, to 1,000, of noise.
            conditions: ``encoder_hidden_states`` ``[B, L, D]``, perhaps ``encoder_attention_mask``
                ``[B, L]``, both of a second text encoder with the ending ``_2``, and arguments that the model
                has by these names.
        """
        timestep = self.time_of(timestep)
        if self.time_in_dtype:
            timestep = timestep.to(samples.dtype)
        return {"hidden_states": samples, "timestep": timestep, **conditions}

    def without_mask(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return arguments of a model that takes no mask, with texts cut to their tokens.

        Raises:
            ValueError: for texts of several lengths.
        """
        given = dict(arguments)
        mask = given.pop("encoder_attention_mask", None)
        if mask is None:
            return given
        lengths = mask.sum(1).tolist()
        if len(set(lengths)) > 1:
            raise ValueError(
                f"texts in a call of {type(self).__name__} have one length, got {lengths}: call it apart"
            )
        return {**given, "encoder_hidden_states": given["encoder_hidden_states"][:, : lengths[0]]}

    def prediction(self, output: Tensor, samples: Tensor) -> Tensor:
        """Return what a forward gave for noisy samples as the prediction of an objective, ``[B, C, ...]``."""
        return output


def unwrapped(model: Any) -> Any:
    """Return a model without what wraps it for several processes, or compiles it."""
    wrapped = isinstance(model, nn.Module)
    return extract_model_from_parallel(model, keep_torch_compile=False) if wrapped else model


def denoise(
    model: Callable[..., Any], samples: Tensor, timestep: Tensor, conditions: Mapping[str, Any]
) -> Tensor:
    """Call a model, perhaps wrapped for several processes, and return its prediction.

    Args:
        model: one of ours; or any that is called as ``model(samples, timestep=..., return_dict=False,
            **conditions)`` and returns a tuple, the prediction first.
        samples, timestep, conditions: see :meth:`DenoisingMixin.denoising_arguments`.
    """
    ours = unwrapped(model)
    if not isinstance(ours, DenoisingMixin):
        return model(samples, timestep=timestep, return_dict=False, **conditions)[0]
    arguments = ours.denoising_arguments(samples, timestep, conditions)
    output = model(arguments.pop("hidden_states"), **arguments, return_dict=False)
    return ours.prediction(output if isinstance(output, Tensor) else output[0], samples)
