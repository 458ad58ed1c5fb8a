"""Training text-to-video models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers import WanImageToVideoPipeline

from mhla_diffusion.pipelines.video import MHLAWanPipeline

from ..attention import MHLAConfig
from ..backbones import MHLAWanTransformer3DModel
from ..files.videos import require_video_writer
from .adapters import require_trained
from .conditioning import Captions, require_probability
from .config import changeable, require_shape_or_init_from
from .data import CachedLatents, VideoDataConfig, VideoSamples
from .data.captions import texts_of
from .data.image_conditions import load_image_encoder
from .data.stream import SampleSource
from .objectives import Objective
from .run import new_or_loaded, require_patches, train
from .settings import RunConfig
from .task import SampleSheetConfig, TrainingTask
from .text import TextConfig, load_text_encoder, video_caption_encoder, warn_of_long_captions


@dataclass(frozen=True)
class VideoModelConfig:
    """Transformer: either ``init_from``, or a shape for a new one.

    Args:
        init_from: folder or hub id of an MHLA pipeline or transformer, to go on training.
        patch_size: frames, height and width of a token, in pixels or of the latents.
        in_channels: 1 (gray) or 3 (RGB), or the channels of the latents.
        num_layers, num_attention_heads, attention_head_dim, ffn_dim: of the transformer.
        attention: ``"mhla"`` (default), ``"linear"`` or ``"softmax"``, for all layers or as a list.
        mhla: see :class:`MHLAConfig`; its defaults if not given.

    Raises:
        ValueError: when the shape is not complete, or is given beside ``init_from``.
    """

    init_from: str | None = None
    patch_size: tuple[int, int, int] | None = None
    in_channels: int | None = None
    num_layers: int | None = None
    num_attention_heads: int | None = None
    attention_head_dim: int | None = None
    ffn_dim: int | None = None
    attention: str | tuple[str, ...] | None = None
    mhla: MHLAConfig | None = None

    def __post_init__(self) -> None:
        require_shape_or_init_from(self, optional=("attention", "mhla"))


@dataclass(frozen=True, kw_only=True)
class VideoSamplingConfig(SampleSheetConfig):
    """Videos during training, a row of frames each; see also :class:`SampleSheetConfig`.

    Args:
        prompts: one row each.
    """

    prompts: tuple[str, ...] = changeable(())

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every and not self.prompts:
            raise ValueError("sampling.prompts must have at least one prompt when sampling.every is set")

    def rows(self) -> list[dict[str, Any]]:
        return [{"prompt": prompt} for prompt in self.prompts]


@dataclass(frozen=True, kw_only=True)
class VideoTrainingConfig(RunConfig):
    """Training run; see also :class:`RunConfig`.

    Args:
        model: see :class:`VideoModelConfig`.
        data: see :class:`VideoDataConfig`.
        text: see :class:`TextConfig`.
        sampling: see :class:`VideoSamplingConfig`.
        caption_dropout: probability that a caption is replaced by the empty one, for guidance.

    Raises:
        ValueError: for a probability outside [0, 1), or an objective other than flow matching.
    """

    model: VideoModelConfig
    data: VideoDataConfig
    text: TextConfig
    sampling: VideoSamplingConfig = field(default_factory=VideoSamplingConfig)
    caption_dropout: float = 0.1

    def __post_init__(self) -> None:
        require_probability("caption_dropout", self.caption_dropout)
        require_trained(self.lora, self.model.init_from)
        if self.text.instruction:
            raise ValueError("text.instruction is for models of images: remove it")
        if self.objective.name != "flow":
            raise ValueError("Wan is trained by flow matching: set objective.name to flow")

    def build(self, objective: Objective, model: Any = None) -> tuple[Any, SampleSource, TrainingTask]:
        if self.sampling.every:
            require_video_writer()
        source = self.data.open()
        latents = source if isinstance(source, CachedLatents) else None
        parts = build_parts(self, objective, latents)
        encoder = video_caption_encoder(parts)
        if latents is not None:
            latents.require_text(self.text, encoder)
        sizes = [(self.data.frames, *size) for size in self.data.sizes] if latents is None else latents.sizes
        if model is None:
            text_dim = parts.text_encoder.config.hidden_size
            model = build_model(self.model, text_dim=text_dim, sizes=sizes, images=_image_arguments(latents))
        if latents is None:
            source = VideoSamples(source, self.data, channels=model.config.in_channels)
            warn_of_long_captions(texts_of(source.captions), parts.tokenizer, self.text.max_length)
        else:
            latents.require_channels(model)
        conditioning = Captions(encoder, self.caption_dropout, embedded=latents is not None)
        pipeline: Callable[..., Any] = with_transformer(parts, parts.size_in_pixels(sizes[0]))
        if latents is not None and latents.condition is not None:
            if self.sampling.every:
                raise ValueError("sampling.every must be 0 for image-to-video: a sheet has no first frames")
            pipeline = with_first_frames(parts, latents)
        facts = self.data.chosen().facts()
        return model, source, TrainingTask(conditioning, self.sampling, pipeline, self.data.title, facts)


def build_parts(
    config: VideoTrainingConfig, objective: Objective, latents: CachedLatents | None
) -> MHLAWanPipeline:
    """Build the pipeline that is trained, without its transformer."""
    tokenizer, text_encoder = load_text_encoder(config.text)
    return MHLAWanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=None if latents is None else latents.load_vae(),
        scheduler=objective.scheduler(),
        max_sequence_length=config.text.max_length,
        fps=(config.data.fps if latents is None else latents.fps) or 16.0,
    )


def with_transformer(parts: MHLAWanPipeline, size: tuple[int, ...]) -> Callable[..., MHLAWanPipeline]:
    """Return what makes such a pipeline of a transformer and the facts of its training.

    Args:
        parts: all but the transformer.
        size: frames, height and width in pixels of the clips it is trained on.
    """
    others = {name: part for name, part in parts.components.items() if name != "transformer"}
    config = parts.config
    return partial(
        MHLAWanPipeline,
        **others,
        max_sequence_length=config.max_sequence_length,
        fps=config.fps,
        sample_size=size,
    )


def with_first_frames(parts: MHLAWanPipeline, latents: CachedLatents) -> Callable[..., Any]:
    """Return what makes diffusers' image-to-video pipeline of a transformer; it keeps no facts."""
    names = ("tokenizer", "text_encoder", "vae", "scheduler")
    others = {name: part for name, part in parts.components.items() if name in names}
    if latents.image_encoder is not None:
        others["image_processor"], others["image_encoder"] = load_image_encoder(latents.image_encoder)

    def make(transformer: Any, training: Any) -> WanImageToVideoPipeline:
        return WanImageToVideoPipeline(transformer=transformer, **others)

    return make


