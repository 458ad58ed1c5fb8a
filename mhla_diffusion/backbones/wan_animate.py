"""Wan Animate: characters that move as a video says."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import WanAnimateTransformer3DModel

from .families import RotaryVideoMixin
from .grid import Grid
from .layer_plan import AttentionChoice, ConfigChoice
from .stock import after
from .wan import wan_conditions


class MHLAWanAnimateTransformer3DModel(RotaryVideoMixin, WanAnimateTransformer3DModel):
    """Wan Animate with MHLA in its self-attention, as :class:`MHLAWanTransformer3DModel`.

    Takes every argument of :class:`diffusers.WanAnimateTransformer3DModel` and three more. The adapters that
    look at the face stay softmax.

    Args:
        attention: ``"mhla"``, ``"linear"`` (MHLA with one block) or ``"softmax"``, for all layers that
            ``mhla_config.layers`` names or, as a list, for each layer.
        mhla_config: an :class:`~mhla_diffusion.MHLAConfig` or its dict, or one for each layer; the
            defaults when None.
        sample_grid: as for :class:`MHLAWanTransformer3DModel`; the first frame is the character.

    Raises:
        ValueError: for settings that do not fit together; the message says which and what to do.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {"Wan2.2-Animate-14B": {"added_kv_proj_dim": 5120}}

    @after(WanAnimateTransformer3DModel)
    def __init__(
        self,
        stock: dict[str, Any],
        *,
        attention: AttentionChoice = "mhla",
        mhla_config: ConfigChoice = None,
        sample_grid: tuple[int, int, int] = (21, 45, 80),
    ) -> None:
        self.build_video(stock, attention, mhla_config, sample_grid)

    @classmethod
    def with_depth(cls, arguments: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
        default = inspect.signature(cls.__init__).parameters["inject_face_latents_blocks"].default
        # The face is looked at in the first layer and in every so many, which must come out even.
        every = arguments.get("inject_face_latents_blocks", default)
        every = next(count for count in range(every, 0, -1) if num_layers % count == 0)
        return {**arguments, "num_layers": num_layers, "inject_face_latents_blocks": every}

    def example_inputs(
        self, grid: Grid, *, batch_size: int = 1, generator: torch.Generator | None = None
    ) -> dict[str, Any]:
        config = self.config
        latents = self.example_latents(grid, batch_size, generator)
        frames, height, width = latents.shape[2:]
        pose = (batch_size, self.pose_patch_embedding.in_channels, frames - 1, height, width)
        # One picture of the face of the first moving frame, and four of each other.
        face = (batch_size, 3, 4 * (frames - 2) + 1, *(config.motion_encoder_size,) * 2)
        return {
            "hidden_states": latents,
            "timestep": 1000 * torch.rand(batch_size, generator=generator),
            **wan_conditions(config, batch_size, generator),
            "pose_hidden_states": torch.randn(*pose, generator=generator),
            "face_pixel_values": torch.randn(*face, generator=generator),
        }
