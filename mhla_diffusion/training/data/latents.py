"""Latents that scripts/cache_latents.py wrote, as samples for training; see :mod:`.encoding`.

Rows of images are ``mean`` and ``std`` float16 ``[C, h, w]`` and ``label`` int64. Rows of clips are
``latents`` float16 ``[C, f, h, w]``, scaled as Wan's pipeline scales them, and ``text``
``[L, text_dim]``, the embeddings of the caption without the zeros that fill them up. See :mod:`.shards`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLWan
from torch.nn import functional as F

from ...hub import component_subfolder
from ..text import TextConfig
from .images import ImageSource
from .shards import Shards, read_record
from .videos import VideoSource


def load_vae(path: str) -> Any:
    """Load an autoencoder by the folder or hub id of itself or of a pipeline."""
    vae = AutoencoderKL.from_pretrained(path, subfolder=component_subfolder(path, "vae"))
    return vae.eval().requires_grad_(False)


def load_video_vae(path: str) -> Any:
    """Load an autoencoder of videos, from where :func:`load_vae` does, in fp32 as Wan's runs."""
    vae = AutoencoderKLWan.from_pretrained(
        path, subfolder=component_subfolder(path, "vae"), dtype=torch.float32
    )
    return vae.eval().requires_grad_(False)


class CachedLatents:
    """Samples of a cache of images: ``(mean + std noise - shift) scaling``, as the pipeline scales.

    Raises:
        ValueError: when there is no cache, or it is not finished.
    """

    buckets = None

    def __init__(self, path: str | Path) -> None:
        self.shards = Shards(path)
        record = self.shards.record
        self.class_names: list[str] = record["class_names"]
        self.vae: str = record["config"]["vae"]
        self._shift, self._scaling = record["shift_factor"], record["scaling_factor"]
        self.shape = self.shards.shape(0, "mean")

    def __len__(self) -> int:
        return len(self.shards)

    def name(self, index: int) -> str:
        return self.shards.name(index)

    def fingerprint(self) -> str:
        return self.shards.fingerprint()

    def load(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        row = self.shards.read(index, ("mean", "std", "label"))
        mean, std = row["mean"].float(), row["std"].float()
        latents = mean + std * torch.randn(mean.shape, generator=generator)
        return {"samples": (latents - self._shift) * self._scaling, "class_labels": int(row["label"])}

    def load_vae(self) -> AutoencoderKL:
        """Load the autoencoder that the cache was made with."""
        return load_vae(self.vae)


@dataclass(frozen=True)
class ImageLatents(ImageSource):
    """Folder that scripts/cache_latents.py image wrote."""

    path: str

    def __post_init__(self) -> None:
        if self.flip:
            raise ValueError("latents cannot be flipped; cache them with --data.flip true, which stores both")

    def facts(self) -> dict[str, Any]:
        return _facts(self.path)

    def open(self) -> CachedLatents:
        return CachedLatents(self.path)


class CachedVideoLatents:
    """Samples of a cache of clips.

    Attributes:
        sizes: frames, height and width of the latents, each once.
        buckets: for each row the number of its size; None when there is one.
        channels: of the latents.
        vae, text, fps: what the cache was made with.

    Raises:
        ValueError: when there is no cache, or it is not finished.
    """

    def __init__(self, path: str | Path) -> None:
        self.shards = Shards(path)
        config = self.shards.record["config"]
        self.vae: str = config["vae"]
        self.text = TextConfig(**config["text"])
        self.fps: float | None = config["data"]["fps"]
        shapes = [self.shards.shape(index, "latents") for index in range(len(self.shards))]
        self.channels = shapes[0][0]
        self.sizes = sorted({shape[1:] for shape in shapes})
        self.buckets = [self.sizes.index(shape[1:]) for shape in shapes] if len(self.sizes) > 1 else None

    def __len__(self) -> int:
        return len(self.shards)

    def name(self, index: int) -> str:
        return self.shards.name(index)

    def fingerprint(self) -> str:
        return self.shards.fingerprint()

    def load(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        row = self.shards.read(index, ("latents", "text"))
        missing = self.text.max_length - len(row["text"])
        return {"samples": row["latents"].float(), "text": F.pad(row["text"], (0, 0, 0, missing))}


@dataclass(frozen=True)
class VideoLatents(VideoSource):
    """Folder that scripts/cache_latents.py video wrote."""

    path: str

    def facts(self) -> dict[str, Any]:
        return _facts(self.path)

    def open(self) -> CachedVideoLatents:
        return CachedVideoLatents(self.path)


def _facts(path: str) -> dict[str, Any]:
    """What a model card says of the data that a cache was made of."""
    background = read_record(Path(path))["config"]["data"].get("background")
    return {} if background is None else {"transparent pixels": f"on {background}"}
