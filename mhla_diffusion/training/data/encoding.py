"""Encoding a data set once, so that training need not: what ``mhla cache-latents`` does.

:mod:`.latents` says what the rows are, and reads them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mhla_diffusion.pipelines.identity import component_sha256

from ...autoencoders import VIDEO_AUTOENCODERS, vae_scale_factor
from ...files.writing import require_writable
from ...processes import in_first_process, process_state
from ..stock import require_cache
from ..text import CaptionEncoder, TextConfig, load_caption_encoders
from .captions import Caption, texts_of, warn_of_sides
from .clip_conditions import (
    Controls,
    ControlTask,
    ImageConditions,
    edit_of,
    load_image_encoder,
    require_edits,
)
from .config import DataConfig, VideoDataConfig, open_images, open_videos
from .fingerprint import fingerprint_of
from .image_sources import sizes_of
from .images import ImageSamples
from .latents import load_vae
from .shards import write_shards
from .stream import SampleSource, UnreadableSampleError, is_of_disk
from .video_autoencoders import encode_clip, require_clips, require_multiples
from .videos import VideoSamples

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LatentCacheConfig:
    """Cache to be made: what is encoded, and how.

    Args:
        output_dir: where the cache goes. If it holds a part of the same cache, the rest is added.
        vae: folder or hub id of an AutoencoderKL, AutoencoderDC or AutoencoderKLQwenImage, or of a pipeline
            that has one.
        data: the images; with ``flip`` both the image and its mirror image are stored.
        text: for models of texts: see :class:`TextConfig`. All captions of an image are embedded.
        size: side of the images in pixels, where data.sizes and data.aspect_ratios do not say it.
        batch_size: images encoded at a time.
        shard_size: images per file.
    """

    output_dir: str
    vae: str
    data: DataConfig
    text: TextConfig | None = None
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
        ValueError: when the autoencoder does not take images of a size, no model is trained on such latents,
            or ``output_dir`` holds another cache, with the keys that differ.
    """
    require_writable(Path(config.output_dir))
    vae = load_vae(config.vae)
    sizes = sizes_of(config.data, (config.size, config.size))
    require_multiples("data.sizes" if config.data.sizes else "size", sizes, vae_scale_factor(vae))
    pipeline = "" if config.text is None else config.text.pipeline
    require_cache(pipeline, vae, sizes, given="", videos=False)
    images = ImageSamples(
        open_images(config.data, captioned=config.text is not None),
        channels=3, sizes=sizes, enlarge=config.data.enlarge,
    )  # fmt: skip
    _require_files(images.images)
    if config.data.flip:
        warn_of_sides(images.captions or ())
    encoders = [] if config.text is None else load_caption_encoders(config.text)
    facts: dict[str, Any] = {} if encoders else {"class_names": images.class_names}
    if type(vae).__name__ == "AutoencoderKL":  # whose latents are drawn when they are read
        facts |= {
            "scaling_factor": vae.config.scaling_factor,
            "shift_factor": vae.config.shift_factor or 0.0,
        }
    write_shards(
        config,
        keep=("vae", "data", "text", "size", "shard_size"),
        facts=facts | _prepare(vae, encoders, images.captions or ()),
        num_samples=len(images),
        rows_per_sample=1 + config.data.flip,
        data=in_first_process(partial(fingerprint_of, images)),
        make_rows=lambda rows: _encode_images(vae, encoders, images, rows, config),
    )


def _require_files(source: Any) -> None:
    """Check that the files of samples are there, where ``source.paths`` names them.

    Raises:
        ValueError: when one is not.
    """
    paths = list(getattr(source, "paths", ()))
    if missing := [path for path in paths if not os.path.exists(path)]:
        raise ValueError(
            f"{len(missing)} of {len(paths)} files are not there, first {missing[0]}: put them back, or take "
            "them out of the data"
        )


def _prepare(
    vae: Any, encoders: Sequence[CaptionEncoder], captions: Sequence[Caption | None]
) -> dict[str, dict[str, str]]:
    """Name captions that are cut, return the hashes of what encodes, and move it to the device."""
    parts = {"vae": vae}
    for encoder in encoders:
        encoder.warn_of_long(texts_of(captions))
        parts |= encoder.components
    hashes = {name: component_sha256(part) for name, part in parts.items()}
    device = process_state().device
    vae.to(device)
    for encoder in encoders:
        encoder.to(device)
    return {"components": hashes}


