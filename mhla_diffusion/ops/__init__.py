"""The operator: tensors in, tensors out, on torch alone."""

from . import decompositions  # noqa: F401 (they register themselves)
from .causal import MHLAState, mhla_causal
from .features import FEATURE_MAPS, NORMALIZERS, apply_rotary_emb
from .layout import BlockLayout, Margin, recommended_layout
from .mhla import mhla
from .mixing import (
    MIXING_STARTS,
    block_distances,
    causal_mixing,
    content_mixing,
    extend_mixing,
    initial_mixing,
    locality_mixing,
    offset_means,
    relative_mixing,
    resize_mixing,
)
from .norms import Norms
from .parallel import exchanged_bytes, mhla_parallel
from .reference import mhla_causal_reference, mhla_local_reference, mhla_reference
from .routing import choose_blocks, routed_attention
from .window import LOCAL_FORMS, mhla_local, window_attention

__all__ = [
    "FEATURE_MAPS",
    "LOCAL_FORMS",
    "MIXING_STARTS",
    "NORMALIZERS",
    "BlockLayout",
    "MHLAState",
    "Margin",
    "Norms",
    "apply_rotary_emb",
    "block_distances",
    "causal_mixing",
    "choose_blocks",
    "content_mixing",
    "exchanged_bytes",
    "extend_mixing",
    "initial_mixing",
    "locality_mixing",
    "mhla",
    "mhla_causal",
    "mhla_causal_reference",
    "mhla_local",
    "mhla_local_reference",
    "mhla_parallel",
    "mhla_reference",
    "offset_means",
    "recommended_layout",
    "relative_mixing",
    "resize_mixing",
    "routed_attention",
    "window_attention",
]
