"""Training models of images: of classes, and of texts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from mhla_diffusion.pipelines import MHLADiTPipeline, MHLATextToImagePipeline
from mhla_diffusion.pipelines.denoising import size_arguments
from mhla_diffusion.pipelines.text_to_image import stock_pipeline

from ..autoencoders import vae_scale_factor
from ..hub import has_component
from .adapters import require_trained
from .conditioning import Captions, ClassLabels, require_probability
from .config import changeable
from .data import CachedLatents, DataConfig, ImageSamples
from .data.captions import texts_of
from .data.image_sources import sizes_of
from .data.latents import PLAIN_AUTOENCODERS, load_vae
from .data.stream import SampleSource
from .image_models import ModelConfig, build_model, require_sizes, takes_texts
from .objectives import Objective
from .run import train
from .settings import RunConfig
from .stock import IMAGES, require_settings
from .task import SampleSheetConfig, TrainingTask
from .text import CaptionEncoder, TextConfig, load_caption_encoders

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(SampleSheetConfig):
    """Images during training; see also :class:`SampleSheetConfig`.

    Args:
        class_labels: of models of classes, one row each.
        prompts: of models of texts, one row each.
        images_per_class: columns.
    """

    class_labels: tuple[int, ...] = changeable((0,))
    prompts: tuple[str, ...] = changeable(())
    images_per_class: int = changeable(4)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images_per_class < 1:
            raise ValueError(f"sampling.images_per_class must be 1 or more, got {self.images_per_class}")
        if not self.class_labels:
            raise ValueError("sampling.class_labels must name at least one class")

    def rows(self) -> list[dict[str, Any]]:
        if self.prompts:
            return [{"prompt": [prompt] * self.images_per_class} for prompt in self.prompts]
        return [{"class_labels": [label] * self.images_per_class} for label in self.class_labels]


@dataclass(frozen=True, kw_only=True)
class ImageTrainingConfig(RunConfig):
    """Training run; see also :class:`RunConfig`.

    Args:
        model: see :class:`ModelConfig`.
        data: see :class:`DataConfig`.
        text: of models of texts, see :class:`TextConfig`.
        sampling: see :class:`SamplingConfig`.
        class_dropout: probability that a label is replaced by the null class, for guidance.
        caption_dropout: probability that a caption is replaced by the empty one, for guidance.

    Raises:
        ValueError: for a probability outside [0, 1).
    """

    model: ModelConfig
    data: DataConfig
    text: TextConfig | None = None
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    class_dropout: float = 0.1
    caption_dropout: float = 0.1

    def __post_init__(self) -> None:
        require_probability("class_dropout", self.class_dropout)
        require_probability("caption_dropout", self.caption_dropout)
        require_trained(self.lora, self.model.init_from)
        require_settings(
            self.text, self.objective, self.data.source, shown=self.sampling.every > 0, videos=False
        )

    def build(self, objective: Objective, model: Any = None) -> tuple[Any, SampleSource, TrainingTask]:
        captioned = takes_texts(self.model.model_class if model is None else type(model))
        _check_conditions(self, captioned)
        return (_build_of_texts if captioned else _build_of_classes)(self, objective, model)


def _check_conditions(config: ImageTrainingConfig, captioned: bool) -> None:
    if captioned and config.text is None:
        raise ValueError("the model takes texts: give text.encoder, such as minilm")
    if captioned and config.sampling.every and not config.sampling.prompts:
        raise ValueError("sampling.prompts must have at least one prompt when sampling.every is set")
    if not captioned and (config.text or config.sampling.prompts):
        wrong = "text" if config.text else "sampling.prompts"
        raise ValueError(f"the model takes classes: remove {wrong}, or take model.backbone pixart or sana")


def _build_of_classes(
    config: ImageTrainingConfig, objective: Objective, model: Any
) -> tuple[Any, SampleSource, TrainingTask]:
    model = model or build_model(config.model, objective)
    source = build_source(config, model)
    classes, names = model.config.num_embeds_ada_norm, source.class_names
    if len(names) > classes:
        raise ValueError(
            f"the data has {len(names)} classes, but the model {classes}: set model.num_embeds_ada_norm to "
            f"{len(names)} or more"
        )
    if outside := [label for label in config.sampling.class_labels if not 0 <= label < classes]:
        raise ValueError(f"sampling.class_labels must be 0 to {classes - 1}, got {outside[0]}")
    pipeline = partial(
        MHLADiTPipeline,
        scheduler=objective.scheduler(),
        vae=source.load_vae(PLAIN_AUTOENCODERS) if isinstance(source, CachedLatents) else None,
        id2label=dict(enumerate(names)),
    )
    conditioning = ClassLabels(names, null_label=classes, dropout=config.class_dropout)
    facts = config.data.chosen().facts()
    return model, source, TrainingTask(conditioning, config.sampling, pipeline, config.data.title, facts)


def _build_of_texts(
    config: ImageTrainingConfig, objective: Objective, model: Any
) -> tuple[Any, SampleSource, TrainingTask]:
    assert config.text is not None
    stock = IMAGES.get(config.model.model_class if model is None else type(model))
    if stock is not None:
        stock.require(config.text, config.objective, config.model.init_from)
    elif config.text.pipeline:
        raise ValueError(f"text.pipeline {config.text.pipeline} is for another model: remove it")
    encoders = load_caption_encoders(config.text)
    if model is None:
        model = build_model(config.model, objective, encoders=encoders)
    source, vae = build_source(config, model), None
    if isinstance(source, CachedLatents):
        source.require_text(config.text, encoders)
        vae = source.load_vae(PLAIN_AUTOENCODERS if stock is None else stock.autoencoders)
    for encoder in encoders if vae is None else ():
        encoder.warn_of_long(texts_of(source.captions or ()))
    if stock is not None:
        assert isinstance(source, CachedLatents)  # as the stock pipeline asks of data
        conditioning = stock.conditioning(encoders, config.caption_dropout)
        pipeline: Any = partial(stock.finish, encoders, vae, objective)
        call = stock.call(vae, source.sizes_as_listed(vae), config.text)
    else:
        conditioning = _captions(config, model, encoders, vae)
        pipeline = _Finished(config, objective.scheduler(), encoders[0], vae)
        call = dict.fromkeys(("height", "width"), model.config.sample_size * vae_scale_factor(vae))
        call["clean_caption"] = False  # where the pipeline would
    facts = config.data.chosen().facts()
    task = TrainingTask(conditioning, config.sampling, pipeline, config.data.title, facts, call=call)
    return model, source, task


def _captions(
    config: ImageTrainingConfig, model: Any, encoders: Sequence[CaptionEncoder], vae: Any
) -> Captions:
    """Captions and, for models that are told it, the size in pixels."""
    factor = vae_scale_factor(vae)
    return Captions(
        encoders,
        config.caption_dropout,
        embedded=vae is not None,
        masked=True,
        sizes=lambda rows, height, width, device: size_arguments(
            model, rows, factor * height, factor * width, device=device
        ),
    )


@dataclass
class _Finished:
    """Pipeline of a transformer: that of diffusers where its defaults are the training's, else our own."""

    config: ImageTrainingConfig
    scheduler: Any
    encoder: CaptionEncoder
    vae: Any

    def __call__(self, transformer: Any, training: dict[str, Any] | None) -> Any:
        assert self.config.text is not None
        parts: dict[str, Any] = {
            "tokenizer": self.encoder.tokenizer, "text_encoder": self.encoder.text_encoder,
            "transformer": transformer, "scheduler": self.scheduler, "vae": self.vae,
        }  # fmt: skip
        text: dict[str, Any] = {
            "max_sequence_length": self.config.text.max_length, "instruction": self.config.text.prefix,
        }  # fmt: skip
        stock = stock_pipeline(**parts, **text)
        if stock is not None:
            return stock(**parts)
        return MHLATextToImagePipeline(**parts, **text, training=training)


