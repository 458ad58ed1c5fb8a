"""Training text-to-video models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import WanImageToVideoPipeline
from diffusers.utils import load_image

from mhla_diffusion.pipelines.sampling import DEFAULT_FPS
from mhla_diffusion.pipelines.video import MHLAWanPipeline

from ..autoencoders import size_in_pixels
from ..backbones import MHLAWanTransformer3DModel
from ..config import MHLAConfig
from ..files.videos import require_video_writer
from ..hub import expert_times
from .adapters import require_trained
from .conditioning import Captions, require_probability
from .config import changeable, require_shape_or_init_from
from .data import CachedLatents, VideoDataConfig, VideoSamples
from .data.captions import texts_of
from .data.clip_conditions import load_image_encoder, read_control
from .data.stream import SampleSource
from .objectives import Objective
from .objectives.objective import require_times
from .run import new_or_loaded, require_patches, train
from .settings import RunConfig
from .stock import (
    VIDEOS,
    WAN_MULTIPLE,
    StockTraining,
    require_fit,
    require_pipeline_sizes,
    require_settings,
    trained_class,
)
from .task import SampleSheetConfig, TrainingTask
from .text import (
    TextConfig,
    load_caption_encoders,
    load_text_encoder,
    video_caption_encoder,
)


@dataclass(frozen=True)
class VideoModelConfig:
    """Transformer: either ``init_from``, or a shape for a new one.

    Args:
        init_from: folder or hub id of an MHLA pipeline or transformer, to go on training: of Wan; or on
            latents, for their own pipelines, of Latte, Allegro, Cosmos, SkyReels V2, Wan VACE, ChronoEdit,
            LTX-Video, SanaVideo or Kandinsky 5.
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

    @property
    def model_class(self) -> type[Any]:
        """Class of the model; a new one is Wan.

        Raises:
            ValueError: when ``init_from`` holds one that is not trained.
        """
        if self.init_from is None:
            return MHLAWanTransformer3DModel
        return trained_class(self.init_from, [MHLAWanTransformer3DModel, *VIDEOS], "videos")


# What a sheet may have beside prompts.
_GIVEN = {"images": "picture", "last_images": "picture", "videos": "video"}


@dataclass(frozen=True, kw_only=True)
class VideoSamplingConfig(SampleSheetConfig):
    """Videos during training, a row of frames each; see also :class:`SampleSheetConfig`.

    Args:
        prompts: one row each.
        images: of image-to-video models, the picture that the video of each prompt begins with, as a path; of
            ChronoEdit the picture to be edited.
        last_images: of those that are given the last frame too, the picture that it ends with.
        videos: of Wan VACE, the video for each prompt, as a path, whose first clip is given as far as a task
            says; the tasks of the data take turns.
    """

    prompts: tuple[str, ...] = changeable(())
    images: tuple[str, ...] = changeable(())
    last_images: tuple[str, ...] = changeable(())
    videos: tuple[str, ...] = changeable(())

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every and not self.prompts:
            raise ValueError("sampling.prompts must have at least one prompt when sampling.every is set")
        for name, kind in _GIVEN.items():
            paths = getattr(self, name)
            if paths and len(paths) != len(self.prompts):
                raise ValueError(
                    f"sampling.{name} must name a {kind} for each of the {len(self.prompts)} prompts, got "
                    f"{len(paths)}"
                )
            if missing := [path for path in paths if not Path(path).is_file()]:
                raise ValueError(f"sampling.{name}: {missing[0]} is no file")

    def rows(self) -> list[dict[str, Any]]:
        given: dict[str, Sequence[Any]] = {
            "image": [load_image(path) for path in self.images],
            "last_image": [load_image(path) for path in self.last_images],
            "video": self.videos,
        }
        return [
            {"prompt": prompt, **{name: row[number] for name, row in given.items() if row}}
            for number, prompt in enumerate(self.prompts)
        ]


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
        if self.model.init_from is None:
            self._require_flow()
        require_settings(
            self.text, self.objective, self.data.source, shown=self.sampling.every > 0, videos=True
        )

    def _require_flow(self) -> None:
        if self.objective.name != "flow":
            raise ValueError("Wan is trained by flow matching: set objective.name to flow")

    def build(self, objective: Objective, model: Any = None) -> tuple[Any, SampleSource, TrainingTask]:
        if self.sampling.every:
            require_video_writer()
        if model is None:
            for path in filter(None, (self.model.init_from, self.objective.teacher)):
                require_times(self.objective.times, expert_times(path), path)
        stock = VIDEOS.get(self.model.model_class if model is None else type(model))
        if stock is not None:
            return _build_for(stock, self, objective, model)
        self._require_flow()
        if self.text.pipeline:
            raise ValueError(f"text.pipeline {self.text.pipeline} is for another model: remove it")
        return _build_wan(self, objective, model)


