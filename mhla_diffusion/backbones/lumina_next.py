"""Lumina-Next: images of texts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import LuminaNextDiT2DModel
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina
from torch import Tensor

from .families import SquareSampleMixin, square_grid
from .grid import Grid, in_dict, token_grid
from .layer_plan import AttentionChoice, ConfigChoice
from .stock import after

_TEXT_TOKENS = 256  # to which the pipeline cuts every prompt


class MHLALuminaNextDiT2DModel(SquareSampleMixin, LuminaNextDiT2DModel):
    """Lumina-Next with MHLA, plain linear or softmax attention in each layer, on latents of any shape.

    Takes every argument of :class:`diffusers.LuminaNextDiT2DModel` and two more. Its registered config
    rebuilds it. Rotary positions turn the numerators alone, and queries and keys of a softmax window;
    Lumina's norm of queries and keys, over all heads together, stays; heads of keys that queries share are
    repeated. Cross-attention to text stays softmax. The pipeline's ``base_sequence_length``, which sharpens
    softmax on sequences longer than those of the training, says nothing to linear layers, nor to their
    softmax windows (``local``): there ``local="only"`` over one block is another function than stock layers.

    Args:
        attention: ``"mhla"``, ``"linear"`` (MHLA with one block) or ``"softmax"``, for all layers that
            ``mhla_config.layers`` names or, as a list, for each layer.
        mhla_config: an :class:`~mhla_diffusion.MHLAConfig` or its dict, or one for each layer; the
            defaults when None.

    Raises:
        ValueError: for settings that do not fit together; the message says which and what to do.
    """

    time_scale = 1
    vae_stride = (8, 8)
    presets: ClassVar[dict[str, dict[str, Any]]] = {"Lumina-Next-2B": {"num_layers": 24, "num_kv_heads": 8}}
    block_list = "layers"
    argument_names = {  # noqa: RUF012
        "query_rotary_emb": "rotary_emb", "key_rotary_emb": None, "base_sequence_length": None,
        "encoder_hidden_states": None,  # the same tokens
        "attention_mask": None,  # of ones
    }  # fmt: skip
    _repeated_blocks = ["LuminaNextDiTBlock"]  # noqa: RUF012

    @after(LuminaNextDiT2DModel)
    def __init__(
        self,
        stock: dict[str, Any],
        *,
        attention: AttentionChoice = "mhla",
        mhla_config: ConfigChoice = None,
    ) -> None:
        plan = self.plan_layers(attention, mhla_config, stock["num_layers"], square_grid(stock))
        self.build(stock, plan)
        self.send_grid("cross_attention_kwargs", in_dict)

    def time_of(self, timestep: Any) -> Any:
        return 1 - timestep / 1000  # 0 is noise

    def example_inputs(
        self, grid: Grid, *, batch_size: int = 1, generator: torch.Generator | None = None
    ) -> dict[str, Any]:
        config = self.config
        sizes = [tokens * config.patch_size for tokens in grid]
        text = (batch_size, _TEXT_TOKENS, config.cross_attention_dim)
        return {
            "hidden_states": torch.randn(batch_size, config.in_channels, *sizes, generator=generator),
            "timestep": torch.rand(batch_size, generator=generator),
            "encoder_hidden_states": torch.randn(*text, generator=generator),
            "encoder_mask": torch.ones(batch_size, _TEXT_TOKENS),
            "image_rotary_emb": get_2d_rotary_pos_embed_lumina(self.head_dim, *grid),
            "cross_attention_kwargs": {},  # which the stock class must have
        }

    def denoising_arguments(
        self, samples: Tensor, timestep: Tensor, conditions: Mapping[str, Any]
    ) -> dict[str, Any]:
        grid = token_grid(samples.shape[2:], self.latents_per_token)
        given = super().denoising_arguments(samples, timestep, conditions)
        # On larger grids than its own the pipeline has positions closer to each other, at all times.
        closer = math.sqrt(math.prod(grid) / math.prod(self.default_grid))
        return {
            **{name: value for name, value in given.items() if name != "encoder_attention_mask"},
            "encoder_mask": given["encoder_attention_mask"],
            "image_rotary_emb": get_2d_rotary_pos_embed_lumina(self.head_dim, *grid, linear_factor=closer),
            "cross_attention_kwargs": {"base_sequence_length": (self.config.sample_size // 2) ** 2},
        }

    def prediction(self, output: Tensor, samples: Tensor) -> Tensor:
        """Return the velocity from data to noise; the model gives the other way, and a variance of no use."""
        return -output[:, : samples.shape[1]]
