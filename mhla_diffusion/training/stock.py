"""Backbones that are trained for their own pipelines of diffusers: on latents, from a model that is there."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import diffusers
import torch
from diffusers import DDIMScheduler

from mhla_diffusion.pipelines.sampling import FRAMES

from ..autoencoders import size_in_pixels
from ..backbones import (
    MHLAAllegroTransformer3DModel,
    MHLAAnyFlowTransformer3DModel,
    MHLAChronoEditTransformer3DModel,
    MHLACosmosTransformer3DModel,
    MHLAHunyuanDiT2DModel,
    MHLAKandinsky5Transformer3DModel,
    MHLALatteTransformer3DModel,
    MHLALTXVideoTransformer3DModel,
    MHLALuminaNextDiT2DModel,
    MHLAQwenImageTransformer2DModel,
    MHLASanaVideoTransformer3DModel,
    MHLASkyReelsV2Transformer3DModel,
    MHLAWanAnimateTransformer3DModel,
    MHLAWanVACETransformer3DModel,
    backbone_of_config,
)
from ..hub import has_component, load_component_config
from .conditioning import Captions
from .data import CachedLatents
from .data.latents import PLAIN_AUTOENCODERS
from .data.video_autoencoders import needs_tiles
from .objectives import DDPM, Objective, ObjectiveConfig
from .text import CaptionEncoder, TextConfig, is_guarded, make_stock_pipeline


@dataclass(frozen=True)
class StockTraining:
    """Training of a backbone, as its pipeline of diffusers samples from it.

    Args:
        pipeline: class of diffusers, which embeds captions, and is what a run leaves.
        objective: by whose steps it denoises.
        variance: whether the model predicts a variance too, with ddpm.
        masked: whether the model is told which tokens are the text's.
        scheduler: settings of the scheduler that is left, beside those of the objective's.
        multiple: of pixels, that heights and widths must be for the pipeline.
        given: what a cache has for the model beside texts, ``"control"`` or ``"edit"``; nothing when empty.
        frames: of clips and of their latents, where the pipeline makes so many alone.
    """

    pipeline: str
    objective: Literal["flow", "ddpm"]
    variance: bool = False
    masked: bool = False
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    multiple: int = 1
    given: str = ""
    frames: int | None = None

    def require(self, text: TextConfig, objective: ObjectiveConfig, init_from: str | None) -> None:
        """Check that a run embeds captions as the pipeline does, and adds noise as the one it goes on from.

        Raises:
            ValueError: otherwise, saying what to set.
        """
        if text.pipeline != self.pipeline:
            raise ValueError(
                f"the model is trained on captions as {self.pipeline} embeds them: set text.pipeline to "
                f"{self.pipeline}, here and where latents are cached, got {text.pipeline!r}"
            )
        if self.objective == "ddpm" and init_from is not None:
            _require_schedule(objective, init_from)

    def require_settings(self, objective: ObjectiveConfig, source: str, *, shown: bool) -> None:
        """Check what a config says by itself, before anything is opened.

        Args:
            objective: of the run.
            source: of the data.
            shown: whether there are sheets of samples.

        Raises:
            ValueError: when the pipeline does not denoise so, is not trained on such data, or makes nothing
                without its guard, which is no part of a run; saying what to set.
        """
        if source != "latents":
            raise self._unfit()
        if shown and is_guarded(self.pipeline):
            raise ValueError(f"sampling.every must be 0: {self.pipeline} makes nothing without its guard")
        if objective.name != self.objective or objective.prediction_type == "sample":
            raise ValueError(
                f"{self.pipeline} denoises by steps of {self.objective}: set objective.name to "
                f"{self.objective} and leave objective.prediction_type out"
            )
        if self.objective == "ddpm" and objective.learn_variance != self.variance:
            kind = "with" if self.variance else "without"
            raise ValueError(
                f"{self.pipeline} takes a prediction {kind} a variance: set objective.learn_variance to "
                f"{str(self.variance).lower()}"
            )

    @property
    def autoencoders(self) -> tuple[str, ...]:
        """Classes by which the pipeline decodes."""
        takes = inspect.signature(getattr(diffusers, self.pipeline).__init__).parameters
        said = takes["vae"].annotation
        return tuple(vae.__name__ for vae in get_args(said) or (said,))

    def conditioning(
        self, encoders: Sequence[CaptionEncoder], dropout: float, fps: float | None = None
    ) -> Captions:
        """Return captions that are embedded already, as the pipeline gives them, and the rate of clips."""
        rate = self._rate(fps)
        return Captions(
            encoders, dropout, embedded=True, masked=self.masked,
            sizes=lambda rows, height, width, device: {
                name: torch.full((rows,), value, device=device) for name, value in rate.items()
            },
        )  # fmt: skip

    def _rate(self, fps: float | None) -> dict[str, float]:
        """Frames a second, where they are known and the model is told them."""
        return {} if fps is None or "frame_rate" not in self._takes else {"frame_rate": float(fps)}

    @property
    def _takes(self) -> Mapping[str, inspect.Parameter]:
        """Parameters of the pipeline's call."""
        return inspect.signature(getattr(diffusers, self.pipeline).__call__).parameters

    def finish(
        self,
        encoders: Sequence[CaptionEncoder],
        vae: Any,
        objective: Objective,
        transformer: Any,
        training: Any,
        **others: Any,
    ) -> Any:
        """Return the pipeline of a transformer and other components; ``training`` has no place in it."""
        scheduler = objective.scheduler()
        if needs_tiles(vae):
            vae.enable_tiling()
        texts = {name: part for encoder in encoders for name, part in encoder.components.items()}
        return make_stock_pipeline(
            self.pipeline, **texts, vae=vae, transformer=transformer, **others,
            scheduler=type(scheduler).from_config(scheduler.config, **self.scheduler),
        )  # fmt: skip

    def require_latents(self, source: Any) -> CachedLatents:
        """Check that the data are latents, and have what the model is given and nothing else.

        Raises:
            ValueError: otherwise.
        """
        if not isinstance(source, CachedLatents):
            raise self._unfit()
        self._require_given(source.given)
        return source

    def require_cache(
        self, vae: Any, sizes: Sequence[Sequence[int]], given: str, frames: int | None = None
    ) -> None:
        """Check, before anything is encoded, that the pipeline takes what a cache will hold.

        Args:
            vae: that encodes.
            sizes: of the data, height and width in pixels.
            given: what the model is given beside texts.
            frames: of clips; None of pictures.

        Raises:
            ValueError: otherwise, saying what to set.
        """
        self._require_given(given)
        if type(vae).__name__ not in self.autoencoders:
            raise ValueError(
                f"{self.pipeline} decodes by an {' or '.join(self.autoencoders)}, got an "
                f"{type(vae).__name__}: give that of the model as vae, or another text.pipeline"
            )
        require_pipeline_sizes(self.pipeline, sizes, multiple=self.multiple)
        if self.frames not in (None, frames):
            raise ValueError(
                f"{self.pipeline} makes {self.frames} frame alone: set data.frames to {self.frames}, got "
                f"{frames}"
            )

    def _unfit(self) -> ValueError:
        return ValueError(
            f"models of {self.pipeline} are trained on latents of texts: make them with mhla "
            f"cache-latents, --text.pipeline {self.pipeline} and {_OPTIONS[self.given]}, and set "
            "data.source to latents"
        )

    def _require_given(self, given: str) -> None:
        if given != self.given:
            raise self._unfit()

    def call(
        self, vae: Any, latents: Sequence[Sequence[int]], text: TextConfig, fps: float | None = None
    ) -> dict[str, Any]:
        """Return the arguments of the pipeline's call for the first of these sizes, and the rate of clips.

        Raises:
            ValueError: when the pipeline does not make one of these sizes.
        """
        sizes = [size_in_pixels(vae, size) for size in latents]
        require_pipeline_sizes(self.pipeline, sizes, multiple=self.multiple)
        *frames, height, width = sizes[0]
        # A size that is rounded to a known one would not be that of the data, nor a text that is cleaned the
        # caption.
        given: dict[str, Any] = {
            "max_sequence_length": text.max_length, "use_resolution_binning": False, "clean_caption": False
        }  # fmt: skip
        given |= dict.fromkeys(FRAMES, frames[0]) if frames else {}
        taken = {name: value for name, value in given.items() if name in self._takes}
        return {"height": height, "width": width, **taken, **self._rate(fps)}


