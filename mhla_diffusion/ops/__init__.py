"""The operator: tensors in, tensors out, on torch alone."""

from .features import FEATURE_MAPS, NORMALIZERS, apply_rotary_emb
from .layout import BlockLayout, recommended_layout
from .mhla import mhla
from .mixing import MIXING_STARTS, block_distances, initial_mixing, locality_mixing, resize_mixing
from .reference import mhla_reference

__all__ = [
    "FEATURE_MAPS",
    "MIXING_STARTS",
    "NORMALIZERS",
    "BlockLayout",
    "apply_rotary_emb",
    "block_distances",
    "initial_mixing",
    "locality_mixing",
    "mhla",
    "mhla_reference",
    "recommended_layout",
    "resize_mixing",
]
