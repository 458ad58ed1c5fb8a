"""Sheets of samples on the way: what is on one, how it is written, and how long it may take."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from diffusers.utils import make_image_grid
from PIL import Image
from tqdm.auto import tqdm

from ..files.videos import write_video
from ..files.writing import write_file

logger = logging.getLogger(__name__)

# Of a video on the picture of a sheet; all frames are in the MP4 file beside it.
_FRAMES, _SIDE = 8, 256
# Less than this is not worth a word.
_SECONDS = 10.0


@dataclass(frozen=True)
class SampleSheet:
    """Samples of a model at one step.

    Args:
        rows: images of each class or prompt, or the frames of the video of each prompt.
        fps: frames per second of videos; None for images.
    """

    rows: list[list[Image.Image]]
    fps: float | None = None

    def picture(self) -> Image.Image:
        """Draw the rows below each other; of videos eight frames, evenly spaced, of 256 pixels at most."""
        rows = self.rows if self.fps is None else [_a_few(row) for row in self.rows]
        return make_image_grid([cell for row in rows for cell in row], rows=len(rows), cols=len(rows[0]))

    def save(self, path: Path) -> None:
        """Write ``path``.png and, of videos, ``path``.mp4 with one below the other."""
        write_file(path.with_suffix(".png"), self.picture().save)
        if self.fps is not None:
            videos = [np.stack([np.asarray(frame.convert("RGB")) for frame in row]) for row in self.rows]
            write_video(np.concatenate(videos, axis=1), path.with_suffix(".mp4"), fps=self.fps)

    def log(self, trackers: Sequence[Any], step: int) -> None:
        """Hand the picture to accelerate's trackers."""
        pixels = np.asarray(self.picture().convert("RGB"))[None]  # [1, H, W, 3]
        for tracker in trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": pixels}, step=step, **layout)


def _a_few(frames: list[Image.Image]) -> list[Image.Image]:
    chosen = np.linspace(0, len(frames) - 1, min(_FRAMES, len(frames))).round().astype(int)
    cells = [frames[i].copy() for i in chosen]
    for cell in cells:
        cell.thumbnail((_SIDE, _SIDE))
    return cells


class SheetClock:
    """Shows how far a sheet is, and warns of one that takes more than its share of the time of a run.

    Args:
        every: steps of training between sheets.
        max_share: of the time.
        hidden: whether another process shows it.
    """

    def __init__(self, every: int, max_share: float, *, hidden: bool) -> None:
        self.every, self.max_share, self.hidden = every, max_share, hidden
        self._ended = time.perf_counter()
        self._warned = False

    def start(self, num_steps: int) -> None:
        """Begin a sheet of so many denoising steps, all its rows together."""
        self._started = time.perf_counter()
        self._bar = tqdm(total=num_steps, desc="sample sheet", unit="step", leave=False, disable=self.hidden)
        self._num_steps, self._done = num_steps, 0

    def __call__(self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Count a step, as a pipeline's ``callback_on_step_end``; the first shows how long all will take."""
        self._bar.update()
        self._done += 1
        if self._done == 1:
            self._warn_of((time.perf_counter() - self._started) * self._num_steps)
        return tensors

    def end(self) -> None:
        """End a sheet; the training goes on."""
        self._bar.close()
        self._ended = time.perf_counter()

    def _warn_of(self, seconds: float) -> None:
        training = self._started - self._ended
        share = seconds / (seconds + training)
        if self._warned or seconds < _SECONDS or share <= self.max_share:
            return
        self._warned = True
        enough = math.ceil(self.every * seconds * (1 - self.max_share) / (self.max_share * training))
        logger.warning(
            "a sample sheet takes about %.0f s, %.0f %% of the time of this run, and sampling.max_share is "
            "%.0f %%: set sampling.every to %d, or have less on it (sampling.num_inference_steps)",
            seconds,
            100 * share,
            100 * self.max_share,
            enough,
        )
