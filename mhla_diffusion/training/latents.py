"""A data set encoded once by an autoencoder: written by scripts/cache_latents.py, read by the trainer.

A cache is a folder of ``latents-00000.safetensors`` and so on, each with ``mean`` and ``std`` float16
[n, C, h, w] and ``labels`` int64 [n], and ``cache.json``.
"""

from __future__ import annotations

import bisect
import itertools
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import AutoencoderKL
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from mhla_diffusion.pipelines.auto import component_subfolder

from .config import as_dict
from .data import DataConfig, ImageSamples, open_images
from .stream import UnreadableSampleError

logger = logging.getLogger(__name__)

_RECORD = "cache.json"


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
        self.path = Path(path)
        if not (self.path / _RECORD).is_file():
            raise ValueError(f"{path} holds no latent cache; make one with scripts/cache_latents.py")
        record = json.loads((self.path / _RECORD).read_text())
        self.class_names: list[str] = record["class_names"]
        self.vae: str = record["config"]["vae"]
        self._shift, self._scaling = record["shift_factor"], record["scaling_factor"]
        self.files = [_shard(self.path, number) for number in range(record["num_shards"])]
        if missing := [file for file in self.files if not file.is_file()]:
            raise ValueError(
                f"latent cache {path} lacks {len(missing)} of {len(self.files)} files; run "
                "scripts/cache_latents.py again to finish it"
            )
        shapes = [_shape(file) for file in self.files]
        if not any(shape[0] for shape in shapes):
            raise ValueError(f"latent cache {path} is empty: none of its images could be read")
        self.shape: tuple[int, ...] = next(shape[1:] for shape in shapes if shape[0])
        self._ends = list(itertools.accumulate(shape[0] for shape in shapes))
        self._open: dict[tuple[int, int], Any] = {}

    def __len__(self) -> int:
        return self._ends[-1]

    def __getstate__(self) -> dict[str, Any]:
        # Open files do not travel to worker processes.
        return {**self.__dict__, "_open": {}}

    def load(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        shard = bisect.bisect_right(self._ends, index)
        row = index - (self._ends[shard - 1] if shard else 0)
        try:
            file = self._file(shard)
            mean, std = (file.get_slice(name)[row].float() for name in ("mean", "std"))
            label = int(file.get_slice("labels")[row])
        except (OSError, SafetensorError) as error:
            raise UnreadableSampleError(f"{self.files[shard]}, row {row}: {error}") from error
        latents = mean + std * torch.randn(mean.shape, generator=generator)
        return {"samples": (latents - self._shift) * self._scaling, "class_labels": label}

    def _file(self, shard: int) -> Any:
        # Keyed by process: a forked worker must not share its parent's handle.
        key = (os.getpid(), shard)
        if key not in self._open:
            self._open[key] = safe_open(self.files[shard], framework="pt")
        return self._open[key]

    def load_vae(self) -> AutoencoderKL:
        """The autoencoder that the cache was made with."""
        return load_vae(self.vae)


def cache_latents(config: LatentCacheConfig) -> None:
    """Encode a data set. Under ``accelerate launch`` its files are shared out among the processes.

    Each file is written under another name and renamed, so that an interrupted run can be started again.

    Raises:
        ValueError: when ``output_dir`` holds another cache, with the keys that differ.
    """
    state = PartialState()
    images = ImageSamples(open_images(config.data), channels=3, size=config.size)
    vae = load_vae(config.vae).to(state.device)
    folder = Path(config.output_dir)
    num_shards = -(-len(images) // config.shard_size)
    if state.is_main_process:
        _claim(folder, config, images, vae, num_shards)
    state.wait_for_everyone()
    numbers = [n for n in range(num_shards) if not _shard(folder, n).is_file()]
    mine = numbers[state.process_index :: state.num_processes]
    for number in tqdm(mine, unit="file", disable=not state.is_main_process):
        first = number * config.shard_size
        rows = range(first, min(first + config.shard_size, len(images)))
        tensors = _encode(vae, images, rows, config)
        temporary = folder / f".writing-{_shard(folder, number).name}"
        save_file(tensors, temporary)
        os.replace(temporary, _shard(folder, number))
    state.wait_for_everyone()


def _claim(folder: Path, config: LatentCacheConfig, images: ImageSamples, vae: Any, num_shards: int) -> None:
    """Write cache.json, or make sure that the one there is of the same cache."""
    keep = ("vae", "data", "size", "shard_size")
    record = {
        "config": {key: value for key, value in as_dict(config).items() if key in keep},
        "num_shards": num_shards,
        "class_names": images.class_names,
        "scaling_factor": vae.config.scaling_factor,
        "shift_factor": vae.config.shift_factor or 0.0,
    }
    path = folder / _RECORD
    if path.is_file():
        old = json.loads(path.read_text())
        if changes := [f"{key}: {old[key]} -> {record[key]}" for key in record if old[key] != record[key]]:
            raise ValueError(f"{folder} holds another latent cache:\n  " + "\n  ".join(changes))
        return
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no latent cache; choose another --output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=2))
    os.replace(temporary, path)


@torch.no_grad()
def _encode(vae: Any, images: ImageSamples, rows: range, config: LatentCacheConfig) -> dict[str, Tensor]:
    """Mean, std and label of some images, and of their mirror images with ``data.flip``."""
    samples, labels = _readable(images, rows)
    if config.data.flip:
        samples = [view for sample in samples for view in (sample, sample.flip(-1))]
        labels = [label for label in labels for _ in range(2)]
    means, stds = [], []
    for start in range(0, len(samples), config.batch_size):
        batch = torch.stack(samples[start : start + config.batch_size])
        posterior = vae.encode(batch.to(vae.device, vae.dtype)).latent_dist
        means.append(posterior.mean.half().cpu())
        stds.append(posterior.std.half().cpu())
    none = [torch.empty(0, dtype=torch.float16)]
    # Contiguous, as safetensors needs: the encoder may answer in channels-last.
    return {
        "mean": torch.cat(means or none).contiguous(),
        "std": torch.cat(stds or none).contiguous(),
        "labels": torch.tensor(labels, dtype=torch.int64),
    }


def _readable(images: ImageSamples, rows: range) -> tuple[list[Tensor], list[int]]:
    """The images that can be decoded; the others are named."""
    samples, labels, skipped = [], [], 0
    for index in rows:
        try:
            sample = images.load(index, torch.Generator())
        except UnreadableSampleError as error:
            skipped += 1
            logger.warning("skipped, number %d of this file: %s", skipped, error)
            continue
        samples.append(sample["samples"])
        labels.append(sample["class_labels"])
    return samples, labels


def _shard(folder: Path, number: int) -> Path:
    return folder / f"latents-{number:05d}.safetensors"


def _shape(file: Path) -> tuple[int, ...]:
    with safe_open(file, framework="pt") as tensors:
        return tuple(tensors.get_slice("mean").get_shape())