WAN_MULTIPLE = 16
"""Of heights and widths in pixels, that diffusers' pipelines of Wan take."""


def require_pipeline_sizes(pipeline: str, sizes: Sequence[Sequence[int]], *, multiple: int) -> None:
    """Check that a pipeline makes heights and widths in pixels, each that it will be trained on.

    Raises:
        ValueError: for one that is no multiple.
    """
    for *_, height, width in sizes:
        if height % multiple or width % multiple:
            raise ValueError(
                f"{pipeline} makes heights and widths of multiples of {multiple}, but the data are of "
                f"{height} x {width} pixels: cache them with other data.sizes"
            )


_OPTIONS = {
    "": "without known frames",
    "control": "--control, such as '[first, inpainting]'",
    "edit": "--image_condition edit",
}

IMAGES: dict[type[Any], StockTraining] = {
    MHLALuminaNextDiT2DModel: StockTraining("LuminaPipeline", "flow", masked=True),
    MHLAHunyuanDiT2DModel: StockTraining(
        "HunyuanDiTPipeline", "ddpm", variance=True, masked=True, multiple=16
    ),
    MHLAQwenImageTransformer2DModel: StockTraining("QwenImagePipeline", "flow", masked=True),
}
VIDEOS: dict[type[Any], StockTraining] = {
    MHLALatteTransformer3DModel: StockTraining("LattePipeline", "ddpm", variance=True, masked=True),
    MHLAAllegroTransformer3DModel: StockTraining("AllegroPipeline", "ddpm", masked=True),
    MHLACosmosTransformer3DModel: StockTraining(
        "Cosmos2TextToImagePipeline", "flow", scheduler={"use_karras_sigmas": True}, frames=1
    ),
    MHLASkyReelsV2Transformer3DModel: StockTraining("SkyReelsV2Pipeline", "flow"),
    MHLAWanVACETransformer3DModel: StockTraining("WanVACEPipeline", "flow", given="control"),
    MHLAChronoEditTransformer3DModel: StockTraining("ChronoEditPipeline", "flow", multiple=16, given="edit"),
    MHLALTXVideoTransformer3DModel: StockTraining("LTXPipeline", "flow", masked=True),
    MHLASanaVideoTransformer3DModel: StockTraining("SanaVideoPipeline", "flow", masked=True, multiple=32),
    MHLAKandinsky5Transformer3DModel: StockTraining(
        "Kandinsky5T2VPipeline", "flow", masked=True, multiple=16
    ),
}


