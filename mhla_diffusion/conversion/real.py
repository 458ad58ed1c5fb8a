"""Held-out pictures and clips as models see them, and the statistics that samples are scored against."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..evaluation import FeatureExtractor
from ..evaluation.measure import PassSettings, measure
from ..evaluation.sets.samples import SampleSet
from ..files.videos import write_video
from ..processes import in_first_process
from ..training.data.stream import to_pixels
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


def require_real(number: int, source: Any) -> None:
    """Check that a source has as many samples.

    Raises:
        ValueError: when it has fewer.
    """
    if number > len(source):
        raise ValueError(f"num_real must be at most the {len(source)} held-out samples, got {number}")


def write_statistics_of(
    source: Any, number: int, open_set: Callable[[Path], SampleSet], extractor: FeatureExtractor, path: Path
) -> None:
    """Write the statistics of samples evenly spaced in a source, which are PNG or MP4 files on the way."""
    folder = path.with_suffix("")

    def export() -> None:
        shutil.rmtree(folder, ignore_errors=True)  # of a call that was stopped
        folder.mkdir(parents=True)
        for count, pixels in enumerate(pixels_of(source, number)):
            _write(pixels, folder / f"{count:06d}")

    in_first_process(export)
    write_statistics(open_set(folder), extractor, path)
    in_first_process(lambda: shutil.rmtree(folder))


def write_statistics(samples: SampleSet, extractor: FeatureExtractor, path: Path) -> None:
    """Write the statistics of the features of samples as a file; processes share the work."""
    found = measure(samples, [extractor], PassSettings(num_workers=1), title="real")

    def save() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        found.measured[extractor.name].statistics.save(path)

    in_first_process(save)


def pixels_of(source: Any, number: int) -> Iterator[np.ndarray]:
    """Yield uint8 ``[(F,) H, W, C]`` of samples evenly spaced in a source."""
    for i in range(number):
        generator = torch.Generator().manual_seed(i)
        pixels = source.load(i * len(source) // number, generator)["samples"]
        yield to_pixels(pixels).movedim(0, -1).numpy()


def _write(pixels: np.ndarray, path: Path) -> None:
    if pixels.ndim == 4:
        write_video(np.broadcast_to(pixels, (*pixels.shape[:-1], 3)), path.with_suffix(".mp4"), fps=FPS)
    else:
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(path.with_suffix(".png"))
