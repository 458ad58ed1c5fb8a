"""diffusers models with MHLA inside."""

from .convert import convert_to_mhla
from .image import MHLADiTTransformer2DModel
from .processors import MHLAAttnProcessor

__all__ = ["MHLAAttnProcessor", "MHLADiTTransformer2DModel", "convert_to_mhla"]
