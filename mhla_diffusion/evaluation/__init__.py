"""Scores for generated images, from files alone: nothing here imports models, pipelines or training."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .evaluate import compute_statistics, evaluate_images, evaluate_videos
    from .networks.extractor import FeatureExtractor
    from .networks.images import load_extractor
    from .networks.videos import load_video_extractor
    from .pages.comparison import SideBySide, compare_reports
    from .pages.report import Report
    from .scores.frechet import FeatureStatistics, RunningStatistics, frechet_distance
    from .scores.score import Score

# Resolved on first use: importing this costs nothing until something is computed.
_HOMES = {
    "FeatureExtractor": ".networks.extractor",
    "FeatureStatistics": ".scores.frechet",
    "Report": ".pages.report",
    "RunningStatistics": ".scores.frechet",
    "Score": ".scores.score",
    "SideBySide": ".pages.comparison",
    "compare_reports": ".pages.comparison",
    "compute_statistics": ".evaluate",
    "evaluate_images": ".evaluate",
    "evaluate_videos": ".evaluate",
    "frechet_distance": ".scores.frechet",
    "load_extractor": ".networks.images",
    "load_video_extractor": ".networks.videos",
}

__all__ = [
    "FeatureExtractor",
    "FeatureStatistics",
    "Report",
    "RunningStatistics",
    "Score",
    "SideBySide",
    "compare_reports",
    "compute_statistics",
    "evaluate_images",
    "evaluate_videos",
    "frechet_distance",
    "load_extractor",
    "load_video_extractor",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
