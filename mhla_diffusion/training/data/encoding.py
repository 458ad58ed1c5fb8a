"""Encoding a data set once, so that training need not: what scripts/cache_latents.py does.

:mod:`.latents` says what the rows are, and reads them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from mhla_diffusion.pipelines.video import MHLAWanPipeline

from ...processes import process_state
from ..text import TextConfig, embed_caption, load_text_encoder, warn_of_long_captions
from .config import DataConfig, VideoDataConfig, open_images, open_videos
from .images import ImageSamples
from .latents import load_vae, load_video_vae
from .shards import write_shards
from .stream import SampleSource, UnreadableSampleError
from .videos import VideoSamples

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LatentCacheConfig:
    """Cache to be made: what is encoded, and how.

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


def cache_latents(config: LatentCacheConfig) -> None:
    """Encode a data set; see :func:`.shards.write_shards`.

    Raises:
        ValueError: when ``output_dir`` holds another cache, with the keys that differ.
    """
    images = ImageSamples(open_images(config.data), channels=3, size=config.size)
    vae = load_vae(config.vae).to(process_state().device)
    facts = {
        "class_names": images.class_names,
        "scaling_factor": vae.config.scaling_factor,
        "shift_factor": vae.config.shift_factor or 0.0,
    }
    write_shards(
        config,
        keep=("vae", "data", "size", "shard_size"),
        facts=facts,
        num_samples=len(images),
        make_rows=lambda rows: _encode_images(vae, images, rows, config),
    )


@torch.no_grad()
def _encode_images(
    vae: Any, images: ImageSamples, rows: range, config: LatentCacheConfig
) -> list[dict[str, Tensor]]:
    """Encode some images: mean, std and label of each, and of their mirror images with ``data.flip``."""
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


@dataclass(frozen=True)
class VideoLatentCacheConfig:
    """Cache to be made: what is encoded, and how.

    Args:
        output_dir: where the cache goes. If it holds a part of the same cache, the rest is added.
        vae: folder or hub id of an AutoencoderKLWan, or of a pipeline that has one.
        data: the videos; frames and sizes as the autoencoder takes them.
        text: see :class:`TextConfig`.
        clips: random clips of each video.
        shard_size: clips per file.
    """

    output_dir: str
    vae: str
    data: VideoDataConfig
    text: TextConfig
    clips: int = 1
    shard_size: int = 128

    def __post_init__(self) -> None:
        for name in ("clips", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")


def cache_video_latents(config: VideoLatentCacheConfig) -> None:
    """Encode clips and captions; see :func:`.shards.write_shards`.

    Raises:
        ValueError: when the autoencoder does not take clips of that size, or ``output_dir`` holds another
            cache, with the keys that differ.
    """
    vae = load_video_vae(config.vae).to(process_state().device)
    _check_sizes(config.data, vae)
    videos = VideoSamples(open_videos(config.data), config.data, channels=vae.config.in_channels)
    tokenizer, text_encoder = load_text_encoder(config.text)
    warn_of_long_captions(videos.captions, tokenizer, config.text.max_length)
    parts = MHLAWanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder.to(process_state().device),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        max_sequence_length=config.text.max_length,
    )
    write_shards(
        config,
        keep=("vae", "data", "text", "clips", "shard_size"),
        num_samples=len(videos) * config.clips,
        make_rows=lambda rows: [
            _encode_clip(parts, sample) for sample in readable(videos, rows, draws=config.clips)
        ],
    )


@torch.no_grad()
def _encode_clip(parts: MHLAWanPipeline, sample: dict[str, Any]) -> dict[str, Tensor]:
    """Encode a clip, its latents by their mode, as Wan's own training has them, and the text."""
    vae = parts.vae
    clip = sample["samples"][None].to(vae.device, vae.dtype)
    mean, std = (
        torch.tensor(values, device=vae.device).view(-1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    latents = (vae.encode(clip).latent_dist.mode()[0] - mean) / std
    text = embed_caption(parts, sample["caption"], vae.device)[0]
    return {"latents": latents.half().cpu(), "text": text[text.any(dim=-1)].cpu()}


def _check_sizes(data: VideoDataConfig, vae: Any) -> None:
    step, factor = vae.config.scale_factor_temporal, vae.config.scale_factor_spatial
    if extra := (data.frames - 1) % step:
        lower = data.frames - extra
        raise ValueError(
            f"data.frames must be one more than a multiple of {step} for this autoencoder, got "
            f"{data.frames}; the nearest are {lower} and {lower + step}"
        )
    for size in data.sizes:
        if any(side % factor for side in size):
            raise ValueError(
                f"data.sizes must be multiples of {factor} for this autoencoder, got {tuple(size)}; the "
                f"nearest is {tuple(max(1, round(side / factor)) * factor for side in size)}"
            )


def readable(source: SampleSource, rows: range, *, draws: int = 1) -> Iterator[dict[str, Any]]:
    """Load the samples that can be decoded, each drawn ``draws`` times; the others are named."""
    skipped = 0
    for row in rows:
        try:
            # What is drawn depends on the row alone, so that any process writes the same.
            yield dict(source.load(row // draws, torch.Generator().manual_seed(row)))
        except UnreadableSampleError as error:
            skipped += 1
            logger.warning("skipped, number %d of this file: %s", skipped, error)
