"""Scoring clips beside cd-fvd: one run, the same data and weights."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from ..evaluation import evaluate_videos
from ..optional import require
from .random_weights import write_random_i3d
from .shared import check_at_least, race


def evaluation_video(
    clips: int = 32, size: tuple[int, int] = (128, 128), repeats: int = 3, batch_size: int = 8
) -> str:
    """Seconds from two arrays of clips of 16 frames to an FVD, with cd-fvd's I3D of random weights.

    Args:
        clips: of noise, in each of the two sets.
        size: height and width in pixels.
        repeats: interleaved runs, of which the median counts.
        batch_size: clips in one forward pass of ours; cd-fvd has 16.

    Returns:
        A table in Markdown.

    Raises:
        ValueError: for a number that is too small.
        ImportError: without the ``eval`` extra.
    """
    check_at_least(1, repeats=repeats, batch_size=batch_size)
    check_at_least(2, clips=clips)
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "i3d.pt"
        write_random_i3d(weights)
        arrays = []
        for name in ("real", "generated"):
            brightness = generator.uniform(0.2, 1, (clips, 1, 1, 1, 3))
            noise = generator.integers(0, 256, (clips, 16, *size, 3)) * brightness
            arrays.append(Path(folder) / f"{name}.npy")
            np.save(arrays[-1], noise.astype(np.uint8))

        def ours() -> float:
            report = evaluate_videos(
                *arrays, metrics="frechet", extractor="cdfvd_i3d", weights=weights, bootstrap=0,
                batch_size=batch_size, device="cpu",
            )  # fmt: skip
            return report.scores[0].value

        def theirs() -> float:
            evaluator = require("cdfvd.fvd").cdfvd("i3d", ckpt_path=str(weights), device="cpu", n_fake="full")
            return float(evaluator.compute_fvd(*map(np.load, arrays)))

        return race({"mhla_diffusion": ours, "cd-fvd": theirs}, 2 * clips, "clips", repeats)
