"""Scores of models against what is held out, or what a user has."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from mhla_diffusion.conversion.experiment import ExperimentConfig
from mhla_diffusion.conversion.scores import ScoreConfig, Scorer
from mhla_diffusion.evaluation.networks import images as image_networks
from mhla_diffusion.evaluation.scores.frechet import FeatureStatistics
from mhla_diffusion.training import train
from mhla_diffusion.training.config import parse_config
from mhla_diffusion.training.export import read_run_config
from tests.extractors import quarters

SAVED = Path(__file__).parents[1] / "saved"


def test_clips_are_made_of_held_out_captions_and_scored(
    tmp_path: Path, clip_training: dict[str, Any]
) -> None:
    clip_training["trainer"]["max_steps"] = 1
    clip_training["sampling"] = {"num_inference_steps": 1, "prompts": ["digit 3"]}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(clip_training))
    run: Any = replace(read_run_config(tmp_path / "run.yaml"), output_dir=str(tmp_path / "trained"))
    train(run)
    config = ScoreConfig(
        num_samples=3, held_out={"data.moving_digits.first_clip": 50}, num_real=4, extractor="transnetv2"
    )
    scorer = Scorer(config, str(tmp_path / "run.yaml"), run, tmp_path / "out")
    (score,) = scorer(str(tmp_path / "trained/pipeline"), tmp_path / "out/student")
    assert (score["name"], score["value"] > 0) == ("fd_quarters", True)
    (samples,) = (tmp_path / "out/student").glob("samples-*")
    rows = json.loads((samples / "manifest.json").read_text())["videos"]
    assert [row["seed"] for row in rows] == [0, 1, 2]
    assert scorer.prompts == [row["prompt"] for row in rows] != ["digit 3"] * 3
    (real,) = (tmp_path / "out").glob("real-*")
    assert FeatureStatistics.load(real).count == 4


def test_images_of_a_user_are_measured_once(
    tmp_path: Path, image_folder: Path, write_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_networks, "_efficientnet_lite0", quarters)
    path = write_run()
    config = ScoreConfig(num_samples=2, real=str(image_folder), extractor="efficientnet_lite0")
    store = Scorer(config, str(path), read_run_config(path), tmp_path / "out").real
    assert FeatureStatistics.load(store).count == 20
    given = Scorer(replace(config, real=str(store)), str(path), read_run_config(path), tmp_path / "other")
    assert given.real == store
    assert not (tmp_path / "other").exists(), "statistics need no others"
    next(image_folder.rglob("*.png")).unlink()
    fewer = Scorer(config, str(path), read_run_config(path), tmp_path / "out").real
    assert fewer != store
    assert FeatureStatistics.load(fewer).count == 19


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"num_samples": 4}, "scores need real or held_out, and num_samples"),
        ({"real": "photos"}, "scores need real or held_out, and num_samples"),
        ({"num_samples": 4, "real": "photos", "held_out": {"data.split": "test"}}, "not both"),
        ({"num_samples": 1, "real": "photos"}, "num_samples must be 2 or more"),
        ({"num_samples": -1}, "num_samples must be 2 or more"),
        ({"num_real": 1}, "num_real must be 2 or more"),
        ({"variants": ("half",)}, "variants must be of half, chosen; .* got half"),
        ({"variants": ()}, "variants must name one or more"),
        (
            {"variants": ("all linear",), "scored": ("all MHLA",)},
            "scored must be of all linear, got all MHLA",
        ),
    ],
)
def test_what_cannot_be_scored_is_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        ExperimentConfig(teacher="t", out="o", height=8, width=8, candidates="c", **settings)


def test_keys_of_a_mapping_are_free_and_all_others_are_not(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("held_out: {data.split: test}\n")
    given = ["--config", str(tmp_path / "c.yaml")]
    for word in ("teacher", "out", "candidates", "height", "width"):
        given += [f"--{word}", "8"]
    assert parse_config(ExperimentConfig, given)[0].held_out == {"data.split": "test"}
    assert parse_config(ExperimentConfig, [*given, "--held_out", "{data.path: x}"])[0].held_out == {
        "data.path": "x"
    }
    (tmp_path / "c.yaml").write_text("held_outs: {data.split: test}\n")
    with pytest.raises(ValueError, match="unknown key held_outs"):
        parse_config(ExperimentConfig, given)
