"""Sana: images of texts, whose own attention is linear."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import SanaTransformer2DModel
from diffusers.models.transformers.sana_transformer import SanaTransformerBlock
from torch import Tensor

from .families import SquareSampleMixin, square_grid
from .grid import Grid
from .layer_plan import AttentionChoice, ConfigChoice
from .stock import after

_TEXT_TOKENS = 300  # to which the pipeline pads every prompt


class _GridBlock(SanaTransformerBlock):
    """Block that hands the grid it is given to its self-attention, which the stock one does not."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        height: int = 0,
        width: int = 0,
    ) -> Tensor:
        # timestep: the modulation, [B, 6 D].
        assert timestep is not None
        modulation = self.scale_shift_table + timestep.unflatten(-1, (6, -1))
        shift, scale, gate, ff_shift, ff_scale, ff_gate = modulation.chunk(6, dim=1)

        normed = (self.norm1(hidden_states) * (1 + scale) + shift).to(hidden_states.dtype)
        hidden_states = hidden_states + gate * self.attn1(normed, grid=(height, width))

        # In this order, as the sum of bfloat16 takes the strides of the first.
        attended = self.attn2(
            hidden_states, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask
        )
        hidden_states = attended + hidden_states

        normed = self.norm2(hidden_states) * (1 + ff_scale) + ff_shift
        images = self.ff(normed.unflatten(1, (height, width)).permute(0, 3, 1, 2))
        return hidden_states + ff_gate * images.flatten(2, 3).permute(0, 2, 1)


class MHLASanaTransformer2DModel(SquareSampleMixin, SanaTransformer2DModel):
    """Sana with MHLA in place of its linear attention.

    Takes every argument of :class:`diffusers.SanaTransformer2DModel` and two more. Its registered config
    rebuilds it. Sana's own attention is MHLA with one block, so that MHLA whose blocks see all alike,
    without a softmax window, is the stock model. Cross-attention to text stays softmax.

    Args:
        attention: ``"mhla"`` or ``"linear"`` (Sana's own), for all layers that ``mhla_config.layers`` names
            or, as a list, for each layer.
        mhla_config: an :class:`~mhla_diffusion.MHLAConfig` or its dict, or one for each layer; the
            defaults when None.

    Raises:
        ValueError: for settings that do not fit together; the message says which and what to do.
    """

    stock_attention = "linear"
    vae_stride = (32, 32)
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "Sana-0.6B": {
            "num_attention_heads": 36, "num_layers": 28, "num_cross_attention_heads": 16,
            "cross_attention_head_dim": 72, "cross_attention_dim": 1152,
        },
        "Sana-1.6B": {},
    }  # fmt: skip
    _repeated_blocks = ["_GridBlock"]  # noqa: RUF012
    _no_split_modules = ["_GridBlock", "PatchEmbed", "SanaModulatedNorm"]  # noqa: RUF012

    @after(SanaTransformer2DModel)
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
            block.__class__ = _GridBlock

    def time_of(self, timestep: Any) -> Any:
        return super().time_of(timestep) * self.config.timestep_scale

    def example_inputs(
        self, grid: Grid, *, batch_size: int = 1, generator: torch.Generator | None = None
    ) -> dict[str, Any]:
        config = self.config
        sizes = [tokens * config.patch_size for tokens in grid]
        text = (batch_size, _TEXT_TOKENS, config.caption_channels)
        return {
            "hidden_states": torch.randn(batch_size, config.in_channels, *sizes, generator=generator),
            "timestep": self.time_of(torch.randint(1000, (batch_size,), generator=generator)),
            "encoder_hidden_states": torch.randn(*text, generator=generator),
        }
