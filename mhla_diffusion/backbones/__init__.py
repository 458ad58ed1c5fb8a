"""diffusers models with MHLA inside."""

from .convert import convert_to_mhla
from .image import MHLADiTTransformer2DModel
from .processors import MHLAAttnProcessor
from .video import MHLASanaVideoTransformer3DModel, MHLAWanTransformer3DModel

__all__ = [
    "MHLAAttnProcessor",
    "MHLADiTTransformer2DModel",
    "MHLASanaVideoTransformer3DModel",
    "MHLAWanTransformer3DModel",
    "convert_to_mhla",
]
