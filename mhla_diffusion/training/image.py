"""Training class-conditional image models: a config becomes a model, data and a task for the trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from diffusers import AutoencoderKL
from diffusers.utils import make_image_grid
from PIL import Image
from torch import Tensor

from mhla_diffusion.pipelines import MHLADiTPipeline

from ..attention import MHLAConfig
from ..backbones.image import MHLADiTTransformer2DModel
from ..hub import component_subfolder
from .checkpoints import find_checkpoint
from .config import as_dict, changeable, require_shape_or_init_from
from .data import CachedLatents, DataConfig, ImageSamples, open_images
from .objectives import Objective, build_objective
from .trainer import RunConfig, SampleSheetConfig, Trainer

ImageSource = ImageSamples | CachedLatents


@dataclass(frozen=True)
class ModelConfig:
    """The transformer: either ``init_from``, or a shape for a new one.

    Args:
        init_from: folder or hub id of an MHLA pipeline or transformer to go on training, such as
            scripts/convert.py writes.
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


@dataclass(frozen=True, kw_only=True)
class ImageTrainingConfig(RunConfig):
    """A training run; see also :class:`RunConfig`.

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
        if not 0 <= self.class_dropout < 1:
            raise ValueError(f"class_dropout must be in [0, 1), got {self.class_dropout}")


@dataclass
class ImageTask:
    """Class labels, sample grids and the pipeline; see :class:`~.trainer.TrainingTask`."""

    objective: Objective
    sampling: SamplingConfig
    class_dropout: float
    null_label: int
    class_names: list[str]
    data_name: str
    vae: AutoencoderKL | None = None

    @property
    def sample_every(self) -> int:
        return self.sampling.every

    def condition(self, batch: Mapping[str, Any], generators: Sequence[torch.Generator]) -> dict[str, Tensor]:
        labels = batch["class_labels"]
        draws = torch.stack([torch.rand((), generator=generator) for generator in generators])
        dropped = (draws < self.class_dropout).to(labels.device)
        return {"class_labels": labels.masked_fill(dropped, self.null_label)}

    def pipeline(self, model: Any, training: Mapping[str, Any] | None = None) -> MHLADiTPipeline:
        """The model with its scheduler, autoencoder and class names."""
        return MHLADiTPipeline(
            transformer=model,
            scheduler=self.objective.scheduler(),
            vae=self.vae,
            id2label=dict(enumerate(self.class_names)),
            training=dict(training) if training else None,
        )

    @torch.no_grad()
    def sample(self, model: Any, device: torch.device) -> Image.Image:
        sampling = self.sampling
        pipeline = self.pipeline(model).to(device)
        pipeline.set_progress_bar_config(disable=True)
        rows = [
            pipeline(
                class_labels=[label] * sampling.images_per_class,
                guidance_scale=sampling.guidance_scale,
                num_inference_steps=sampling.num_inference_steps,
                generator=torch.Generator().manual_seed(sampling.seed),
            ).images
            for label in sampling.class_labels
        ]
        images = [image for row in rows for image in row]
        return make_image_grid(images, rows=len(rows), cols=sampling.images_per_class)

    def save_pipeline(self, model: Any, folder: Path, training: Mapping[str, Any]) -> None:
        facts = {
            **training,
            "data": f"{self.data_name}, {training['data']} of {len(self.class_names)} classes",
            "class dropout": self.class_dropout,
        }
        self.pipeline(model, facts).save_pretrained(folder)


def build_model(config: ModelConfig, objective: Objective) -> Any:
    """A new transformer, or the one that ``init_from`` names, in fp32.

    Raises:
        ValueError: when a loaded model does not have the output channels that the objective needs.
    """
    if config.init_from is None:
        arguments = as_dict(config)
        del arguments["init_from"]
        arguments = {name: value for name, value in arguments.items() if value is not None}
        arguments["mhla_config"] = arguments.pop("mhla", None)
        return MHLADiTTransformer2DModel(
            **arguments, out_channels=objective.out_channels(config.in_channels or 0)
        )
    subfolder = component_subfolder(config.init_from, "transformer")
    model = MHLADiTTransformer2DModel.from_pretrained(
        config.init_from, subfolder=subfolder, dtype=torch.float32
    )
    expected, found = objective.out_channels(model.config.in_channels), model.out_channels
    if found != expected:
        raise ValueError(
            f"{config.init_from} returns {found} channels, but this objective needs {expected}: set "
            f"objective.name to {'flow' if objective.predicts_variance else 'ddpm'}, as it was trained"
        )
    return model


def build_source(config: DataConfig, model: Any) -> ImageSource:
    """The data, in the shape and with the classes that the model has.

    Raises:
        ValueError: when they do not fit.
    """
    shape = model.config
    if config.source == "latents":
        assert config.path is not None
        latents = CachedLatents(config.path)
        expected = (shape.in_channels, shape.sample_size, shape.sample_size)
        if latents.shape != expected:
            raise ValueError(f"{config.path} holds latents {latents.shape}, but the model takes {expected}")
        source: ImageSource = latents
    else:
        source = ImageSamples(
            open_images(config), channels=shape.in_channels, size=shape.sample_size, flip=config.flip
        )
    classes = len(source.class_names)
    if classes > shape.num_embeds_ada_norm:
        raise ValueError(
            f"the data has {classes} classes, but the model {shape.num_embeds_ada_norm}: set "
            f"model.num_embeds_ada_norm to {classes} or more"
        )
    return source


def train_image(config: ImageTrainingConfig, *, resume: str | None = None) -> int:
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
    model = build_model(config.model, objective)
    source = build_source(config.data, model)
    classes = model.config.num_embeds_ada_norm
    if outside := [label for label in config.sampling.class_labels if not 0 <= label < classes]:
        raise ValueError(f"sampling.class_labels must be 0 to {classes - 1}, got {outside[0]}")
    task = ImageTask(
        objective=objective,
        sampling=config.sampling,
        class_dropout=config.class_dropout,
        null_label=classes,
        class_names=source.class_names,
        data_name=config.data.path or config.data.source,
        vae=source.load_vae() if isinstance(source, CachedLatents) else None,
    )
    trainer = Trainer(
        model=model, objective=objective, source=source, task=task, run_config=config, checkpoint=checkpoint
    )
    return trainer.train()
