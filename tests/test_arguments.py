"""Seeds are checked where they are given, not where a generator is made of them hours later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mhla_diffusion.arguments import MAX_NUMPY_SEED, MAX_SEED, require_seed
from mhla_diffusion.comparison.config import Comparison
from mhla_diffusion.comparison.variant import Variant
from mhla_diffusion.conversion import AlignConfig
from mhla_diffusion.conversion.calls import NoiseCalls
from mhla_diffusion.conversion.experiment import ExperimentConfig
from mhla_diffusion.conversion.report import ReportConfig
from mhla_diffusion.evaluation import evaluate_images, evaluate_videos
from mhla_diffusion.training.settings import TrainerConfig
from mhla_diffusion.training.task import SampleSheetConfig

GIVEN: dict[str, tuple[Callable[[Any], object], int]] = {
    "training": (lambda seed: TrainerConfig(batch_size=1, max_steps=1, seed=seed), MAX_NUMPY_SEED),
    "sheets": (lambda seed: SampleSheetConfig(seed=seed), MAX_SEED),
    "alignment": (lambda seed: AlignConfig(seed=seed), MAX_SEED),
    "calls": (lambda seed: NoiseCalls(None, seed=seed), MAX_SEED),
    "report": (lambda seed: ReportConfig(seed=seed), MAX_SEED),
    "comparison": (
        lambda seed: Comparison(name="a", variants=[Variant(name="a")], seeds=[0, seed]), MAX_NUMPY_SEED,
    ),
    "experiment": (
        lambda seed: ExperimentConfig(
            teacher="a", out="b", height=8, width=8, candidates="c", seeds=(0, seed)
        ),
        MAX_NUMPY_SEED,
    ),
    "scores of images": (lambda seed: evaluate_images("missing", "missing", seed=seed), MAX_SEED),
    "scores of videos": (lambda seed: evaluate_videos("missing", "missing", seed=seed), MAX_SEED),
}  # fmt: skip


@pytest.mark.parametrize("where", GIVEN)
def test_seeds_that_no_generator_takes_are_refused_where_they_are_given(where: str) -> None:
    make, most = GIVEN[where]
    for wrong in (-1, most + 1):
        with pytest.raises(ValueError, match=rf"seeds? must be a whole number from 0 to {most}, got {wrong}"):
            make(wrong)


def test_whole_numbers_of_any_library_are_seeds() -> None:
    numpy = pytest.importorskip("numpy")
    for seed in (0, MAX_SEED, numpy.int64(3)):
        require_seed(seed)
    for wrong in (1.0, "1", None, numpy.zeros(1, int)):
        with pytest.raises(ValueError, match="a must be a whole number from 0 to 5, got"):
            require_seed(wrong, "a", most=5)
