"""diffusers models with MHLA inside. A backbone is named here, and nowhere else."""

from .convert import convert_to_mhla
from .dit import MHLADiTTransformer2DModel
from .processors import MHLAAttnProcessor
from .registry import BACKBONES, backbone_named, backbone_of, backbone_of_config, stock_names
from .sana_video import MHLASanaVideoTransformer3DModel
from .wan import MHLAWanTransformer3DModel

__all__ = [
    "BACKBONES",
    "MHLAAttnProcessor",
    "MHLADiTTransformer2DModel",
    "MHLASanaVideoTransformer3DModel",
    "MHLAWanTransformer3DModel",
    "backbone_named",
    "backbone_of",
    "backbone_of_config",
    "convert_to_mhla",
    "stock_names",
]