def build_source(config: ImageTrainingConfig, model: Any) -> ImageSamples | CachedLatents:
    """Open the data, in the shape that the model has.

    Raises:
        ValueError: when they do not fit.
    """
    data, channels = config.data, model.sample_channels
    source = data.open(captioned=takes_texts(type(model)))
    if type(model) in IMAGES:
        IMAGES[type(model)].require_latents(source)
    side = model.config.get("sample_size")
    square = (side, side) if side else source.sizes[0]  # such models are trained on latents of any size
    if not isinstance(source, CachedLatents):
        source = ImageSamples(
            source, channels=channels, sizes=sizes_of(data, square), flip=data.flip, enlarge=data.enlarge
        )
    else:
        found, expected = (source.channels, *source.sizes[0]), (channels, *square)
        if source.text is None and found != expected:
            raise ValueError(f"{data.path} holds latents {found}, but the model takes {expected}")
        source.require_channels(model)
        _check_autoencoder(config, source)
    require_sizes(model, source.sizes)
    return source


def _check_autoencoder(config: ImageTrainingConfig, latents: CachedLatents) -> None:
    """Refuse latents of another autoencoder than that of the pipeline that is trained on."""
    path = config.model.init_from
    if path is None or not has_component(path, "vae"):
        return
    if latents.made_with("vae", load_vae(path)) is False:
        raise ValueError(
            f"{latents.shards.path} holds latents of the autoencoder {latents.vae}, but {path} has another "
            f"one: cache them with --vae {path}"
        )


def train_image(config: ImageTrainingConfig, *, resume: str | None = None) -> int:
    """Train an image model; see :func:`.run.train`."""
    return train(config, resume=resume)
