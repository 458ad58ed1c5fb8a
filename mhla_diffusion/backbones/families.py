"""What backbones of one family have in common."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .grid import Grid, grid_of_latents, receive_grid, send_as_argument, send_with_rope
from .layer_plan import AttentionChoice, ConfigChoice, LayerPlan
from .model import MHLAModelMixin


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

    def example_latents(
        self, grid: Grid, batch_size: int, generator: torch.Generator | None, channels: int | None = None
    ) -> Tensor:
        """Draw noise ``[B, C, F, H, W]`` that has this grid of tokens."""
        sizes = [tokens * patch for tokens, patch in zip(grid, self.latents_per_token, strict=True)]
        channels = channels or self.config.in_channels
        return torch.randn(batch_size, channels, *sizes, generator=generator)
