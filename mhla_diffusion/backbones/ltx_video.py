"""LTX-Video: videos of texts and images."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import LTXVideoTransformer3DModel
from torch import Tensor

from .grid import Grid, send_with_rope
from .layer_plan import AttentionChoice, ConfigChoice
from .model import MHLAModelMixin
from .stock import after

_TEXT_TOKENS = 128  # to which the pipeline pads every prompt
_FRAME_RATE = 25.0  # frames a second that the pipeline means where nothing is said


class MHLALTXVideoTransformer3DModel(MHLAModelMixin, LTXVideoTransformer3DModel):
    """LTX-Video with MHLA, plain linear or softmax attention in each layer.

    Takes every argument of :class:`diffusers.LTXVideoTransformer3DModel` and three more. Its registered
    config rebuilds it. Rotary positions turn the numerators alone, and queries and keys of a softmax window;
    LTX's norm of queries and keys, over all heads together, stays. Cross-attention to text stays softmax.
    The forward must be given ``num_frames``, ``height`` and ``width``, which say the grid, or
    ``video_coords``, from which it is read (a GPU is waited for). Tokens of images and videos ahead of the
    grid, as ``LTXConditionPipeline`` has them, need ``extra_block`` in the config.

    Args:
        attention: ``"mhla"``, ``"linear"`` (MHLA with one block) or ``"softmax"``, for all layers that
            ``mhla_config.layers`` names or, as a list, for each layer.
        mhla_config: an :class:`~mhla_diffusion.MHLAConfig` or its dict, or one for each layer; the
            defaults when None.
        sample_grid: tokens along frames, height and width that the model is made for; by default that of 121
            frames of 512 x 704 pixels.

    Raises:
        ValueError: for settings that do not fit together; the message says which and what to do.
    """

    vae_stride = (8, 32, 32)
    presets: ClassVar[dict[str, dict[str, Any]]] = {"LTX-Video-2B": {}}

    @after(LTXVideoTransformer3DModel)
    def __init__(
        self,
        stock: dict[str, Any],
        *,
        attention: AttentionChoice = "mhla",
        mhla_config: ConfigChoice = None,
        sample_grid: tuple[int, int, int] = (16, 16, 22),
    ) -> None:
        self.build(stock, self.plan_layers(attention, mhla_config, stock["num_layers"], sample_grid))
        needed = set(self.layer_attention) != {"softmax"}
        send_with_rope(self.rope, functools.partial(_grid_of_tokens, needed=needed))
        self.register_to_config(sample_grid=list(sample_grid))

    def example_inputs(
        self, grid: Grid, *, batch_size: int = 1, generator: torch.Generator | None = None
    ) -> dict[str, Any]:
        config = self.config
        text = (batch_size, _TEXT_TOKENS, config.caption_channels)
        tokens = (batch_size, math.prod(grid), config.in_channels)
        return {
            "hidden_states": torch.randn(*tokens, generator=generator),
            "timestep": torch.randint(1000, (batch_size,), generator=generator),
            "encoder_hidden_states": torch.randn(*text, generator=generator),
            "encoder_attention_mask": torch.ones(batch_size, _TEXT_TOKENS),
            **dict(zip(("num_frames", "height", "width"), grid, strict=True)),
        }

    def denoising_arguments(
        self, samples: Tensor, timestep: Tensor, conditions: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return arguments of the forward; ``frame_rate`` of the conditions is that of all clips, ``[B]``."""
        frames, height, width = samples.shape[2:]
        given = super().denoising_arguments(samples, timestep, conditions)
        rate = given.pop("frame_rate", [_FRAME_RATE])[0]
        time, *space = self.vae_stride
        return {
            **given, "hidden_states": samples.flatten(2).mT,
            "num_frames": frames, "height": height, "width": width,
            "rope_interpolation_scale": (time / rate, *space),
        }  # fmt: skip

    def prediction(self, output: Tensor, samples: Tensor) -> Tensor:
        """Return the velocity ``[B, C, F, H, W]`` of tokens ``[B, N, C]``."""
        return output.mT.unflatten(2, samples.shape[2:])


def _grid_of_tokens(
    hidden_states: Tensor,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    rope_interpolation_scale: Any = None,
    video_coords: Tensor | None = None,
    *,
    needed: bool,
) -> Grid | None:
    """Return the grid of what the rope is told; None for tokens on no grid, where it is not needed."""
    if video_coords is not None:
        try:
            return _grid_of_coordinates(video_coords[0])
        except ValueError:
            if needed:
                raise
            return None
    if num_frames is None or height is None or width is None:
        raise ValueError("MHLA needs the grid of its tokens: give num_frames, height and width to the model")
    return operator.index(num_frames), operator.index(height), operator.index(width)


def _grid_of_coordinates(coordinates: Tensor) -> Grid:
    """Return the grid of coordinates ``[3, N]``: its tokens are the last, and the first of them lies at 0.

    Those ahead of them, of images and videos at other times, do not.
    """
    origins = (coordinates == 0).all(0).nonzero()
    if len(origins) > 1 or (coordinates[0] < 0).any():
        raise ValueError(
            "video_coords begin at 0 more than once, or before it: frames behind those of the video, as "
            "LTXI2VLongMultiPromptPipeline has them, have no place on the grid that MHLA needs; take "
            "LTXPipeline, LTXImageToVideoPipeline or LTXConditionPipeline, or attention='softmax'"
        )
    first = int(origins[0]) if len(origins) else 0
    grid = tuple(len(axis.unique()) for axis in coordinates[:, first:])
    if math.prod(grid) != coordinates.shape[1] - first:
        raise ValueError(
            f"video_coords have {' x '.join(map(str, grid))} places from the last token that lies at 0, but "
            f"{coordinates.shape[1] - first} tokens: MHLA needs a whole grid there"
        )
    return grid
