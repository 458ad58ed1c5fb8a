"""Wan 2.1 and 2.2: videos of texts and images."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from .families import RotaryVideoMixin
from .grid import Grid
from .layer_plan import AttentionChoice, ConfigChoice
from .stock import after

# The pipelines pad every prompt to 512 tokens; the image encoder gives 257.
_TEXT_TOKENS, _IMAGE_TOKENS = 512, 257


def wan_conditions(config: Any, batch_size: int, generator: torch.Generator | None) -> dict[str, Any]:
    """Draw embeddings of text, and of images where the model takes them, as Wan's encoders give them."""
    text = torch.randn(batch_size, _TEXT_TOKENS, config.text_dim, generator=generator)
    inputs = {"encoder_hidden_states": text}
    if config.image_dim is not None:
        # With positions there are two images, first frame and last, whose tokens are one sequence.
        tokens = config.pos_embed_seq_len
        shape = (batch_size, _IMAGE_TOKENS) if tokens is None else (2 * batch_size, tokens // 2)
        inputs["encoder_hidden_states_image"] = torch.randn(*shape, config.image_dim, generator=generator)
    return inputs


class MHLAWanTransformer3DModel(RotaryVideoMixin, WanTransformer3DModel):
    """Wan (text-to-video and image-to-video) with MHLA, plain linear or softmax attention in each layer.

    Takes every argument of :class:`diffusers.WanTransformer3DModel` and three more. Its registered config
    rebuilds it, so ``save_pretrained`` and ``from_pretrained`` restore the same function. Rotary positions
    turn the numerators alone, and queries and keys of a softmax window; Wan's norm of queries and keys, over
    all heads together, stays. Cross-attention to text and images stays softmax.

    Latents may have any number of frames, height and width that the patches divide: blocks follow the grid,
    ragged ones included.

    Args:
        attention: ``"mhla"``, ``"linear"`` (MHLA with one block) or ``"softmax"``, for all layers that
            ``mhla_config.layers`` names or, as a list, for each layer.
        mhla_config: an :class:`~mhla_diffusion.MHLAConfig` or its dict, or one for each layer; the
            defaults when None.
        sample_grid: tokens along frames, height and width that the model is made for. Only a number of blocks
            in all depends on it. By default that of 81 frames of 480 x 832 pixels.

    Raises:
        ValueError: for settings that do not fit together; the message says which and what to do.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "Wan2.1-1.3B": {"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960},
        "Wan2.1-14B": {"num_layers": 40, "num_attention_heads": 40, "ffn_dim": 13824},
        # Each of its two.
        "Wan2.2-A14B": {"num_layers": 40, "num_attention_heads": 40, "ffn_dim": 13824},
    }

    @after(WanTransformer3DModel)
    def __init__(
        self,
        stock: dict[str, Any],
        *,
        attention: AttentionChoice = "mhla",
        mhla_config: ConfigChoice = None,
        sample_grid: tuple[int, int, int] = (21, 30, 52),
    ) -> None:
        self.build_video(stock, attention, mhla_config, sample_grid)
        self._reset_parameters()

    def example_inputs(
        self, grid: Grid, *, batch_size: int = 1, generator: torch.Generator | None = None
    ) -> dict[str, Any]:
        return {
            "hidden_states": self.example_latents(grid, batch_size, generator),
            "timestep": 1000 * torch.rand(batch_size, generator=generator),
            **wan_conditions(self.config, batch_size, generator),
        }

    def _reset_parameters(self) -> None:
        """Xavier, as Wan's authors start, since diffusers has no start of its own.

        Two deviations: their embedding of text starts at 0.02, ours at Xavier. What reads it learns in
        proportion to it, so that short runs hear the text sooner. And their output starts at zero, which is
        left to training: a model that returns nothing cannot be tried. The processors keep the start that
        their config names.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and ".processor" not in name:
                if ".time_embedder." in name:
                    nn.init.normal_(module.weight, std=0.02)
                else:
                    nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