@torch.no_grad()
def _encode_images(
    vae: Any,
    encoders: Sequence[CaptionEncoder],
    images: ImageSamples,
    rows: range,
    config: LatentCacheConfig,
) -> list[dict[str, Tensor]]:
    """Encode some images, and their mirror images with ``data.flip``: latents, and what is known of each."""
    pixels: list[Tensor] = []
    known: list[dict[str, Tensor]] = []
    for index, sample, _ in readable(images, rows):
        if not encoders:
            about = {"label": torch.tensor(sample["class_labels"])}
        else:
            assert images.captions is not None
            about = _embed(encoders, images.captions[index] or "")
        views = [sample["samples"], sample["samples"].flip(-1)] if config.data.flip else [sample["samples"]]
        pixels += views
        known += [about] * len(views)
    latents = _encode_batches(vae, pixels, config.batch_size)
    return [{**encoded, **about} for encoded, about in zip(latents, known, strict=True)]


def _encode_batches(vae: Any, pixels: Sequence[Tensor], batch_size: int) -> list[dict[str, Tensor]]:
    """Encode images, those of a size together."""
    encoded: list[dict[str, Tensor]] = [{}] * len(pixels)
    shapes = [tuple(image.shape) for image in pixels]
    for shape in dict.fromkeys(shapes):
        alike = [number for number, other in enumerate(shapes) if other == shape]
        for start in range(0, len(alike), batch_size):
            numbers = alike[start : start + batch_size]
            batch = torch.stack([pixels[number] for number in numbers]).to(vae.device, vae.dtype)
            for number, latents in zip(numbers, _encode_batch(vae, batch), strict=True):
                encoded[number] = latents
    return encoded


def _encode_batch(vae: Any, batch: Tensor) -> list[dict[str, Tensor]]:
    if type(vae).__name__ == "AutoencoderKLQwenImage":  # of videos of one frame
        return [{"latents": encode_clip(vae, image[:, None])[:, 0]} for image in batch]
    output = vae.encode(batch)
    if not hasattr(output, "latent_dist"):  # AutoencoderDC
        scaled = output.latent * vae.config.scaling_factor
        return [{"latents": latents} for latents in scaled.half().cpu()]
    posterior = output.latent_dist
    pairs = zip(posterior.mean.half().cpu(), posterior.std.half().cpu(), strict=True)
    return [{"mean": mean, "std": std} for mean, std in pairs]


def _embed(encoders: Sequence[CaptionEncoder], caption: Caption) -> dict[str, Tensor]:
    """Embed a caption by each encoder; of several all of them, one after the other."""
    weighted = {} if isinstance(caption, str) else dict(caption)
    captions = [caption] if isinstance(caption, str) else list(caption)
    row = {"weights": torch.tensor(list(weighted.values()))} if weighted else {}
    for encoder in encoders:
        texts = [encoder(text) for text in captions]
        row[f"text{encoder.suffix}"] = torch.cat([text.values.cpu() for text in texts])
        if len(texts) > 1 or texts[0].tokens < len(texts[0].values):
            row[f"tokens{encoder.suffix}"] = torch.tensor([text.tokens for text in texts])
    return row


