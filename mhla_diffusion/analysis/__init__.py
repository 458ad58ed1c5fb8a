"""What attention does in a trained model: rank and entropy of its matrices, and an audit of the mixing.

For each attention layer, on the queries and keys of one batch, three matrices are compared: softmax
attention, plain linear attention, and MHLA with the layer's mixing matrix. "Global context collapse" is a
linear attention of low rank whose rows are nearly uniform (section 3 of the paper).
"""

from .matrices import MatrixStatistics, MixingAudit, audit_mixing, mixing_map
from .page import FILE_NAMES, Analysis, LayerAnalysis
from .record import analyze, analyze_stored

__all__ = [
    "FILE_NAMES",
    "Analysis",
    "LayerAnalysis",
    "MatrixStatistics",
    "MixingAudit",
    "analyze",
    "analyze_stored",
    "audit_mixing",
    "mixing_map",
]
