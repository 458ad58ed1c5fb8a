"""A small real extractor and small real files of images and videos."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mhla_diffusion.evaluation import FeatureExtractor
from mhla_diffusion.evaluation.networks.images import clean_resize
from mhla_diffusion.files.videos import write_video


def _mean_colours(images: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(images, 2).flatten(1)


@pytest.fixture
def extractor() -> FeatureExtractor:
    """Mean colours of the four quarters of an image: 12 dimensions, and cheap."""
    return FeatureExtractor(
        name="mean_colours",
        score_name="fd_mean_colours",
        dimension=12,
        prepare=partial(clean_resize, size=16),
        network=_mean_colours,
        resize="to 16 x 16",
        normalization="none",
        weights="none",
        weights_sha256="0" * 64,
    )


@pytest.fixture
def make_pixels() -> Callable[..., np.ndarray]:
    """``make_pixels(count, seed, brightness)``: uint8 ``[count, 20, 24, 3]``."""

    def make(count: int, seed: int = 0, brightness: int = 0) -> np.ndarray:
        noise = np.random.default_rng(seed).integers(0, 200, (count, 20, 24, 3))
        return (noise + brightness).astype(np.uint8)

    return make


@pytest.fixture
def write_folder(tmp_path: Path) -> Callable[..., Path]:
    """``write_folder(name, pixels, classes=None)``: PNG files, in subfolders when classes are given."""

    def write(name: str, pixels: np.ndarray, classes: list[str] | None = None) -> Path:
        for index, image in enumerate(pixels):
            folder = tmp_path / name / (classes[index % len(classes)] if classes else "")
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{index:04d}.png")
        return tmp_path / name

    return write


@pytest.fixture
def write_manifest() -> Callable[..., None]:
    """``write_manifest(folder, class_ids, names={})``: as generation writes it, for the files there."""

    def write(folder: Path, class_ids: list[int], names: dict[int, str] | None = None) -> None:
        rows = [
            {"file": f"{i:04d}.png", "class_id": c, "class_name": (names or {}).get(c), "seed": 7 + i}
            for i, c in enumerate(class_ids)
        ]
        manifest = {"model": "runs/<digits>", "num_inference_steps": 20, "images": rows}
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return write


@pytest.fixture
def write_videos(tmp_path: Path) -> Callable[..., Path]:
    """``write_videos(name, clips)``: MP4 files of clips uint8 ``[count, F, H, W, 3]``."""

    def write(name: str, clips: np.ndarray) -> Path:
        for index, clip in enumerate(clips):
            write_video(clip, tmp_path / name / f"{index:04d}.mp4", fps=8)
        return tmp_path / name

    return write
