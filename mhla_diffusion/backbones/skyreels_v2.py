"""SkyReels V2: videos of texts and images, as long as one likes."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import SkyReelsV2Transformer3DModel

from .families import RotaryVideoMixin
from .grid import Grid
from .layer_plan import AttentionChoice, ConfigChoice, LayerPlan
from .stock import after
from .wan import wan_conditions


class MHLASkyReelsV2Transformer3DModel(RotaryVideoMixin, SkyReelsV2Transformer3DModel):
    """SkyReels V2 with MHLA in its self-attention, as :class:`MHLAWanTransformer3DModel`.

    Takes every argument of :class:`diffusers.SkyReelsV2Transformer3DModel` and three more.
    Its masks that let frames see earlier ones alone (``num_frame_per_block`` above 1) have no form in
    linear attention: models made for them are refused.

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
        "SkyReels-V2-1.3B": {"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960},
    }

    @after(SkyReelsV2Transformer3DModel)
    def __init__(
        self,
        stock: dict[str, Any],
        *,
        attention: AttentionChoice = "mhla",
        mhla_config: ConfigChoice = None,
        sample_grid: tuple[int, int, int] = (21, 30, 52),
    ) -> None:
        self.build_video(stock, attention, mhla_config, sample_grid)

    def build(self, stock: dict[str, Any], plan: LayerPlan) -> None:
        if stock["num_frame_per_block"] > 1 and set(plan.kinds) != {"softmax"}:
            raise ValueError(
                f"num_frame_per_block is {stock['num_frame_per_block']}: linear attention has no mask that "
                "lets frames see earlier ones alone; use a model without it (where a pipeline has set it, "
                "call _set_ar_attention(1) of the model first), or attention='softmax'"
            )
        super().build(stock, plan)

    def _set_ar_attention(self, causal_block_size: int) -> None:
        """Refuse, before the config is changed, what the pipeline of diffusion forcing asks for."""
        kinds = set(self.layer_attention)
        if causal_block_size > 1 and kinds != {"softmax"}:
            raise ValueError(
                f"causal_block_size is {causal_block_size}: linear attention has no mask that lets frames "
                "see earlier ones alone; take causal_block_size=1, or a model of attention='softmax'"
            )
        super()._set_ar_attention(causal_block_size)

    def example_inputs(
        self, grid: Grid, *, batch_size: int = 1, generator: torch.Generator | None = None
    ) -> dict[str, Any]:
        return {
            "hidden_states": self.example_latents(grid, batch_size, generator),
            "timestep": torch.randint(1000, (batch_size,), generator=generator),
            **wan_conditions(self.config, batch_size, generator),
            **({"fps": [1] * batch_size} if self.config.inject_sample_info else {}),
        }
