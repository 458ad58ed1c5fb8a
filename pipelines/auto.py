"""One from_pretrained for every pipeline of this package."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import diffusers

from mhla_diffusion.backbones import backbone_of, backbone_of_config, convert_to_mhla, stock_names
from mhla_diffusion.config import MHLAConfig, as_config
from mhla_diffusion.hub import hub_arguments, load_config, load_errors, locate_subfolder, require_stored

from .image import MHLADiTPipeline
from .schedulers import prediction_of, require_scheduler, scales_inputs
from .text_to_image import MHLATextToImagePipeline
from .video import MHLAWanPipeline

# Our own pipelines, by what model_index.json says; all others are diffusers'.
_OWN = {cls.__name__: cls for cls in (MHLADiTPipeline, MHLATextToImagePipeline, MHLAWanPipeline)}
_OWN |= {"DiTPipeline": MHLADiTPipeline}

# Pipelines that call a transformer on tokens of which it does not say on which grid they lie, and those that
# put tokens of images ahead of the grid.
_WITHOUT_GRID, _WITH_EXTRA_TOKENS = ("LTXI2VLongMultiPromptPipeline",), ("LTXConditionPipeline",)


class MHLAPipeline:
    """Opens what is stored as the pipeline that fits it. Not instantiated; see :meth:`from_pretrained`."""

    def __init__(self) -> None:
        raise TypeError(
            "use MHLAPipeline.from_pretrained(folder or hub id); it returns the pipeline that fits"
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        mhla_config: MHLAConfig | dict[str, Any] | None = None,
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a pipeline from a folder or the hub.

        Args:
            pretrained_model_name_or_path: a folder with model_index.json, or a hub id.
            mhla_config: convert a stock model to this on loading, see
                :func:`mhla_diffusion.convert_to_mhla`. Without it a stock model keeps its attention.
            subfolder: where the pipeline lies inside the folder or repository.
            kwargs: as for ``DiffusionPipeline.from_pretrained``: dtype, revision, variant, local_files_only,
                token, cache_dir, device_map, components to use instead of stored ones, ...

        Returns:
            :class:`MHLADiTPipeline` for class-conditional images; :class:`MHLATextToImagePipeline` and
            :class:`MHLAWanPipeline` for models of texts that this package trained; else the diffusers
            pipeline that is stored, of any class that has a component of
            :data:`mhla_diffusion.backbones.BACKBONES`. With ``mhla_config`` all such components are
            converted, ``transformer_2`` too.

        Raises:
            ValueError: when what is stored is no pipeline, or one that there is no MHLA form of, and for a
                ``scheduler`` that takes another prediction than the stored one.
        """
        path = os.fspath(pretrained_model_name_or_path)
        if subfolder is not None:
            path = locate_subfolder(path, subfolder, kwargs)
        require_stored(path)
        names = os.listdir(path) if os.path.isdir(path) else []
        if "config.json" in names and "model_index.json" not in names:
            raise ValueError(
                f"{path} holds a single model (config.json), not a pipeline (model_index.json); open it with "
                f"{_opener(load_config(path))} and give it to a pipeline as transformer=..., or convert it "
                "alone (mhla convert --only_transformer true)"
            )
        index = diffusers.DiffusionPipeline.load_config(path, **hub_arguments(kwargs))
        if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
            raise ValueError(f"model_index.json in {path} names no pipeline: it is damaged")
        names = [name for name, stored in index.items() if _is_transformer(stored)]
        pipeline_class = _OWN.get(index["_class_name"]) or getattr(diffusers, index["_class_name"], None)
        if pipeline_class is None or not names:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds a {index['_class_name']}, which has no MHLA form; it "
                f"has one when a component of it is one of {stock_names()}"
            )
        if pipeline_class.__name__ in _WITHOUT_GRID and mhla_config is not None:
            raise ValueError(
                f"a {pipeline_class.__name__} puts tokens of frames behind those of the video, which then "
                "lie on no grid: take LTXPipeline or LTXImageToVideoPipeline, or leave mhla_config out"
            )
        needs_block = pipeline_class.__name__ in _WITH_EXTRA_TOKENS and mhla_config is not None
        if needs_block and not as_config(mhla_config).extra_block:
            raise ValueError(
                f"a {pipeline_class.__name__} puts tokens of images ahead of those of the video, on no grid: "
                "set extra_block=True in mhla_config, so that they are a block of their own"
            )
        if kwargs.get("scheduler") is not None:
            _require_same_prediction(kwargs["scheduler"], index, pipeline_class, path, hub_arguments(kwargs))
        with load_errors(path):
            pipeline = pipeline_class.from_pretrained(path, **kwargs)
        for name in names:
            transformer, config = getattr(pipeline, name), mhla_config
            ours = backbone_of(transformer)
            if ours is None:  # optional, and not there
                continue
            if config is None and pipeline_class is MHLADiTPipeline and not isinstance(transformer, ours):
                # With no layer named the model is the same function in our class, which runs any grid.
                config = MHLAConfig(layers=())
            if config is not None:
                pipeline.register_modules(**{name: convert_to_mhla(transformer, config)})
        return pipeline


def _require_same_prediction(
    scheduler: Any, index: Mapping[str, Any], pipeline_class: type[Any], path: str, place: dict[str, Any]
) -> None:
    """Hold a scheduler against the stored one, which fits what the model was trained to predict."""
    stored_class = getattr(diffusers, index["scheduler"][1], None)
    if stored_class is None:
        return
    stored = stored_class.from_pretrained(path, subfolder="scheduler", **place)
    scaled, mu = scales_inputs(pipeline_class), bool(stored.config.get("use_dynamic_shifting"))
    expected = prediction_of(stored, scaled=scaled, mu=mu)
    if expected is not None:
        noise = getattr(stored, "alphas_cumprod", None)
        require_scheduler(scheduler, expected, scaled=scaled, mu=mu, alphas_cumprod=noise)


def _opener(config: dict[str, Any]) -> str:
    ours, name = backbone_of_config(config), config.get("_class_name", "its class")
    module = "mhla_diffusion" if ours is not None and ours.__name__ == name else "diffusers"
    return f"{module}.{name}.from_pretrained"


def _is_transformer(stored: Any) -> bool:
    """Tell a component with an MHLA form, as model_index.json has it: ``[library, class]``."""
    if not isinstance(stored, (list, tuple)) or len(stored) != 2:
        return False
    # Of the time when all were Transformer2DModel; which one it is shows when it is loaded.
    return stored[1] == "Transformer2DModel" or backbone_of_config({"_class_name": stored[1]}) is not None
