"""LTX-Video: videos of texts and images."""

from __future__ import annotations

import math
import operator
from typing import Any, ClassVar

import torch
from diffusers import LTXVideoTransformer3DModel
from torch import Tensor

from .grid import Grid, send_with_rope
from .model import AttentionChoice, ConfigChoice, MHLAModelMixin
from .stock import after

_TEXT_TOKENS = 128  # to which the pipeline pads every prompt


class MHLALTXVideoTransformer3DModel(MHLAModelMixin, LTXVideoTransformer3DModel):
    """LTX-Video with MHLA, plain linear or softmax attention in each layer.

    Takes every argument of :class:`diffusers.LTXVideoTransformer3DModel` and three more. Its registered
    config rebuilds it. Rotary positions turn the numerators alone; LTX's norm of queries and keys, over all
    heads together, stays. Cross-attention to text stays softmax. The forward must be given ``num_frames``,
    ``height`` and ``width``, which say the grid.

    Args:
        attention: ``"mhla"``, ``"linear"`` (MHLA with one block) or ``"softmax"``, for all layers that
            ``mhla_config.layers`` names or, as a list, for each layer.
        mhla_config: an :class:`~mhla_diffusion.MHLAConfig` or its dict, or one for each layer; the
            defaults when None.
        sample_grid: tokens along frames, height and width that the model is made for; by default that of 121
            frames of 512 x 704 pixels.

    Raises:
        ValueError: for settings that do not fit together; the message says which and what to do.
    """

    vae_stride = (8, 32, 32)
    presets: ClassVar[dict[str, dict[str, Any]]] = {"LTX-Video-2B": {}}

    @after(LTXVideoTransformer3DModel)
    def __init__(
        self,
        stock: dict[str, Any],
        *,
        attention: AttentionChoice = "mhla",
        mhla_config: ConfigChoice = None,
        sample_grid: tuple[int, int, int] = (16, 16, 22),
    ) -> None:
        self.build(stock, self.plan_layers(attention, mhla_config, stock["num_layers"], sample_grid))
        send_with_rope(self.rope, _grid_of_sizes)
        self.register_to_config(sample_grid=list(sample_grid))

    @property
    def default_grid(self) -> Grid:
        return tuple(self.config.sample_grid)

    @property
    def latents_per_token(self) -> Grid:
        return (self.config.patch_size_t, self.config.patch_size, self.config.patch_size)

    def example_inputs(
        self, grid: Grid, *, batch_size: int = 1, generator: torch.Generator | None = None
    ) -> dict[str, Any]:
        config = self.config
        text = (batch_size, _TEXT_TOKENS, config.caption_channels)
        tokens = (batch_size, math.prod(grid), config.in_channels)
        return {
            "hidden_states": torch.randn(*tokens, generator=generator),
            "timestep": torch.randint(1000, (batch_size,), generator=generator),
            "encoder_hidden_states": torch.randn(*text, generator=generator),
            "encoder_attention_mask": torch.ones(batch_size, _TEXT_TOKENS),
            **dict(zip(("num_frames", "height", "width"), grid, strict=True)),
        }


def _grid_of_sizes(hidden_states: Tensor, *sizes: Any) -> Grid:
    """Return the grid that the rope is told."""
    if None in sizes[:3]:
        raise ValueError("MHLA needs the grid of its tokens: give num_frames, height and width to the model")
    return tuple(map(operator.index, sizes[:3]))
