"""Clips whose motion a network can see."""

from __future__ import annotations

import numpy as np


def moving_squares(
    count: int, seed: int, *, frames: int = 12, size: tuple[int, int] = (32, 48)
) -> np.ndarray:
    """Bright squares that move straight on, uint8 ``[count, F, H, W, 3]``."""
    generator = np.random.default_rng(seed)
    clips = np.zeros((count, frames, *size, 3), np.uint8)
    for clip in clips:
        start, step = generator.integers(0, 12, 2), generator.integers(0, 2, 2)
        colour = generator.integers(80, 256, 3)
        for number, frame in enumerate(clip):
            top, left = start + number * step
            frame[top : top + 8, left : left + 8] = colour
    return clips
