"""AnyFlow: videos of texts in any number of steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import AnyFlowTransformer3DModel

from .families import RotaryVideoMixin
from .grid import Grid, send_with_rope, token_grid
from .layer_plan import AttentionChoice, ConfigChoice
from .stock import after
from .wan import wan_conditions


class MHLAAnyFlowTransformer3DModel(RotaryVideoMixin, AnyFlowTransformer3DModel):
    """AnyFlow with MHLA in its self-attention, as :class:`MHLAWanTransformer3DModel`.

    Takes every argument of :class:`diffusers.AnyFlowTransformer3DModel` and three more. Latents are
    ``[B, F, C, H, W]``.

    Args:
        attention: ``"mhla"``, ``"linear"`` (MHLA with one block) or ``"softmax"``, for all layers that
            ``mhla_config.layers`` names or, as a list, for each layer.
        mhla_config: an :class:`~mhla_diffusion.MHLAConfig` or its dict, or one for each layer; the
            defaults when None.
        sample_grid: as for :class:`MHLAWanTransformer3DModel`.

    Raises:
        ValueError: for settings that do not fit together; the message says which and what to do.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {"AnyFlow-14B": {}}

    @after(AnyFlowTransformer3DModel)
    def __init__(
        self,
        stock: dict[str, Any],
        *,
        attention: AttentionChoice = "mhla",
        mhla_config: ConfigChoice = None,
        sample_grid: tuple[int, int, int] = (21, 30, 52),
    ) -> None:
        self.build_video(stock, attention, mhla_config, sample_grid)
        self.register_forward_pre_hook(_check_size, with_kwargs=True)

    def send_grid(self) -> None:
        send_with_rope(self.rope, _grid_of_layout)

    def example_inputs(
        self, grid: Grid, *, batch_size: int = 1, generator: torch.Generator | None = None
    ) -> dict[str, Any]:
        times = 1000 * torch.rand(2, batch_size, 1, generator=generator).expand(-1, -1, grid[0])
        conditions = wan_conditions(self.config, batch_size, generator)
        return {
            "hidden_states": self.example_latents(grid, batch_size, generator).transpose(1, 2),
            "timestep": times.amax(0),
            "r_timestep": times.amin(0),
            **conditions,
        }

    def at_time(
        self, inputs: Mapping[str, Any], timestep: float, *, until: float | None = None
    ) -> dict[str, Any]:
        drawn = inputs["r_timestep"]
        end = drawn.clamp(max=timestep) if until is None else torch.full_like(drawn, until)
        return {**super().at_time(inputs, timestep), "r_timestep": end}


def _grid_of_layout(layout_cfg: dict[str, Any], device: torch.device) -> Grid:
    """Return the grid that the rope is told."""
    return (layout_cfg["total_frames"], *layout_cfg["full_frame_shape"])


def _check_size(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    latents = args[0] if args else kwargs["hidden_states"]
    token_grid((latents.shape[1], *latents.shape[3:]), model.latents_per_token)
