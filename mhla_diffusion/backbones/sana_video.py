"""SanaVideo: videos of texts, whose own attention is linear."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import SanaVideoTransformer3DModel

from .families import RotaryVideoMixin
from .grid import Grid
from .layer_plan import AttentionChoice, ConfigChoice
from .stock import after

_TEXT_TOKENS = 300  # to which the pipeline pads every prompt


class MHLASanaVideoTransformer3DModel(RotaryVideoMixin, SanaVideoTransformer3DModel):
    """SanaVideo with MHLA in place of its linear attention.

    Takes every argument of :class:`diffusers.SanaVideoTransformer3DModel` and three more. Its registered
    config rebuilds it. SanaVideo's own attention is MHLA with one block, so that MHLA with its mixing at the
    start 1 / M is the stock model. Cross-attention to text stays softmax.

    Args:
        attention: ``"mhla"`` or ``"linear"`` (SanaVideo's own), for all layers that ``mhla_config.layers``
            names or, as a list, for each layer.
        mhla_config: an :class:`~mhla_diffusion.MHLAConfig` or its dict, or one for each layer; the
            defaults when None.
        sample_grid: as for :class:`MHLAWanTransformer3DModel`.

    Raises:
        ValueError: for settings that do not fit together; the message says which and what to do.
    """

    stock_attention = "linear"
    presets: ClassVar[dict[str, dict[str, Any]]] = {"Sana-Video-2B": {}}
    block_list = "transformer_blocks"
    _repeated_blocks = ["SanaVideoTransformerBlock"]  # noqa: RUF012

    @after(SanaVideoTransformer3DModel)
    def __init__(
        self,
        stock: dict[str, Any],
        *,
        attention: AttentionChoice = "mhla",
        mhla_config: ConfigChoice = None,
        sample_grid: tuple[int, int, int] = (21, 30, 52),
    ) -> None:
        self.build_video(stock, attention, mhla_config, sample_grid)

    def example_inputs(
        self, grid: Grid, *, batch_size: int = 1, generator: torch.Generator | None = None
    ) -> dict[str, Any]:
        shape = (batch_size, _TEXT_TOKENS, self.config.caption_channels)
        return {
            "hidden_states": self.example_latents(grid, batch_size, generator),
            "timestep": 1000 * torch.rand(batch_size, generator=generator),
            "encoder_hidden_states": torch.randn(*shape, generator=generator),
        }
