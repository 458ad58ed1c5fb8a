"""Scores as text, and what has to be said of several."""

from __future__ import annotations

import pytest

from mhla_diffusion.evaluation import Score
from mhla_diffusion.evaluation.scores.score import cautions


@pytest.mark.parametrize(
    ("score", "text"),
    [
        (Score("fid", 2.345678), "fid = 2.346"),
        (Score("fid", 2.345678, interval=(2.1, 2.6)), "fid = 2.35 [2.10, 2.60]"),
        (Score("kid", 0.00123, interval=(0.00121, 0.00125)), "kid = 0.001230 [0.001210, 0.001250]"),
        (Score("recall", 1.0, interval=(1.0, 1.0)), "recall = 1.0000 [1.0000, 1.0000]"),
        (Score("fid", 2.345678, flags=["Only 3 images."]), "fid = 2.346"),
    ],
)
def test_a_score_is_its_name_and_as_many_places_as_its_interval_bears(score: Score, text: str) -> None:
    assert str(score) == text


def test_what_is_said_of_all_scores_is_said_once() -> None:
    scores = [Score(name, 1.0, extractor="inception", flags=["Few.", "Other."]) for name in ("fid", "kid")]
    assert cautions(scores) == ["Few.", "Other."]
    assert cautions([]) == cautions([Score("fid", 1.0)]) == []


def test_what_is_said_of_some_names_the_scores_or_their_extractor() -> None:
    scores = [
        Score("fid", 1.0, extractor="inception", flags=["Few."]),
        Score("fd_clip", 1.0, extractor="clip", flags=["Few.", "Another model."]),
        Score("clip_score_clip", 1.0, extractor="clip", flags=["Few.", "Another model."]),
    ]
    assert cautions(scores) == ["Few.", "clip: Another model."]
    cut = Score("clip_score_clip", 1.0, extractor="clip", flags=["Few.", "Prompts were cut."])
    assert cautions([scores[1], cut]) == [
        "Few.", "fd_clip: Another model.", "clip_score_clip: Prompts were cut.",
    ]  # fmt: skip