@dataclass(frozen=True)
class VideoLatentCacheConfig:
    """Cache to be made: what is encoded, and how.

    Args:
        output_dir: where the cache goes. If it holds a part of the same cache, the rest is added.
        vae: folder or hub id of an AutoencoderKLWan, AutoencoderKLAllegro, AutoencoderKLLTXVideo,
            AutoencoderKLHunyuanVideo or, frame by frame, an AutoencoderKL, or of a pipeline that has one.
        data: the videos; frames and sizes as the autoencoder takes them.
        text: see :class:`TextConfig`. All captions of a video are embedded.
        image_condition: for image-to-video models, the frames that are known: the ``"first"``, or
            ``"first_and_last"``. For ChronoEdit ``"edit"``: of each clip the first frame, which is known, and
            the last, an edit of it, are encoded alone.
        image_encoder: folder or hub id of a CLIP vision model and its processor, or of a pipeline that has
            both, for image-to-video models that read its embeddings of these frames (Wan 2.1, ChronoEdit).
        control: for Wan VACE, what is known of a clip: tasks of ``"first"``, ``"first_and_last"``,
            ``"inpainting"`` (all but a box), ``"outpainting"`` (a box alone) and ``"gray"`` (a clip to be
            coloured), one of which is drawn for each.
        clips: random clips of each video.
        shard_size: clips per file.
    """

    output_dir: str
    vae: str
    data: VideoDataConfig
    text: TextConfig
    image_condition: Literal["none", "first", "first_and_last", "edit"] = "none"
    image_encoder: str | None = None
    control: tuple[ControlTask, ...] = ()
    clips: int = 1
    shard_size: int = 128

    def __post_init__(self) -> None:
        for name in ("clips", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.image_encoder and self.image_condition == "none":
            raise ValueError("image_encoder needs image_condition first, first_and_last or edit, got none")
        if self.image_condition == "edit" and not self.image_encoder:
            raise ValueError(
                "image_condition edit is for ChronoEdit, which reads embeddings of the first frame: give "
                "image_encoder"
            )
        if self.control and self.image_condition != "none":
            raise ValueError(
                f"control {list(self.control)} is for Wan VACE, and image_condition {self.image_condition} "
                "for image-to-video models: remove one of the two"
            )

    @property
    def given(self) -> str:
        """Name of what models are given beside texts, see :attr:`.CachedLatents.given`."""
        if self.image_condition != "none":
            return "edit" if self.image_condition == "edit" else "condition"
        return "control" if self.control else ""


def cache_video_latents(config: VideoLatentCacheConfig) -> None:
    """Encode clips and captions; see :func:`.shards.write_shards`.

    Raises:
        ValueError: when the autoencoder does not take clips of that size, no model is trained on such
            latents, or ``output_dir`` holds another cache, with the keys that differ.
    """
    require_writable(Path(config.output_dir))
    vae = load_vae(config.vae, VIDEO_AUTOENCODERS)
    if config.image_condition == "edit":
        require_edits(vae, config.data.frames, config.data.sizes)
    else:
        require_clips(vae, config.data.frames, config.data.sizes)
    require_cache(
        config.text.pipeline, vae, config.data.sizes, given=config.given, videos=True,
        frames=config.data.frames,
    )  # fmt: skip
    videos = VideoSamples(open_videos(config.data), config.data, channels=vae.config.in_channels)
    _require_files(videos.videos)
    videos.warn_of_rates()
    encoders, conditions = load_caption_encoders(config.text, videos=True), _load_conditions(config, vae)
    write_shards(
        config,
        keep=("vae", "data", "text", "image_condition", "image_encoder", "control", "clips", "shard_size"),
        facts=_prepare(vae, encoders, videos.captions),
        num_samples=len(videos) * config.clips,
        data=in_first_process(partial(fingerprint_of, videos)),
        make_rows=lambda rows: [
            {
                "latents": encode_clip(vae, clip),
                **_embed(encoders, videos.captions[index]),
                **conditions(clip, generator),
            }
            for index, clip, generator in _clips(videos, rows, config, vae)
        ],
    )


def _clips(
    videos: VideoSamples, rows: range, config: VideoLatentCacheConfig, vae: Any
) -> Iterator[tuple[int, Tensor, torch.Generator]]:
    """Load what is encoded, with the number of its video and a generator for what else is drawn of it."""
    for index, sample, generator in readable(videos, rows, draws=config.clips):
        clip = sample["samples"]
        yield index, edit_of(vae, clip) if config.image_condition == "edit" else clip, generator


def _load_conditions(
    config: VideoLatentCacheConfig, vae: Any
) -> Callable[[Tensor, torch.Generator], dict[str, Tensor]]:
    if config.image_condition == "none" and not config.control:
        return lambda clip, generator: {}
    if type(vae).__name__ != "AutoencoderKLWan":
        raise ValueError(
            f"image_condition and control are of models on latents of an AutoencoderKLWan, but {config.vae} "
            f"holds a {type(vae).__name__}: remove them"
        )
    if config.control:
        return Controls(vae, config.control)
    processor, encoder = load_image_encoder(config.image_encoder) if config.image_encoder else (None, None)
    if encoder is not None:
        encoder.to(process_state().device)
    last = config.image_condition == "first_and_last"
    conditions = ImageConditions(vae, last=last, processor=processor, encoder=encoder)
    return lambda clip, generator: conditions(clip)


def readable(
    source: SampleSource, rows: Iterable[int], *, draws: int = 1
) -> Iterator[tuple[int, dict[str, Any], torch.Generator]]:
    """Load the samples that can be decoded, each ``draws`` times; name the others.

    Yields:
        The number of a sample, the sample, and a generator for what else is drawn of it.

    Raises:
        ValueError: when a file is not there, or its disk: to leave it out would be for ever.
    """
    for row in rows:
        # What is drawn depends on the row alone, so that any process writes the same.
        generator = torch.Generator().manual_seed(row)
        try:
            yield row // draws, dict(source.load(row // draws, generator)), generator
        except UnreadableSampleError as error:
            if is_of_disk(error):
                raise ValueError(f"{error}: put it back, and run the same again") from error
            logger.warning("skipped: %s", error)
