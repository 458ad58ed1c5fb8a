"""Images encoded once by an autoencoder: written by scripts/cache_latents.py image, read by the trainer.

A row of the cache is ``mean`` and ``std`` float16 ``[C, h, w]`` and ``label`` int64; see :mod:`.shards`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import AutoencoderKL
from torch import Tensor

from ...hub import component_subfolder
from ..config import as_dict
from .images import DataConfig, ImageSamples, open_images
from .shards import Shards, write_shards
from .stream import SampleSource, UnreadableSampleError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LatentCacheConfig:
    """What to encode, and how.

    Args:
        output_dir: where the cache goes. If it holds a part of the same cache, the rest is added.
        vae: folder or hub id of an AutoencoderKL, or of a pipeline that has one.
        data: the images; with ``flip`` both the image and its mirror image are stored.
        size: side of the images in pixels.
        batch_size: images encoded at a time.
        shard_size: images per file.
    """

    output_dir: str
    vae: str
    data: DataConfig
    size: int = 256
    batch_size: int = 16
    shard_size: int = 1024

    def __post_init__(self) -> None:
        for name in ("size", "batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")


def load_vae(path: str) -> Any:
    """An autoencoder by the folder or hub id of itself or of a pipeline."""
    vae = AutoencoderKL.from_pretrained(path, subfolder=component_subfolder(path, "vae"))
    return vae.eval().requires_grad_(False)


class CachedLatents:
    """The samples in a cache: ``(mean + std noise - shift) scaling``, as the autoencoder's pipeline scales.

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

    def load(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        row = self.shards.read(index, ("mean", "std", "label"))
        mean, std = row["mean"].float(), row["std"].float()
        latents = mean + std * torch.randn(mean.shape, generator=generator)
        return {"samples": (latents - self._shift) * self._scaling, "class_labels": int(row["label"])}

    def load_vae(self) -> AutoencoderKL:
        """The autoencoder that the cache was made with."""
        return load_vae(self.vae)


def cache_latents(config: LatentCacheConfig) -> None:
    """Encode a data set; see :func:`.shards.write_shards`.

    Raises:
        ValueError: when ``output_dir`` holds another cache, with the keys that differ.
    """
    images = ImageSamples(open_images(config.data), channels=3, size=config.size)
    vae = load_vae(config.vae).to(PartialState().device)
    keep = ("vae", "data", "size", "shard_size")
    record = {
        "config": {key: value for key, value in as_dict(config).items() if key in keep},
        "class_names": images.class_names,
        "scaling_factor": vae.config.scaling_factor,
        "shift_factor": vae.config.shift_factor or 0.0,
    }
    write_shards(
        Path(config.output_dir),
        record,
        num_samples=len(images),
        shard_size=config.shard_size,
        make_rows=lambda rows: _encode(vae, images, rows, config),
    )


@torch.no_grad()
def _encode(
    vae: Any, images: ImageSamples, rows: range, config: LatentCacheConfig
) -> list[dict[str, Tensor]]:
    """Mean, std and label of some images, and of their mirror images with ``data.flip``."""
    samples = list(readable(images, rows))
    pixels = [sample["samples"] for sample in samples]
    labels = [torch.tensor(sample["class_labels"]) for sample in samples]
    if config.data.flip:
        pixels = [view for image in pixels for view in (image, image.flip(-1))]
        labels = [label for label in labels for _ in range(2)]
    encoded: list[tuple[Tensor, Tensor]] = []
    for start in range(0, len(pixels), config.batch_size):
        batch = torch.stack(pixels[start : start + config.batch_size])
        posterior = vae.encode(batch.to(vae.device, vae.dtype)).latent_dist
        encoded += zip(posterior.mean.half().cpu(), posterior.std.half().cpu(), strict=True)
    return [
        {"mean": mean, "std": std, "label": label} for (mean, std), label in zip(encoded, labels, strict=True)
    ]


def readable(source: SampleSource, rows: range, *, draws: int = 1) -> Iterator[dict[str, Any]]:
    """The samples that can be decoded, each drawn ``draws`` times; the others are named."""
    skipped = 0
    for row in rows:
        try:
            # What is drawn depends on the row alone, so that any process writes the same.
            yield dict(source.load(row // draws, torch.Generator().manual_seed(row)))
        except UnreadableSampleError as error:
            skipped += 1
            logger.warning("skipped, number %d of this file: %s", skipped, error)
