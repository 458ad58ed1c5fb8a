"""Clips and captions encoded once: written by scripts/cache_latents.py video, read by the trainer.

A row of the cache is ``latents`` float16 ``[C, f, h, w]``, scaled as Wan's pipeline scales them, and ``text``
``[L, text_dim]``, the embeddings of the caption without the zeros that fill them up; see :mod:`.shards`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torch.nn import functional as F

from mhla_diffusion.pipelines.video import MHLAWanPipeline

from ...hub import component_subfolder
from ..config import as_dict
from ..text import TextConfig, embed_caption, load_text_encoder, warn_of_long_captions
from .latents import readable
from .shards import Shards, write_shards
from .videos import VideoDataConfig, VideoSamples, open_videos


@dataclass(frozen=True)
class VideoLatentCacheConfig:
    """What to encode, and how.

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


def load_video_vae(path: str) -> Any:
    """An autoencoder of videos by the folder or hub id of itself or of a pipeline, in fp32 as Wan's runs."""
    vae = AutoencoderKLWan.from_pretrained(
        path, subfolder=component_subfolder(path, "vae"), dtype=torch.float32
    )
    return vae.eval().requires_grad_(False)


class CachedVideoLatents:
    """The samples in a cache.

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

    def load(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        row = self.shards.read(index, ("latents", "text"))
        missing = self.text.max_length - len(row["text"])
        return {"samples": row["latents"].float(), "text": F.pad(row["text"], (0, 0, 0, missing))}


def cache_video_latents(config: VideoLatentCacheConfig) -> None:
    """Encode clips and captions; see :func:`.shards.write_shards`.

    Raises:
        ValueError: when the autoencoder does not take clips of that size, or ``output_dir`` holds another
            cache, with the keys that differ.
    """
    vae = load_video_vae(config.vae).to(PartialState().device)
    _check_sizes(config.data, vae)
    videos = VideoSamples(open_videos(config.data), config.data, channels=vae.config.in_channels)
    tokenizer, text_encoder = load_text_encoder(config.text)
    warn_of_long_captions(videos.captions, tokenizer, config.text.max_length)
    parts = MHLAWanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder.to(PartialState().device),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        max_sequence_length=config.text.max_length,
    )
    keep = ("vae", "data", "text", "clips", "shard_size")
    write_shards(
        Path(config.output_dir),
        {"config": {key: value for key, value in as_dict(config).items() if key in keep}},
        num_samples=len(videos) * config.clips,
        shard_size=config.shard_size,
        make_rows=lambda rows: [
            _encode(parts, sample) for sample in readable(videos, rows, draws=config.clips)
        ],
    )


@torch.no_grad()
def _encode(parts: MHLAWanPipeline, sample: dict[str, Any]) -> dict[str, Tensor]:
    """Latents by their mode, as Wan's own training has them, and the text."""
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
