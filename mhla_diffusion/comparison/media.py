"""Tasks of generation: images and videos, trained, generated, and scored against held-out ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..scoring import open_set_of, pixels_of
from ..training import ImageTrainingConfig, VideoTrainingConfig
from .measured import MeasuredRun
from .samples import GenerationTask


@dataclass(frozen=True)
class Images(GenerationTask, kind="images"):
    """Images, of classes or texts; see :class:`.samples.GenerationTask`.

    Generated are all classes in turn, or the captions of the first of the held-out images.
    """

    config_class: ClassVar = ImageTrainingConfig
    batch_size: ClassVar = 64

    extractor: str = "efficientnet_lite0"
    held_out: dict[str, Any] = field(default_factory=lambda: {"data.split": "test"})

    @property
    def grid(self) -> tuple[int, ...]:
        return (self.values["model.sample_size"] // self.values["model.patch_size"],) * 2


@dataclass(frozen=True)
class Videos(GenerationTask, kind="videos"):
    """Clips, of texts; see :class:`.samples.GenerationTask`.

    Generated are those of the captions of the first of the held-out clips. The change from frame to frame of
    both stands on the page, as a distance of features may not see it.
    """

    # Distances of clips are near 1.
    metrics: ClassVar = (GenerationTask.metrics[0]._replace(digits=2), *GenerationTask.metrics[1:])
    config_class: ClassVar = VideoTrainingConfig
    batch_size: ClassVar = 16

    extractor: str = "transnetv2"
    held_out: dict[str, Any] = field(default_factory=lambda: {"data.moving_digits.first_clip": 1_000_000})

    @property
    def grid(self) -> tuple[int, ...]:
        sizes = (self.values["data.frames"], *self.values["data.sizes"][0])
        return tuple(s // p for s, p in zip(sizes, self.values["model.patch_size"], strict=True))

    @property
    def frames(self) -> int:
        """Frames of a clip."""
        return self.values["data.frames"]

    def describe(self, run: MeasuredRun, folder: Path) -> dict[str, Any]:
        if self.frames < 2:
            return {}
        generated = (read() for read in open_set_of(run.config, folder).readers())
        real = pixels_of(run.calls.source, self.num_samples)
        return {"frame_change": frame_change(generated), "real_frame_change": frame_change(real)}


def frame_change(clips: Iterable[NDArray[np.uint8]]) -> float:
    """Return the mean absolute difference of consecutive frames, of 255, over clips ``[F, H, W, C]``.

    The distance from 255 is what VBench (Huang et al. 2023, arXiv 2311.17982) calls temporal flickering.
    """
    return float(np.mean([np.abs(np.diff(clip.astype(np.int16), axis=0)).mean() for clip in clips]))
