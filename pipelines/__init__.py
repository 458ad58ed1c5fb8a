"""Pipelines, imported as mhla_diffusion.pipelines."""

from .auto import MHLAPipeline
from .image import MHLADiTPipeline
from .video import MHLAWanPipeline

__all__ = ["MHLADiTPipeline", "MHLAPipeline", "MHLAWanPipeline"]
