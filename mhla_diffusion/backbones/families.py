"""What backbones of one family have in common."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .grid import Grid, grid_of_latents, receive_grid, send_as_argument, send_with_rope
from .layer_plan import AttentionChoice, ConfigChoice, LayerPlan
from .model import FULL_WEIGHTS, MHLAModelMixin


def square_grid(config: Mapping[str, Any]) -> Grid:
    """Return the grid of tokens on ``sample_size`` latents along both sides, in patches of ``patch_size``."""
    return (config["sample_size"] // config["patch_size"],) * 2


class SquareSampleMixin(MHLAModelMixin):
    """Stands before models of images, or of single frames, that are made for a :func:`square_grid`."""

    @property
    def default_grid(self) -> Grid:
        return square_grid(self.config)

    def send_grid(self, argument: str, carry: Callable[[Any, Tensor], Any]) -> None:
        """Have an argument of the forward carry the grid to self-attention, and past attention to text.

        Args:
            argument, carry: as :func:`.grid.send_as_argument` takes them.
        """
        send_as_argument(self, self.latents_per_token, argument, carry)
        for block in getattr(self, self.block_list):
            receive_grid(block.attn2)  # which gets the same arguments


class RotaryVideoMixin(MHLAModelMixin):
    """Stands before models of videos whose ``rope`` is given latents ``[B, C, F, H, W]``, as Wan and its kin.

    Their config has ``sample_grid``, tokens along frames, height and width that the model is made for. Only a
    number of blocks in all depends on it.
    """

    vae_stride = (4, 8, 8)
    block_list = "blocks"

    def build_video(
        self,
        stock: dict[str, Any],
        attention: AttentionChoice,
        mhla_config: ConfigChoice,
        sample_grid: Sequence[int],
    ) -> LayerPlan:
        """Make the model as planned; see :meth:`MHLAModelMixin.build`."""
        plan = self.plan_layers(attention, mhla_config, stock["num_layers"], sample_grid)
        self.build(stock, plan)
        self.send_grid()
        self.register_to_config(sample_grid=list(sample_grid))
        return plan

    def send_grid(self) -> None:
        """Have the rope send the grid of the latents that it is given."""
        send_with_rope(
            self.rope, functools.partial(grid_of_latents, patch_size=tuple(self.config.patch_size))
        )

    @property
    def default_grid(self) -> Grid:
        return tuple(self.config.sample_grid)

    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | dict[str, Tensor],
        prefix: str | None = "transformer",
        **kwargs: Any,
    ) -> None:
        """Load as diffusers does, with self-attention that was trained in full beside the adapters.

        That takes the place of what is here, and stays when adapters are unloaded.

        Raises:
            ValueError: for weights that do not fit this model.
        """
        weights = pretrained_model_name_or_path_or_dict
        if isinstance(weights, dict):
            start = f"{prefix}.{FULL_WEIGHTS}." if prefix else f"{FULL_WEIGHTS}."
            full = {key.removeprefix(start): value for key, value in weights.items() if key.startswith(start)}
            weights = {key: value for key, value in weights.items() if not key.startswith(start)}
            self._take_weights(full)
        super().load_lora_adapter(weights, prefix=prefix, **kwargs)

    @torch.no_grad()
    def _take_weights(self, weights: dict[str, Tensor]) -> None:
        own = dict(self.named_parameters())
        for name, weight in weights.items():
            if name not in own or own[name].shape != weight.shape:
                here = tuple(own[name].shape) if name in own else "no such weight"
                raise ValueError(
                    f"these adapters were trained with {name} {tuple(weight.shape)}, and this model has "
                    f"{here}: load them beside the model that they were trained from"
                )
        for name, weight in weights.items():
            own[name].copy_(weight)

    def example_latents(
        self, grid: Grid, batch_size: int, generator: torch.Generator | None, channels: int | None = None
    ) -> Tensor:
        """Draw noise ``[B, C, F, H, W]`` that has this grid of tokens."""
        sizes = [tokens * patch for tokens, patch in zip(grid, self.latents_per_token, strict=True)]
        channels = channels or self.config.in_channels
        return torch.randn(batch_size, channels, *sizes, generator=generator)