def _training_of(pipeline: str, *, videos: bool) -> StockTraining | None:
    """Return the training for a pipeline, ``text.pipeline``; None when that is empty, for another way.

    Raises:
        ValueError: when it is for the other kind of samples.
    """
    known = {training.pipeline: training for training in (VIDEOS if videos else IMAGES).values()}
    if pipeline and pipeline not in known:
        raise ValueError(
            f"text.pipeline {pipeline} is not for {'videos' if videos else 'images'}: it must be one of "
            f"{', '.join(known)}, or empty"
        )
    return known.get(pipeline)


def require_settings(
    text: TextConfig | None, objective: ObjectiveConfig, source: str, *, shown: bool, videos: bool
) -> None:
    """Check a config of a run, before anything is opened; see :meth:`StockTraining.require_settings`.

    Raises:
        ValueError: when its parts do not fit the pipeline that embeds the captions.
    """
    training = None if text is None else _training_of(text.pipeline, videos=videos)
    if training is not None:
        training.require_settings(objective, source, shown=shown)


def require_cache(
    pipeline: str,
    vae: Any,
    sizes: Sequence[Sequence[int]],
    *,
    given: str,
    videos: bool,
    frames: int | None = None,
) -> None:
    """Check, before anything is encoded, that models are trained on such a cache.

    Args:
        pipeline: that embeds the captions, ``text.pipeline``; empty for models with another way.
        vae, sizes, given, frames: see :meth:`StockTraining.require_cache`.
        videos: whether clips are cached, not pictures.

    Raises:
        ValueError: otherwise, saying what to set.
    """
    training = _training_of(pipeline, videos=videos)
    if training is not None:
        training.require_cache(vae, sizes, given, frames)
        return
    special = not videos and type(vae).__name__ not in PLAIN_AUTOENCODERS
    for other in (VIDEOS if videos else IMAGES).values():
        if (given and other.given == given) or (special and type(vae).__name__ in other.autoencoders):
            what = _OPTIONS[given] if given else f"an {type(vae).__name__}"
            raise ValueError(
                f"{what} is for {other.pipeline} alone: set text.pipeline to that, got {pipeline!r}"
            )
    if videos:
        require_pipeline_sizes("Wan's pipeline", sizes, multiple=WAN_MULTIPLE)


