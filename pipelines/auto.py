"""One from_pretrained for every pipeline of this package."""

from __future__ import annotations

import os
from typing import Any

from diffusers import (
    DiffusionPipeline,
    SanaImageToVideoPipeline,
    SanaVideoPipeline,
    WanImageToVideoPipeline,
    WanPipeline,
)

from mhla_diffusion.attention import MHLAConfig
from mhla_diffusion.backbones import (
    MHLADiTTransformer2DModel,
    MHLASanaVideoTransformer3DModel,
    MHLAWanTransformer3DModel,
    convert_to_mhla,
)
from mhla_diffusion.hub import hub_arguments, locate_subfolder

from .image import MHLADiTPipeline
from .video import MHLAWanPipeline

# What model_index.json says -> the pipeline that runs it, and the model class that it runs.
_PIPELINES: dict[str, tuple[type[DiffusionPipeline], type[Any]]] = {
    "MHLADiTPipeline": (MHLADiTPipeline, MHLADiTTransformer2DModel),
    "DiTPipeline": (MHLADiTPipeline, MHLADiTTransformer2DModel),
    "MHLAWanPipeline": (MHLAWanPipeline, MHLAWanTransformer3DModel),
    "WanPipeline": (WanPipeline, MHLAWanTransformer3DModel),
    "WanImageToVideoPipeline": (WanImageToVideoPipeline, MHLAWanTransformer3DModel),
    "SanaVideoPipeline": (SanaVideoPipeline, MHLASanaVideoTransformer3DModel),
    "SanaImageToVideoPipeline": (SanaImageToVideoPipeline, MHLASanaVideoTransformer3DModel),
}


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
            :class:`MHLADiTPipeline` for class-conditional images; :class:`MHLAWanPipeline` for video models
            that this package trained; diffusers' own ``WanPipeline``, ``SanaVideoPipeline`` or their forms
            for image-to-video, around transformers with MHLA.

        Raises:
            ValueError: when what is stored is no pipeline, or one that there is no MHLA form of.
        """
        path = os.fspath(pretrained_model_name_or_path)
        if subfolder is not None:
            path = locate_subfolder(path, subfolder, kwargs)
        names = os.listdir(path) if os.path.isdir(path) else []
        if "config.json" in names and "model_index.json" not in names:
            raise ValueError(
                f"{path} holds a single model (config.json), not a pipeline (model_index.json); load it with "
                "its class, such as MHLADiTTransformer2DModel.from_pretrained, and build the pipeline with "
                "MHLADiTPipeline(transformer=..., scheduler=...)"
            )
        stored = MHLADiTPipeline.load_config(path, **hub_arguments(kwargs)).get("_class_name")
        if stored not in _PIPELINES:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds a {stored}, which has no MHLA form; those that have "
                f"one: {', '.join(_PIPELINES)}"
            )
        pipeline_class, model_class = _PIPELINES[stored]
        pipeline = pipeline_class.from_pretrained(path, **kwargs)
        if mhla_config is None and pipeline_class is MHLADiTPipeline:
            # With no layer named the model is the same function in our class, which runs any grid.
            mhla_config = None if isinstance(pipeline.transformer, model_class) else MHLAConfig(layers=())
        if mhla_config is not None:
            # Wan2.2 has a second transformer, for late steps.
            names = [n for n in ("transformer", "transformer_2") if getattr(pipeline, n, None) is not None]
            converted = {name: convert_to_mhla(getattr(pipeline, name), mhla_config) for name in names}
            pipeline.register_modules(**converted)
        return pipeline
