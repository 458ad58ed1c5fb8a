"""Pipelines, imported as mhla_diffusion.pipelines."""

from .auto import MHLAPipeline
from .image import MHLADiTPipeline

__all__ = ["MHLADiTPipeline", "MHLAPipeline"]
