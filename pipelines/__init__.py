"""Pipelines, imported as mhla_diffusion.pipelines."""

from .auto import MHLAPipeline
from .image import MHLADiTPipeline
from .text_to_image import MHLATextToImagePipeline
from .video import MHLAWanPipeline

__all__ = ["MHLADiTPipeline", "MHLAPipeline", "MHLATextToImagePipeline", "MHLAWanPipeline"]
