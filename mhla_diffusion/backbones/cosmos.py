"""Cosmos: videos and images of texts, images and videos, of worlds that obey physics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import CosmosTransformer3DModel
from torch import Tensor

from .families import RotaryVideoMixin
from .grid import Grid
from .layer_plan import AttentionChoice, ConfigChoice
from .stock import after

_TEXT_TOKENS = 512  # to which the pipelines pad every prompt


class MHLACosmosTransformer3DModel(RotaryVideoMixin, CosmosTransformer3DModel):
    """Cosmos (Predict 1, 2 and 2.5, Transfer 2.5) with MHLA in its self-attention.

    Takes every argument of :class:`diffusers.CosmosTransformer3DModel` and three more. Its registered config
    rebuilds it. Rotary positions turn the numerators alone, and queries and keys of a softmax window; the
    norm of queries and keys stays. Cross-attention to text and images stays softmax.

    Args:
        attention: ``"mhla"``, ``"linear"`` (MHLA with one block) or ``"softmax"``, for all layers that
            ``mhla_config.layers`` names or, as a list, for each layer.
        mhla_config: an :class:`~mhla_diffusion.MHLAConfig` or its dict, or one for each layer; the
            defaults when None.
        sample_grid: as for :class:`MHLAWanTransformer3DModel`; by default that of 121 frames of 704 x 1280
            pixels with the autoencoder of Predict 1.

    Raises:
        ValueError: for settings that do not fit together; the message says which and what to do.
    """

    time_scale = 1
    time_in_dtype = True
    vae_stride = (8, 8, 8)
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "Cosmos1.0-7B": {},
        "Cosmos-Predict2-2B": {"num_attention_heads": 16, "extra_pos_embed_type": None},
    }
    block_list = "transformer_blocks"
    argument_names = {"image_rotary_emb": "rotary_emb"}  # noqa: RUF012
    rotary_halves = 1
    _repeated_blocks = ["CosmosTransformerBlock"]  # noqa: RUF012

    @after(CosmosTransformer3DModel)
    def __init__(
        self,
        stock: dict[str, Any],
        *,
        attention: AttentionChoice = "mhla",
        mhla_config: ConfigChoice = None,
        sample_grid: tuple[int, int, int] = (16, 44, 80),
    ) -> None:
        self.build_video(stock, attention, mhla_config, sample_grid)

    def example_inputs(
        self, grid: Grid, *, batch_size: int = 1, generator: torch.Generator | None = None
    ) -> dict[str, Any]:
        config = self.config
        latents = self.example_latents(grid, batch_size, generator)
        width = (
            config.crossattn_proj_in_channels if config.use_crossattn_projection else config.text_embed_dim
        )
        text: Any = torch.randn(batch_size, _TEXT_TOKENS, width, generator=generator)
        if config.img_context_dim_in:
            image = (batch_size, config.img_context_num_tokens, config.img_context_dim_in)
            text = (text, torch.randn(*image, generator=generator))
        return {
            "hidden_states": latents,
            "timestep": torch.rand(batch_size, generator=generator),
            "encoder_hidden_states": text,
            "padding_mask": torch.zeros(1, 1, *latents.shape[3:]),
        }

    def denoising_arguments(
        self, samples: Tensor, timestep: Tensor, conditions: Mapping[str, Any]
    ) -> dict[str, Any]:
        given = super().denoising_arguments(samples, timestep, conditions)
        return {**given, "padding_mask": samples.new_zeros(1, 1, *samples.shape[-2:])}
