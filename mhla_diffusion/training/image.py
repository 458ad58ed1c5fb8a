"""Training class-conditional image models."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from mhla_diffusion.pipelines import MHLADiTPipeline

from ..attention import MHLAConfig
from ..backbones import MHLADiTTransformer2DModel
from .adapters import require_trained
from .conditioning import ClassLabels, require_probability
from .config import changeable, require_shape_or_init_from
from .data import CachedLatents, DataConfig, ImageSamples
from .data.stream import SampleSource
from .objectives import Objective
from .run import new_or_loaded, train
from .task import SampleSheetConfig, TrainingTask
from .trainer import RunConfig


@dataclass(frozen=True)
class ModelConfig:
    """Transformer: either ``init_from``, or a shape for a new one.

    Args:
        init_from: folder or hub id of an MHLA pipeline or transformer to go on training, such as
            mhla convert writes.
        sample_size: side of the image or latent.
        patch_size: side of a token.
        in_channels: 1 or 3 for pixels, the autoencoder's for latents.
        num_layers, num_attention_heads, attention_head_dim: of the transformer.
        num_embeds_ada_norm: number of classes; the null class is one more.
        dropout: of the feed-forward layers; 0 by default.
        attention: ``"mhla"`` (default), ``"linear"`` or ``"softmax"``, for all layers or as a list.
        mhla: see :class:`MHLAConfig`; its defaults if not given.

    Raises:
        ValueError: when the shape is not complete, or is given beside ``init_from``.
    """

    init_from: str | None = None
    sample_size: int | None = None
    patch_size: int | None = None
    in_channels: int | None = None
    num_layers: int | None = None
    num_attention_heads: int | None = None
    attention_head_dim: int | None = None
    num_embeds_ada_norm: int | None = None
    dropout: float | None = None
    attention: str | tuple[str, ...] | None = None
    mhla: MHLAConfig | None = None

    def __post_init__(self) -> None:
        require_shape_or_init_from(self, optional=("dropout", "attention", "mhla"))


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(SampleSheetConfig):
    """Images during training; see also :class:`SampleSheetConfig`.

    Args:
        class_labels: one row each.
        images_per_class: columns.
    """

    class_labels: tuple[int, ...] = changeable((0,))
    images_per_class: int = changeable(4)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images_per_class < 1:
            raise ValueError(f"sampling.images_per_class must be 1 or more, got {self.images_per_class}")
        if not self.class_labels:
            raise ValueError("sampling.class_labels must name at least one class")

    def rows(self) -> list[dict[str, Any]]:
        return [{"class_labels": [label] * self.images_per_class} for label in self.class_labels]


@dataclass(frozen=True, kw_only=True)
class ImageTrainingConfig(RunConfig):
    """Training run; see also :class:`RunConfig`.

    Args:
        model: see :class:`ModelConfig`.
        data: see :class:`DataConfig`.
        sampling: see :class:`SamplingConfig`.
        class_dropout: probability that a label is replaced by the null class, for guidance.

    Raises:
        ValueError: for a probability outside [0, 1).
    """

    model: ModelConfig
    data: DataConfig
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    class_dropout: float = 0.1

    def __post_init__(self) -> None:
        require_probability("class_dropout", self.class_dropout)
        require_trained(self.lora, self.model.init_from)

    def build(self, objective: Objective, model: Any = None) -> tuple[Any, SampleSource, TrainingTask]:
        model = model or build_model(self.model, objective)
        source = build_source(self.data, model)
        classes = model.config.num_embeds_ada_norm
        if outside := [label for label in self.sampling.class_labels if not 0 <= label < classes]:
            raise ValueError(f"sampling.class_labels must be 0 to {classes - 1}, got {outside[0]}")
        pipeline = partial(
            MHLADiTPipeline,
            scheduler=objective.scheduler(),
            vae=source.load_vae() if isinstance(source, CachedLatents) else None,
            id2label=dict(enumerate(source.class_names)),
        )
        conditioning = ClassLabels(source.class_names, null_label=classes, dropout=self.class_dropout)
        facts = self.data.chosen().facts()
        return model, source, TrainingTask(conditioning, self.sampling, pipeline, self.data.title, facts)


def build_model(config: ModelConfig, objective: Objective) -> Any:
    """Build a new transformer, or load the one that ``init_from`` names, in fp32.

    Raises:
        ValueError: when a loaded model does not have the output channels that the objective needs.
    """
    model = new_or_loaded(
        MHLADiTTransformer2DModel, config, out_channels=objective.out_channels(config.in_channels or 0)
    )
    expected, found = objective.out_channels(model.config.in_channels), model.out_channels
    if found != expected:
        raise ValueError(
            f"{config.init_from} returns {found} channels, but this objective needs {expected}: set "
            f"objective.name to {'flow' if objective.predicts_variance else 'ddpm'}, as it was trained"
        )
    return model


def build_source(config: DataConfig, model: Any) -> ImageSamples | CachedLatents:
    """Open the data, in the shape and with the classes that the model has.

    Raises:
        ValueError: when they do not fit.
    """
    shape, source = model.config, config.open()
    if isinstance(source, CachedLatents):
        expected = (shape.in_channels, shape.sample_size, shape.sample_size)
        if source.shape != expected:
            raise ValueError(f"{config.path} holds latents {source.shape}, but the model takes {expected}")
    else:
        source = ImageSamples(source, channels=shape.in_channels, size=shape.sample_size, flip=config.flip)
    classes = len(source.class_names)
    if classes > shape.num_embeds_ada_norm:
        raise ValueError(
            f"the data has {classes} classes, but the model {shape.num_embeds_ada_norm}: set "
            f"model.num_embeds_ada_norm to {classes} or more"
        )
    return source


def train_image(config: ImageTrainingConfig, *, resume: str | None = None) -> int:
    """Train an image model; see :func:`.run.train`."""
    return train(config, resume=resume)
