"""Sizes that samples are brought to: each goes to the one of its shape, and a batch has one size."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .shapes import Shape

Size = tuple[int, int]
"""Height and width."""


def nearest_size(shape: Shape, sizes: Sequence[Size]) -> int:
    """Number of the size whose aspect ratio is nearest, by the logarithm of their quotient."""
    height, width = shape or sizes[0]
    return min(range(len(sizes)), key=lambda i: abs(math.log(sizes[i][1] / sizes[i][0] * height / width)))


def pipeline_sizes(side: int) -> tuple[Size, ...]:
    """Return the sizes that diffusers' pipelines of PixArt and Sana round to, for a side in pixels.

    Raises:
        ValueError: for a side that they have no table for.
    """
    from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha, pipeline_pixart_sigma
    from diffusers.pipelines.sana import pipeline_sana

    tables = {
        256: pipeline_pixart_alpha.ASPECT_RATIO_256_BIN,
        512: pipeline_pixart_alpha.ASPECT_RATIO_512_BIN,
        1024: pipeline_pixart_alpha.ASPECT_RATIO_1024_BIN,
        2048: pipeline_pixart_sigma.ASPECT_RATIO_2048_BIN,
        4096: pipeline_sana.ASPECT_RATIO_4096_BIN,
    }
    if side not in tables:
        raise ValueError(f"data.aspect_ratios must be one of {', '.join(map(str, tables))}, got {side}")
    return tuple((int(height), int(width)) for height, width in tables[side].values())