def _image_arguments(latents: CachedLatents | None) -> dict[str, Any] | None:
    """Arguments of a new model that is given known frames; None without them."""
    if latents is None or latents.condition is None:
        return None
    arguments: dict[str, Any] = {"in_channels": latents.channels + latents.condition[0]}
    if latents.image_embeds is not None:
        images, tokens, width = latents.image_embeds
        arguments["image_dim"] = width
        # With positions the model takes two images.
        arguments["pos_embed_seq_len"] = images * tokens if images > 1 else None
    return arguments


def build_model(
    config: VideoModelConfig,
    *,
    text_dim: int,
    sizes: Sequence[tuple[int, ...]],
    images: Mapping[str, Any] | None = None,
) -> Any:
    """Build a new transformer, or load the one that ``init_from`` names, in fp32.

    Args:
        config: of the model.
        text_dim: width of the text embeddings.
        sizes: frames, height and width of the samples.
        images: arguments of a new model that is given known frames.

    Raises:
        ValueError: when samples do not divide into patches, or a loaded model does not fit the text encoder.
    """
    arguments: dict[str, Any] = {}
    if config.patch_size is not None:
        require_patches(config.patch_size, sizes)
        grid = tuple(side // p for side, p in zip(sizes[0], config.patch_size, strict=True))
        arguments = {
            "in_channels": config.in_channels, "out_channels": config.in_channels, "text_dim": text_dim,
            "sample_grid": grid, **(images or {}),
        }  # fmt: skip
        if arguments.get("image_dim"):
            arguments["added_kv_proj_dim"] = (config.num_attention_heads or 0) * (
                config.attention_head_dim or 0
            )
    model = new_or_loaded(MHLAWanTransformer3DModel, config, without=("in_channels",), **arguments)
    if config.init_from is None:
        torch.nn.init.zeros_(model.proj_out.weight)  # as Wan's authors start
    if model.config.text_dim != text_dim:
        raise ValueError(
            f"{config.init_from} takes text of width {model.config.text_dim}, but text.encoder "
            f"gives {text_dim}: use the text encoder that it was trained with"
        )
    given = model.config.image_dim is not None or model.config.in_channels != model.config.out_channels
    if given and images is None:
        raise ValueError(
            f"{config.init_from} makes videos of images (in_channels {model.config.in_channels}, "
            f"out_channels {model.config.out_channels}): train it on latents that mhla cache-latents video "
            "made with --image_condition, or give a text-to-video model as model.init_from"
        )
    require_patches(tuple(model.config.patch_size), sizes)
    return model


def train_video(config: VideoTrainingConfig, *, resume: str | None = None) -> int:
    """Train a video model; see :func:`.run.train`."""
    return train(config, resume=resume)
