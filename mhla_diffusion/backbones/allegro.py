"""Allegro: videos of texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from accelerate.utils import send_to_device
from diffusers import AllegroTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro
from torch import Tensor

from .grid import Grid, in_tables, send_as_argument, token_grid
from .layer_plan import AttentionChoice, ConfigChoice
from .model import MHLAModelMixin
from .stock import after

_TEXT_TOKENS = 512  # to which the pipeline pads every prompt


class MHLAAllegroTransformer3DModel(MHLAModelMixin, AllegroTransformer3DModel):
    """Allegro with MHLA, plain linear or softmax attention in each layer.

    Takes every argument of :class:`diffusers.AllegroTransformer3DModel` and two more. Its registered config
    rebuilds it. Rotary positions turn the numerators alone, and queries and keys of a softmax window.
    Cross-attention to text stays softmax.

    Args:
        attention: ``"mhla"``, ``"linear"`` (MHLA with one block) or ``"softmax"``, for all layers that
            ``mhla_config.layers`` names or, as a list, for each layer.
        mhla_config: an :class:`~mhla_diffusion.MHLAConfig` or its dict, or one for each layer; the
            defaults when None.

    Raises:
        ValueError: for settings that do not fit together; the message says which and what to do.
    """

    vae_stride = (4, 8, 8)
    presets: ClassVar[dict[str, dict[str, Any]]] = {"Allegro-3B": {}}
    argument_names = {"image_rotary_emb": "rotary_emb"}  # noqa: RUF012
    rotary_halves = 3  # of each axis
    _repeated_blocks = ["AllegroTransformerBlock"]  # noqa: RUF012

    @after(AllegroTransformer3DModel)
    def __init__(
        self,
        stock: dict[str, Any],
        *,
        attention: AttentionChoice = "mhla",
        mhla_config: ConfigChoice = None,
    ) -> None:
        patch = (stock["patch_size_t"], stock["patch_size"], stock["patch_size"])
        grid = tuple(
            stock[f"sample_{axis}"] // size
            for axis, size in zip(("frames", "height", "width"), patch, strict=True)
        )
        self.build(stock, self.plan_layers(attention, mhla_config, stock["num_layers"], grid))
        send_as_argument(self, patch, "image_rotary_emb", in_tables)

    @property
    def default_grid(self) -> Grid:
        config, patch = self.config, self.latents_per_token
        sizes = (config.sample_frames, config.sample_height, config.sample_width)
        return tuple(size // p for size, p in zip(sizes, patch, strict=True))

    def example_inputs(
        self, grid: Grid, *, batch_size: int = 1, generator: torch.Generator | None = None
    ) -> dict[str, Any]:
        config = self.config
        sizes = [tokens * patch for tokens, patch in zip(grid, self.latents_per_token, strict=True)]
        text = (batch_size, _TEXT_TOKENS, config.caption_channels)
        return {
            "hidden_states": torch.randn(batch_size, config.in_channels, *sizes, generator=generator),
            "encoder_hidden_states": torch.randn(*text, generator=generator),
            "timestep": torch.randint(1000, (batch_size,), generator=generator),
            "image_rotary_emb": self._positions(grid),
        }

    def denoising_arguments(
        self, samples: Tensor, timestep: Tensor, conditions: Mapping[str, Any]
    ) -> dict[str, Any]:
        grid = token_grid(samples.shape[2:], self.latents_per_token)
        given = super().denoising_arguments(samples, timestep, conditions)
        return {**given, "image_rotary_emb": send_to_device(self._positions(grid), samples.device)}

    def _positions(self, grid: Grid) -> tuple[Any, Any]:
        """Rotary tables and the positions of tokens in them, as the pipeline makes them."""
        config = self.config
        scales = (config.interpolation_scale_t, config.interpolation_scale_h, config.interpolation_scale_w)
        *tables, frames, rows, columns = get_3d_rotary_pos_embed_allegro(
            config.attention_head_dim, ((0, 0), grid[1:]), grid[1:], grid[0], scales
        )
        positions = torch.cartesian_prod(frames.long(), rows.long(), columns.long()).mT[:, None]
        return tuple(tables), tuple(positions)
