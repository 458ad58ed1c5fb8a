"""Comparisons of attention: the same task, data, noise and budget for each variant and seed, and one page."""

from .classification import Classification
from .config import Comparison
from .language import Language
from .media import Images, Videos
from .page import write_page
from .recall import Recall, RecallModel, recall_batch, train_recall
from .runs import compare_attention
from .task import Measure, Task
from .variant import Variant

__all__ = [
    "Classification",
    "Comparison",
    "Images",
    "Language",
    "Measure",
    "Recall",
    "RecallModel",
    "Task",
    "Variant",
    "Videos",
    "compare_attention",
    "recall_batch",
    "train_recall",
    "write_page",
]