UNTRAINED: dict[type[Any], str] = {
    MHLAWanAnimateTransformer3DModel: "it needs a picture of the character and videos of its pose and face "
    "beside each clip, which no data source here has",
    MHLAAnyFlowTransformer3DModel: "it is told where a step ends beside where it starts, and learns maps "
    "between the two, for which there is no objective here",
}
"""Backbones without training, and what is missing for it."""


def trained_class(init_from: str, classes: Sequence[type[Any]], what: str) -> type[Any]:
    """Return the class of a stored model, one of those that a kind of run trains.

    Args:
        init_from: folder or hub id of a pipeline or transformer.
        classes: that are trained.
        what: they make.

    Raises:
        ValueError: when it is another, saying why that is not trained.
    """
    stored = load_component_config(init_from, "transformer")
    found = backbone_of_config(stored)
    if found is not None and found in classes:
        return found
    reason = f" ({UNTRAINED[found]})" if found in UNTRAINED else ""
    raise ValueError(
        f"{init_from} holds a {stored.get('_class_name')}{reason}, but {what} are trained with "
        f"{', '.join(cls.__name__ for cls in classes)}"
    )


def _require_schedule(objective: ObjectiveConfig, init_from: str) -> None:
    """Check that noise is added as for the pipeline that a run goes on from, where there is one."""
    if not has_component(init_from, "scheduler"):
        return
    stored = DDIMScheduler.load_config(init_from, subfolder="scheduler")
    for name, value in DDPM(objective).schedule.items():
        if stored.get(name, value) != value:
            raise ValueError(
                f"{init_from} was trained with the {name} {stored[name]!r}: set objective.{name} to that, "
                f"got {value!r}"
            )


def require_fit(
    model: Any, objective: Objective, encoders: Sequence[CaptionEncoder], name: str | None, *, beside: int = 0
) -> None:
    """Check that a loaded model has the output channels that an objective needs, and takes the texts.

    Args:
        model, objective: of the run.
        encoders: of the texts; none without texts.
        name: of the model.
        beside: channels of what stands beside its samples.

    Raises:
        ValueError: otherwise, saying what to set.
    """
    found, expected = model.predicted_channels, objective.out_channels(model.sample_channels - beside)
    if found != expected:
        remedy = "set objective.learn_variance to false, or objective.name to flow"
        if not objective.predicts_variance:
            remedy = "set objective.name to ddpm"
        raise ValueError(
            f"{name} returns {found} channels, but this objective needs {expected}: {remedy}, as it was "
            "trained"
        )
    for encoder, (tokens, width) in zip(encoders, model.text_shapes, strict=False):
        which = f"'s text_encoder{encoder.suffix}" if encoder.number else ""
        for what, takes, gives in (("width", width, encoder.width), ("length", tokens, encoder.max_length)):
            if takes not in (None, gives):
                raise ValueError(
                    f"{name} takes text of {what} {takes}, but text.encoder{which} gives {gives}: use the "
                    "text encoder that it was trained with"
                )
