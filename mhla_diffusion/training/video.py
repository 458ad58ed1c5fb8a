"""Training text-to-video models: a config becomes a model, data and a task for the trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from diffusers.utils import make_image_grid
from PIL import Image
from torch import Tensor

from mhla_diffusion.pipelines.video import MHLAWanPipeline

from ..attention import MHLAConfig
from ..backbones.video import MHLAWanTransformer3DModel
from ..hub import component_subfolder
from .checkpoints import find_checkpoint
from .config import as_dict, changeable, require_shape_or_init_from
from .data import CachedVideoLatents, VideoDataConfig, VideoSamples, open_videos
from .data.latents import load_video_vae
from .objectives import Objective, build_objective
from .text import TextConfig, embed_caption, load_text_encoder, warn_of_long_captions
from .trainer import RunConfig, SampleSheetConfig, Trainer


@dataclass(frozen=True)
class VideoModelConfig:
    """The transformer: either ``init_from``, or a shape for a new one.

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


@dataclass(frozen=True, kw_only=True)
class VideoTrainingConfig(RunConfig):
    """A training run; see also :class:`RunConfig`.

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
        if not 0 <= self.caption_dropout < 1:
            raise ValueError(f"caption_dropout must be in [0, 1), got {self.caption_dropout}")
        if self.objective.name != "flow":
            raise ValueError("Wan is trained by flow matching: set objective.name to flow")


@dataclass
class VideoTask:
    """Captions, sample sheets and the pipeline; see :class:`~.trainer.TrainingTask`.

    Args:
        parts: a pipeline without a transformer.
        sampling, caption_dropout: of the config.
        data_name: what the model card calls the data.
    """

    parts: MHLAWanPipeline
    sampling: VideoSamplingConfig
    caption_dropout: float
    data_name: str

    def __post_init__(self) -> None:
        # Of one caption at a time, so that an embedding does not depend on what is beside it in a batch.
        self._embed = lru_cache(maxsize=4096)(partial(embed_caption, self.parts))

    @property
    def sample_every(self) -> int:
        return self.sampling.every

    def condition(self, batch: Mapping[str, Any], generators: Sequence[torch.Generator]) -> dict[str, Tensor]:
        device = self.parts.text_encoder.device
        texts = (
            [self._embed(caption, device) for caption in batch["caption"]]
            if "caption" in batch
            else batch["text"].split(1)
        )
        dropped = [torch.rand((), generator=generator) < self.caption_dropout for generator in generators]
        embeddings = [
            self._embed("", device).to(text.device) if drop else text
            for drop, text in zip(dropped, texts, strict=True)
        ]
        return {"encoder_hidden_states": torch.cat(embeddings)}

    def pipeline(self, model: Any, training: Mapping[str, Any] | None = None) -> MHLAWanPipeline:
        """The model with its scheduler and text encoder."""
        config = self.parts.config
        return MHLAWanPipeline(
            **self.parts.components | {"transformer": model},
            max_sequence_length=config.max_sequence_length,
            fps=config.fps,
            training=dict(training) if training else None,
        )

    @torch.no_grad()
    def sample(self, model: Any, device: torch.device) -> Image.Image:
        sampling = self.sampling
        pipeline = self.pipeline(model).to(device)
        pipeline.set_progress_bar_config(disable=True)
        rows = [
            pipeline(
                prompt,
                guidance_scale=sampling.guidance_scale,
                num_inference_steps=sampling.num_inference_steps,
                generator=torch.Generator().manual_seed(sampling.seed),
                output_type="pil",
            ).frames[0]
            for prompt in sampling.prompts
        ]
        return make_image_grid([frame for row in rows for frame in row], rows=len(rows), cols=len(rows[0]))

    def save_pipeline(self, model: Any, folder: Path, training: Mapping[str, Any]) -> None:
        facts = {
            **training,
            "data": f"{self.data_name}, {training['data']}",
            "caption dropout": self.caption_dropout,
        }
        self.pipeline(model, facts).save_pretrained(folder)


def build_parts(
    config: VideoTrainingConfig, objective: Objective, latents: CachedVideoLatents | None
) -> MHLAWanPipeline:
    """The pipeline that is trained, without its transformer."""
    tokenizer, text_encoder = load_text_encoder(config.text)
    return MHLAWanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=None if latents is None else load_video_vae(latents.vae),
        scheduler=objective.scheduler(),
        max_sequence_length=config.text.max_length,
        fps=(config.data.fps if latents is None else latents.fps) or 16.0,
    )


def build_model(config: VideoModelConfig, *, text_dim: int, sizes: Sequence[tuple[int, ...]]) -> Any:
    """A new transformer, or the one that ``init_from`` names, in fp32.

    Args:
        config: of the model.
        text_dim: width of the text embeddings.
        sizes: frames, height and width of the samples.

    Raises:
        ValueError: when samples do not divide into patches, or a loaded model does not fit the text encoder.
    """
    if config.init_from is not None:
        subfolder = component_subfolder(config.init_from, "transformer")
        model = MHLAWanTransformer3DModel.from_pretrained(
            config.init_from, subfolder=subfolder, dtype=torch.float32
        )
        if model.config.text_dim != text_dim:
            raise ValueError(
                f"{config.init_from} takes text of width {model.config.text_dim}, but text.encoder "
                f"gives {text_dim}: use the text encoder that it was trained with"
            )
        _check_patches(tuple(model.config.patch_size), sizes)
        return model
    arguments = {name: value for name, value in as_dict(config).items() if value is not None}
    arguments["mhla_config"] = arguments.pop("mhla", None)
    patch = tuple(arguments["patch_size"])
    _check_patches(patch, sizes)
    return MHLAWanTransformer3DModel(
        **arguments,
        out_channels=config.in_channels,
        text_dim=text_dim,
        sample_grid=tuple(side // p for side, p in zip(sizes[0], patch, strict=True)),
    )


def _check_patches(patch: tuple[int, ...], sizes: Sequence[tuple[int, ...]]) -> None:
    for size in sizes:
        if any(side % p for side, p in zip(size, patch, strict=True)):
            raise ValueError(
                f"data.frames and data.sizes must be multiples of the patch {patch} (frames, height, width), "
                f"got {tuple(size)}; the nearest are "
                f"{tuple(max(1, round(side / p)) * p for side, p in zip(size, patch, strict=True))}"
            )


def open_latents(config: VideoTrainingConfig) -> CachedVideoLatents | None:
    """The cache that a config names, None for videos.

    Raises:
        ValueError: when there is none, or its texts are of another encoder.
    """
    if config.data.source != "latents":
        return None
    assert config.data.path is not None
    latents = CachedVideoLatents(config.data.path)
    if latents.text != config.text:
        raise ValueError(
            f"the captions in {config.data.path} were encoded with {latents.text}: set text to the same, got "
            f"{config.text}"
        )
    return latents


def _check_channels(model: Any, latents: CachedVideoLatents) -> None:
    if model.config.in_channels != latents.channels:
        raise ValueError(
            f"{latents.shards.path} holds latents of {latents.channels} channels, but model.in_channels is "
            f"{model.config.in_channels}"
        )


def train_video(config: VideoTrainingConfig, *, resume: str | None = None) -> int:
    """Train, and leave ``<output_dir>/pipeline``.

    Args:
        config: of the run.
        resume: ``"latest"`` or the folder of a checkpoint.

    Returns:
        0, or the number of the signal after which it stopped.

    Raises:
        ValueError: before any work, when parts of the config do not fit together, the data is not what it
            should be, or the output folder holds another run.
    """
    checkpoint = find_checkpoint(Path(config.output_dir), resume, config)
    set_seed(config.trainer.seed)
    objective, latents = build_objective(config.objective), open_latents(config)
    parts = build_parts(config, objective, latents)
    sizes = [(config.data.frames, *size) for size in config.data.sizes] if latents is None else latents.sizes
    model = build_model(config.model, text_dim=parts.text_encoder.config.hidden_size, sizes=sizes)
    source: VideoSamples | CachedVideoLatents
    if latents is None:
        source = VideoSamples(open_videos(config.data), config.data, channels=model.config.in_channels)
        warn_of_long_captions(source.captions, parts.tokenizer, config.text.max_length)
    else:
        _check_channels(model, latents)
        source = latents
    task = VideoTask(
        parts=parts,
        sampling=config.sampling,
        caption_dropout=config.caption_dropout,
        data_name=config.data.path or config.data.source,
    )
    trainer = Trainer(
        model=model, objective=objective, source=source, task=task, run_config=config, checkpoint=checkpoint
    )
    if latents is None:  # the texts of latents are there, and a large encoder needs the room
        parts.text_encoder.to(trainer.accelerator.device)
    return trainer.train()
