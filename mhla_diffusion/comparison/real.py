"""Held-out pictures and clips as models see them, and the statistics that samples are scored against."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..evaluation.measure import PassSettings, measure
from ..files.videos import write_video
from ..training.objectives import build_objective

FPS = 8.0
"""Frames per second of the files of clips, generated and real."""


def open_source(config: Any) -> Any:
    """Open the data of a run in the size that its model takes.

    Raises:
        ValueError: when they are not there, or do not fit.
    """
    _, source, _ = config.build(build_objective(config.objective))
    return source


def write_statistics(task: Any, source: Any, path: Path) -> None:
    """Write the statistics of the features of a task's held-out samples, each read once, as a file."""
    extractor = task.load_extractor("cpu")
    with tempfile.TemporaryDirectory() as folder:
        for number, pixels in enumerate(_pixels(source, task.num_real)):
            _write(pixels, Path(folder) / f"{number:06d}")
        found = measure(task.open_set(folder), [extractor], PassSettings(num_workers=1), title="held out")
    path.parent.mkdir(parents=True, exist_ok=True)
    found.measured[extractor.name].statistics.save(path)


def _pixels(source: Any, number: int) -> Any:
    """Yield uint8 ``[(F,) H, W, C]`` of samples evenly spaced in a source."""
    for i in range(number):
        generator = torch.Generator().manual_seed(i)
        pixels = source.load(i * len(source) // number, generator)["samples"]
        yield ((pixels + 1) * 127.5).round().clamp(0, 255).byte().movedim(0, -1).numpy()


def _write(pixels: np.ndarray, path: Path) -> None:
    if pixels.ndim == 4:
        write_video(np.broadcast_to(pixels, (*pixels.shape[:-1], 3)), path.with_suffix(".mp4"), fps=FPS)
    else:
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(path.with_suffix(".png"))
