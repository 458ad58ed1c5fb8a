"""Comparisons of attention: the same task, data, noise and budget for each variant and seed, and one page."""

from .config import Comparison, Recall, Variant
from .page import write_page
from .recall import RecallModel, recall_batch, train_recall
from .runs import compare_attention

__all__ = [
    "Comparison",
    "Recall",
    "RecallModel",
    "Variant",
    "compare_attention",
    "recall_batch",
    "train_recall",
    "write_page",
]
