"""Sizes that samples are brought to: each goes to the one of its shape, and a batch has one size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader
from tqdm.auto import tqdm

Size = tuple[int, int]
"""Height and width."""


@dataclass
class _Shapes:
    """Height and width of each sample, read by a DataLoader: readers stay in its workers."""

    read: Callable[[int], Size | None]
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Size | None:
        return self.read(index)


def read_shapes(read: Callable[[int], Size | None], count: int, *, unit: str) -> list[Size | None]:
    """Read the shape of every sample; None of those that cannot be decoded.

    They are named, skipped and counted when their turn comes.
    """
    # One worker at least: a reader of videos in this process would make later workers hang.
    loader: Any = DataLoader(_Shapes(read, count), batch_size=None, num_workers=1)  # type: ignore[arg-type]
    return [shape and (int(shape[0]), int(shape[1])) for shape in tqdm(loader, desc="shapes", unit=unit)]


def nearest_size(shape: Size | None, sizes: Sequence[Size]) -> int:
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
