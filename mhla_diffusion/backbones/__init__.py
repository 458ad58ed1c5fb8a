"""diffusers models with MHLA inside. A backbone is named here, and nowhere else."""

from .allegro import MHLAAllegroTransformer3DModel
from .any_flow import MHLAAnyFlowTransformer3DModel
from .chrono_edit import MHLAChronoEditTransformer3DModel
from .convert import convert_to_mhla
from .cosmos import MHLACosmosTransformer3DModel
from .dit import MHLADiTTransformer2DModel
from .hunyuan_dit import MHLAHunyuanDiT2DModel
from .kandinsky5 import MHLAKandinsky5Transformer3DModel
from .latte import MHLALatteTransformer3DModel
from .ltx_video import MHLALTXVideoTransformer3DModel
from .lumina_next import MHLALuminaNextDiT2DModel
from .pixart import MHLAPixArtTransformer2DModel
from .processors import MHLAAttnProcessor
from .qwen_image import MHLAQwenImageTransformer2DModel
from .registry import (
    BACKBONES,
    backbone_named,
    backbone_of,
    backbone_of_config,
    load_transformer,
    stock_names,
)
from .sana import MHLASanaTransformer2DModel
from .sana_video import MHLASanaVideoTransformer3DModel
from .skyreels_v2 import MHLASkyReelsV2Transformer3DModel
from .wan import MHLAWanTransformer3DModel
from .wan_animate import MHLAWanAnimateTransformer3DModel
from .wan_vace import MHLAWanVACETransformer3DModel

__all__ = [
    "BACKBONES",
    "MHLAAllegroTransformer3DModel",
    "MHLAAnyFlowTransformer3DModel",
    "MHLAAttnProcessor",
    "MHLAChronoEditTransformer3DModel",
    "MHLACosmosTransformer3DModel",
    "MHLADiTTransformer2DModel",
    "MHLAHunyuanDiT2DModel",
    "MHLAKandinsky5Transformer3DModel",
    "MHLALTXVideoTransformer3DModel",
    "MHLALatteTransformer3DModel",
    "MHLALuminaNextDiT2DModel",
    "MHLAPixArtTransformer2DModel",
    "MHLAQwenImageTransformer2DModel",
    "MHLASanaTransformer2DModel",
    "MHLASanaVideoTransformer3DModel",
    "MHLASkyReelsV2Transformer3DModel",
    "MHLAWanAnimateTransformer3DModel",
    "MHLAWanTransformer3DModel",
    "MHLAWanVACETransformer3DModel",
    "backbone_named",
    "backbone_of",
    "backbone_of_config",
    "convert_to_mhla",
    "load_transformer",
    "stock_names",
]
