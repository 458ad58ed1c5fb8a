"""Convolutions of each channel by itself over the grid of the tokens."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops import BlockLayout
from .ops.autocast import is_autocast, without_autocast


def depthwise_conv(channels: int, axes: int) -> nn.Conv2d | nn.Conv3d:
    """Return a 3x3 (or 3x3x3) convolution of each channel by itself."""
    return (nn.Conv2d if axes == 2 else nn.Conv3d)(channels, channels, 3, padding=1, groups=channels)


def convolve(conv: nn.Conv2d | nn.Conv3d, v: Tensor, layout: BlockLayout) -> Tensor:
    """Convolve over the grid of tokens ``[B, H, N, d]``; extra tokens get 0."""
    on_grid = v[:, :, layout.grid_tokens]
    images = on_grid.transpose(-1, -2).flatten(1, 2).unflatten(-1, layout.grid)  # [B, H d, *grid]
    # Weights in float32 are not autocast: in bfloat16 a depthwise convolution is far slower on a CPU. Others
    # may be stored in another dtype than that of the computation (layerwise casting): v or autocast has it.
    in_float32 = conv.weight.dtype == torch.float32
    dtype = torch.float32 if is_autocast(v) and in_float32 else v.dtype
    with without_autocast(v) if in_float32 else nullcontext():
        out = conv(images.to(dtype)).flatten(2).unflatten(1, (v.shape[1], -1)).mT.to(v.dtype)
    return out if layout.extra is None else F.pad(out, (0, 0, *layout.extra))