def _build_wan(
    config: VideoTrainingConfig, objective: Objective, model: Any
) -> tuple[Any, SampleSource, TrainingTask]:
    source = config.data.open()
    latents = source if isinstance(source, CachedLatents) else None
    parts = build_parts(config, objective, latents)
    encoder = video_caption_encoder(parts)
    if latents is None:
        sizes: list[tuple[int, ...]] = [(config.data.frames, *size) for size in config.data.sizes]
    else:
        latents.require_text(config.text, [encoder])
        sizes = latents.sizes_as_listed(parts.vae)
        in_pixels = [size_in_pixels(parts.vae, size) for size in sizes]
        require_pipeline_sizes("Wan's pipeline", in_pixels, multiple=WAN_MULTIPLE)
    if model is None:
        text_dim = parts.text_encoder.config.hidden_size
        # The grid of a new model is of the smallest latents, as that of runs that are resumed.
        of_grid = sizes if latents is None else latents.sizes
        model = build_model(config.model, text_dim=text_dim, sizes=of_grid, images=_image_arguments(latents))
    if latents is None:
        source = VideoSamples(source, config.data, channels=model.config.in_channels)
        encoder.warn_of_long(texts_of(source.captions))
        source.warn_of_rates()
    else:
        latents.require_channels(model)
    task = TrainingTask(
        Captions([encoder], config.caption_dropout, embedded=latents is not None),
        config.sampling,
        with_transformer(parts, size_in_pixels(parts.vae, sizes[0])),
        config.data.title,
        config.data.chosen().facts(),
        fps=parts.config.fps,
    )
    _require_sheet_inputs(config.sampling, latents)
    if latents is not None and latents.known != "none":
        task.pipeline = with_first_frames(parts, latents)
        frames, height, width = size_in_pixels(parts.vae, sizes[0])
        task.call = {
            "num_frames": frames, "height": height, "width": width,
            "max_sequence_length": config.text.max_length,
        }  # fmt: skip
    return model, source, task


def _require_sheet_inputs(sampling: VideoSamplingConfig, latents: CachedLatents | None) -> None:
    """Check that a sheet has what the model is given of a clip, and nothing else."""
    needed: tuple[str, ...] = ()
    if latents is not None:
        frames = {"first": ("images",), "edit": ("images",), "first_and_last": ("images", "last_images")}
        needed = ("videos",) if latents.tasks else frames.get(latents.known, ())
    for name, kind in _GIVEN.items():
        given = bool(getattr(sampling, name))
        if given and name not in needed:
            raise ValueError(f"sampling.{name}: the model is given no such {kind}; remove it")
        if sampling.every and not given and name in needed:
            raise ValueError(
                f"the model is given a {kind}: give sampling.{name} a {kind} for each prompt, or set "
                "sampling.every to 0"
            )


def _build_for(
    stock: StockTraining, config: VideoTrainingConfig, objective: Objective, model: Any
) -> tuple[Any, SampleSource, TrainingTask]:
    """Build a run of a model that is trained for its own pipeline of diffusers."""
    stock.require(config.text, config.objective, config.model.init_from)
    latents = stock.require_latents(config.data.open())
    _require_sheet_inputs(config.sampling, latents)
    encoders, vae = load_caption_encoders(config.text), latents.load_vae(stock.autoencoders)
    latents.require_text(config.text, encoders)
    if model is None:
        model = new_or_loaded(config.model.model_class, config.model)
    latents.require_channels(model)
    require_fit(model, objective, encoders, config.model.init_from, beside=latents.channels_beside)
    frames = getattr(model.config, "video_length", None) or stock.frames
    if frames is not None and {size[0] for size in latents.sizes} != {frames}:
        raise ValueError(
            f"the model takes {frames} frames of latents, but {latents.shards.path} holds clips of "
            f"{latents.sizes[0][0]}: cache them with other data.frames"
        )
    patch = model.latents_per_token
    require_patches((*(1,) * (3 - len(patch)), *patch), latents.sizes)
    task = TrainingTask(
        stock.conditioning(encoders, config.caption_dropout, latents.fps),
        config.sampling,
        partial(stock.finish, encoders, vae, objective, **_image_parts(latents)),
        config.data.title,
        config.data.chosen().facts(),
        call=stock.call(vae, latents.sizes_as_listed(vae), config.text, latents.fps),
        fps=latents.fps,
        prepare=_controls(latents, vae, config.sampling) if latents.tasks else None,
    )
    return model, latents, task


def _controls(
    latents: CachedLatents, vae: Any, sampling: VideoSamplingConfig
) -> Callable[[int, dict[str, Any]], dict[str, Any]]:
    """Return what gives a row of a sheet the control of its video; the tasks of the data take turns.

    Raises:
        ValueError: when a video cannot be read.
    """
    size = size_in_pixels(vae, latents.sizes_as_listed(vae)[0])

    def prepare(number: int, row: dict[str, Any]) -> dict[str, Any]:
        task = latents.tasks[number % len(latents.tasks)]
        generator = torch.Generator().manual_seed(sampling.seed + number)
        return {**row, **read_control(row["video"], task, size=size, fps=latents.fps, generator=generator)}

    if sampling.every:
        for number, row in enumerate(sampling.rows()):
            prepare(number, row)
    return prepare


def build_parts(
    config: VideoTrainingConfig, objective: Objective, latents: CachedLatents | None
) -> MHLAWanPipeline:
    """Build the pipeline that is trained, without its transformer."""
    tokenizer, text_encoder = load_text_encoder(config.text)
    return MHLAWanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=None if latents is None else latents.load_vae(("AutoencoderKLWan",)),
        scheduler=objective.scheduler(),
        max_sequence_length=config.text.max_length,
        fps=(config.data.fps if latents is None else latents.fps) or DEFAULT_FPS,
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
    others |= _image_parts(latents)

    def make(transformer: Any, training: Any) -> WanImageToVideoPipeline:
        return WanImageToVideoPipeline(transformer=transformer, **others)

    return make


def _image_parts(latents: CachedLatents) -> dict[str, Any]:
    """Components by which a pipeline embeds known frames, as far as the cache was made with them."""
    if latents.image_encoder is None:
        return {}
    processor, encoder = load_image_encoder(latents.image_encoder)
    return {"image_processor": processor, "image_encoder": encoder}


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
