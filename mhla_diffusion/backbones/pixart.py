"""PixArt alpha and sigma: images of texts."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor

from .families import SquareSampleMixin, square_grid
from .grid import Grid, in_dict
from .layer_plan import AttentionChoice, ConfigChoice
from .stock import after

_TEXT_TOKENS = 300  # to which the pipelines of sigma pad every prompt


class MHLAPixArtTransformer2DModel(SquareSampleMixin, PixArtTransformer2DModel):
    """PixArt with MHLA, plain linear or softmax attention in each layer, on latents of any shape.

    Takes every argument of :class:`diffusers.PixArtTransformer2DModel` and two more. Its registered config
    rebuilds it. Cross-attention to text stays softmax.

    Args:
        attention: ``"mhla"``, ``"linear"`` (MHLA with one block) or ``"softmax"``, for all layers that
            ``mhla_config.layers`` names or, as a list, for each layer.
        mhla_config: an :class:`~mhla_diffusion.MHLAConfig` or its dict, or one for each layer; the
            defaults when None.

    Raises:
        ValueError: for settings that do not fit together; the message says which and what to do.
    """

    old_norm_type = "ada_norm_single"
    vae_stride = (8, 8)
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "PixArt-Sigma-XL/2": {"caption_channels": 4096, "use_additional_conditions": False},
    }
    _repeated_blocks = ["BasicTransformerBlock"]  # noqa: RUF012

    @after(PixArtTransformer2DModel)
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

    def example_inputs(
        self, grid: Grid, *, batch_size: int = 1, generator: torch.Generator | None = None
    ) -> dict[str, Any]:
        config = self.config
        sizes = [tokens * config.patch_size for tokens in grid]
        width = config.caption_channels or config.cross_attention_dim
        return {
            "hidden_states": torch.randn(batch_size, config.in_channels, *sizes, generator=generator),
            "timestep": torch.randint(1000, (batch_size,), generator=generator),
            "encoder_hidden_states": torch.randn(batch_size, _TEXT_TOKENS, width, generator=generator),
            **self.size_arguments(batch_size, *(8 * size for size in sizes)),
        }

    def size_arguments(
        self, batch_size: int, height: int, width: int, *, device: torch.device | None = None
    ) -> dict[str, Any]:
        """Return what the forward is told of the size in pixels, as the pipelines of alpha and sigma tell it.

        A model with ``use_additional_conditions``, as alpha at 1024 pixels, is told the resolution ``[B, 2]``
        and the aspect ratio, height over width, ``[B, 1]``.
        """
        told: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.use_additional_conditions:
            told = {
                "resolution": torch.tensor([[height, width]] * batch_size, device=device, dtype=self.dtype),
                "aspect_ratio": torch.full((batch_size, 1), height / width, device=device, dtype=self.dtype),
            }
        return {"added_cond_kwargs": told}
