"""Latte: videos of texts, by spatial layers within frames and temporal layers across them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import LatteTransformer3DModel
from torch import Tensor, nn

from .families import SquareSampleMixin, square_grid
from .grid import Grid, carrier_of, in_dict, receive_grid
from .layer_plan import AttentionChoice, ConfigChoice
from .stock import after

_TEXT_TOKENS = 120  # to which the pipeline pads every prompt


class MHLALatteTransformer3DModel(SquareSampleMixin, LatteTransformer3DModel):
    """Latte with MHLA, plain linear or softmax attention in each spatial layer.

    Takes every argument of :class:`diffusers.LatteTransformer3DModel` and two more. Its registered config
    rebuilds it. The grid is that of a frame. Temporal attention, over the 16 frames at one place, stays
    softmax, as does cross-attention to text.

    Args:
        attention: ``"mhla"``, ``"linear"`` (MHLA with one block) or ``"softmax"``, for all spatial layers
            that ``mhla_config.layers`` names or, as a list, for each of them.
        mhla_config: an :class:`~mhla_diffusion.MHLAConfig` or its dict, or one for each layer; the
            defaults when None.

    Raises:
        ValueError: for settings that do not fit together; the message says which and what to do.
    """

    vae_stride = (8, 8)
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "Latte-1": {
            "attention_head_dim": 72, "in_channels": 4, "out_channels": 8, "num_layers": 28,
            "cross_attention_dim": 1152, "attention_bias": True, "patch_size": 2,
            "activation_fn": "gelu-approximate", "num_embeds_ada_norm": 1000, "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False, "norm_eps": 1e-6, "caption_channels": 4096,
        }
    }  # fmt: skip
    one_by_one = True
    _repeated_blocks = ["BasicTransformerBlock"]  # noqa: RUF012

    @after(LatteTransformer3DModel)
    def __init__(
        self,
        stock: dict[str, Any],
        *,
        attention: AttentionChoice = "mhla",
        mhla_config: ConfigChoice = None,
    ) -> None:
        plan = self.plan_layers(attention, mhla_config, stock["num_layers"], square_grid(stock))
        self.build(stock, plan)
        for block in self.transformer_blocks:
            block.register_forward_pre_hook(_take_grid_from_mask)
            receive_grid(block.attn2)  # which gets the same keyword arguments

    @property
    def grids_of_sample(self) -> int:
        return self.config.video_length

    def example_inputs(
        self, grid: Grid, *, batch_size: int = 1, generator: torch.Generator | None = None
    ) -> dict[str, Any]:
        config = self.config
        sizes = [tokens * config.patch_size for tokens in grid]
        latents = (batch_size, config.in_channels, config.video_length, *sizes)
        text = (batch_size, _TEXT_TOKENS, config.caption_channels)
        return {
            "hidden_states": torch.randn(*latents, generator=generator),
            "timestep": torch.randint(1000, (batch_size,), generator=generator),
            "encoder_hidden_states": torch.randn(*text, generator=generator),
        }

    def denoising_arguments(
        self, samples: Tensor, timestep: Tensor, conditions: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return arguments of the forward as the pipeline gives them for one prompt.

        Raises:
            ValueError: for texts of several lengths, of which it gives the model no mask.
        """
        return self.without_mask(super().denoising_arguments(samples, timestep, conditions))

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        enable_temporal_attentions: bool = True,
        return_dict: bool = True,
    ) -> Any:
        """Predict for noisy latents ``[B, C, F, H, W]``, as :class:`diffusers.LatteTransformer3DModel` does.

        Raises:
            ValueError: when H or W is not a multiple of the patch size, or a grid cannot hold the blocks.
        """
        # The mask is the one argument that spatial blocks are handed as it is.
        mask = (encoder_attention_mask, carrier_of(hidden_states, self.latents_per_token))
        return super().forward(
            hidden_states, timestep, encoder_hidden_states, mask, enable_temporal_attentions, return_dict
        )


def _take_grid_from_mask(block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Put the grid into the keyword arguments of a block's attention layers."""
    hidden_states, mask, text, (text_mask, carrier), timestep, kwargs, *rest = args
    return hidden_states, mask, text, text_mask, timestep, in_dict(kwargs, carrier), *rest
