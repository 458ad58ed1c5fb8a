"""ChronoEdit: edited images, as the end of a short video."""

from __future__ import annotations

from typing import Any, ClassVar

from diffusers import ChronoEditTransformer3DModel

from .families import RotaryVideoMixin
from .layer_plan import AttentionChoice, ConfigChoice
from .stock import after
from .wan import MHLAWanTransformer3DModel


class MHLAChronoEditTransformer3DModel(RotaryVideoMixin, ChronoEditTransformer3DModel):
    """ChronoEdit with MHLA in its self-attention, as :class:`MHLAWanTransformer3DModel`.

    Takes every argument of :class:`diffusers.ChronoEditTransformer3DModel` and three more.

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
        "ChronoEdit-14B": {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
    }

    @after(ChronoEditTransformer3DModel)
    def __init__(
        self,
        stock: dict[str, Any],
        *,
        attention: AttentionChoice = "mhla",
        mhla_config: ConfigChoice = None,
        sample_grid: tuple[int, int, int] = (21, 30, 52),
    ) -> None:
        self.build_video(stock, attention, mhla_config, sample_grid)

    example_inputs = MHLAWanTransformer3DModel.example_inputs
