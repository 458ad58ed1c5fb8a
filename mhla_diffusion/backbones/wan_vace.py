"""Wan VACE: videos of texts, images and other videos."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import WanVACETransformer3DModel

from .families import RotaryVideoMixin
from .grid import Grid
from .layer_plan import AttentionChoice, ConfigChoice
from .stock import after
from .wan import wan_conditions


class MHLAWanVACETransformer3DModel(RotaryVideoMixin, WanVACETransformer3DModel):
    """Wan VACE with MHLA in its self-attention, as :class:`MHLAWanTransformer3DModel`.

    Takes every argument of :class:`diffusers.WanVACETransformer3DModel` and three more.
    A layer of the control branch has the attention of the layer that it adds to.

    Args:
        attention: ``"mhla"``, ``"linear"`` (MHLA with one block) or ``"softmax"``, for all layers that
            ``mhla_config.layers`` names or, as a list, for each layer.
        mhla_config: an :class:`~mhla_diffusion.MHLAConfig` or its dict, or one for each layer; the
            defaults when None.
        sample_grid: as for :class:`MHLAWanTransformer3DModel`.

    Raises:
        ValueError: for settings that do not fit together; the message says which and what to do.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "Wan2.1-VACE-1.3B": {
            "num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960, "vace_layers": [*range(0, 30, 2)],
        }
    }  # fmt: skip

    @after(WanVACETransformer3DModel)
    def __init__(
        self,
        stock: dict[str, Any],
        *,
        attention: AttentionChoice = "mhla",
        mhla_config: ConfigChoice = None,
        sample_grid: tuple[int, int, int] = (21, 30, 52),
    ) -> None:
        plan = self.build_video(stock, attention, mhla_config, sample_grid)
        for block, number in zip(self.vace_blocks, self.config.vace_layers, strict=True):
            self.set_layer(block.attn1, number, plan)

    @classmethod
    def with_depth(cls, arguments: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
        default = inspect.signature(cls.__init__).parameters["vace_layers"].default
        layers = [layer for layer in arguments.get("vace_layers", default) if layer < num_layers]
        return {**arguments, "num_layers": num_layers, "vace_layers": layers}

    def branch_kinds(self, kinds: Sequence[str]) -> list[str]:
        return [kinds[number] for number in self.config.vace_layers]

    def example_inputs(
        self, grid: Grid, *, batch_size: int = 1, generator: torch.Generator | None = None
    ) -> dict[str, Any]:
        return {
            "hidden_states": self.example_latents(grid, batch_size, generator),
            "timestep": 1000 * torch.rand(batch_size, generator=generator),
            **wan_conditions(self.config, batch_size, generator),
            "control_hidden_states": self.example_latents(
                grid, batch_size, generator, self.config.vace_in_channels
            ),
        }
