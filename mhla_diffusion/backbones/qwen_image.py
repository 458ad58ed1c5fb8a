"""Qwen-Image: images of texts, and edited images, by attention over text and image at once.

Of the models with joint attention it is the one to have first: its weights and those of its edits are free to
use (Apache-2.0), its forward is told the sizes of the image, which those of Flux and Z-Image are not (a list
of positions, a list of images), and its texts have masks and positions, which those of SD3 have not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor
from torch.nn import functional as F

from .grid import Grid, send_with_rope, token_grid
from .layer_plan import AttentionChoice, ConfigChoice
from .model import MHLAModelMixin
from .stock import after


class MHLAQwenImageTransformer2DModel(MHLAModelMixin, QwenImageTransformer2DModel):
    """Qwen-Image with MHLA, plain linear or softmax attention in each layer.

    Takes every argument of :class:`diffusers.QwenImageTransformer2DModel` and three more. Its registered
    config rebuilds it. The tokens of the text are one more block of their own, whatever their number, and
    its padding does not count; other images, which edits are given, are in that block too. Rotary positions,
    of the text as of the image, turn the numerators alone, and queries and keys of a softmax window; Qwen's
    norms of queries and keys stay.

    Args:
        attention: ``"mhla"``, ``"linear"`` (one block, text and all) or ``"softmax"``, for all layers that
            ``mhla_config.layers`` names or, as a list, for each layer.
        mhla_config: an :class:`~mhla_diffusion.MHLAConfig` or its dict; the defaults when None. Its
            ``extra_block`` is always true.
        sample_grid: tokens along height and width that the model is made for. Only a number of blocks in all
            depends on it. By default that of 1024 x 1024 pixels.

    Raises:
        ValueError: for settings that do not fit together; the message says which and what to do. Also for
            ``use_layer3d_rope``: the layers of one picture, of Qwen-Image-Layered, are many grids.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {"Qwen-Image": {}}
    attention_name = "attn"
    extra_tokens = 128  # the pipelines pad texts to the longest of a batch, of 512 at most
    time_scale = 1
    vae_stride = (8, 8)

    @after(QwenImageTransformer2DModel)
    def __init__(
        self,
        stock: dict[str, Any],
        *,
        attention: AttentionChoice = "mhla",
        mhla_config: ConfigChoice = None,
        sample_grid: tuple[int, int] = (64, 64),
    ) -> None:
        if stock["use_layer3d_rope"]:
            raise ValueError(
                "use_layer3d_rope is of Qwen-Image-Layered, whose pictures are many grids: there is no MHLA "
                "form of it, take Qwen-Image or Qwen-Image-Edit"
            )
        self.build(stock, self.plan_layers(attention, mhla_config, stock["num_layers"], sample_grid))
        send_with_rope(self.pos_embed, _grid_of_shapes)
        self.register_to_config(sample_grid=list(sample_grid))

    @property
    def sample_channels(self) -> int:
        return self.config.in_channels // math.prod(self.latents_per_token)

    @property
    def text_shapes(self) -> tuple[tuple[int | None, int], ...]:
        return ((None, self.config.joint_attention_dim),)

    def denoising_arguments(
        self, samples: Tensor, timestep: Tensor, conditions: Mapping[str, Any]
    ) -> dict[str, Any]:
        grid = token_grid(samples.shape[2:], self.latents_per_token)
        given = super().denoising_arguments(samples, timestep, conditions)
        mask = given.pop("encoder_attention_mask")
        return {
            **given, "hidden_states": F.pixel_unshuffle(samples, self.config.patch_size).flatten(2).mT,
            "encoder_hidden_states_mask": mask, "img_shapes": [[(1, *grid)]] * len(samples),
        }  # fmt: skip

    def prediction(self, output: Tensor, samples: Tensor) -> Tensor:
        """Return the velocity ``[B, C, H, W]`` of tokens ``[B, N, 4 C]``."""
        grid = token_grid(samples.shape[2:], self.latents_per_token)
        return F.pixel_shuffle(output.mT.unflatten(2, grid), self.config.patch_size)

    def example_inputs(
        self, grid: Grid, *, batch_size: int = 1, generator: torch.Generator | None = None
    ) -> dict[str, Any]:
        config, text = self.config, (batch_size, self.extra_tokens)
        lengths = torch.arange(self.extra_tokens, 0, -1)[:batch_size, None]  # each sample's text is shorter
        return {
            "hidden_states": torch.randn(
                batch_size, math.prod(grid), config.in_channels, generator=generator
            ),
            # In steps that bfloat16 holds, to which the model rounds them.
            "timestep": torch.randint(256, (batch_size,), generator=generator) / 256,
            "encoder_hidden_states": torch.randn(*text, config.joint_attention_dim, generator=generator),
            "encoder_hidden_states_mask": torch.arange(self.extra_tokens).expand(text) < lengths,
            "img_shapes": [[(1, *grid)]] * batch_size,
        }


def _grid_of_shapes(img_shapes: list[Any], *_: Any, **rest: Any) -> Grid:
    """Return the grid of the image that is made, the first of each sample's."""
    shape = img_shapes[0][0] if isinstance(img_shapes[0], list) else img_shapes[0]
    if shape[0] != 1:
        raise ValueError(f"an image has one frame, but img_shapes begins with {shape}, of {shape[0]} frames")
    return tuple(shape[1:])
