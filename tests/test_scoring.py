"""Samples of a run and what they are scored against: what is handed on, and what enters statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mhla_diffusion import scoring
from mhla_diffusion.evaluation.scores.frechet import FeatureStatistics
from mhla_diffusion.evaluation.sets.images import open_images
from mhla_diffusion.training import TextConfig, VideoDataConfig
from mhla_diffusion.training.export import read_run_config
from tests.extractors import quarters
from tests.training.stock_runs import TRAINED, write_latents

SAVED = Path(__file__).parent / "saved"


class Noise:
    """Ten pictures of noise, and which were asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __len__(self) -> int:
        return 10

    def load(self, index: int, generator: torch.Generator) -> dict[str, Tensor]:
        self.asked.append(index)
        return {"samples": torch.rand(3, 8, 8, generator=generator)}


def run_of(kind: str, **changes: Any) -> Any:
    run: Any = read_run_config(SAVED / f"training-{kind}" / "config.yaml")
    sampling = replace(run.sampling, num_inference_steps=7, guidance_scale=2.5)
    return replace(run, sampling=sampling, **changes)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments of what generates and of what loads, which do nothing."""
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    for name in ("generate_images", "generate_videos", "load_extractor", "load_video_extractor"):
        monkeypatch.setattr(
            scoring, name, lambda *args, name=name, **kwargs: calls.update({name: (args, kwargs)})
        )
    return calls


def test_samples_are_evenly_spaced_each_with_a_seed_of_its_own() -> None:
    source = Noise()
    first, again = (list(scoring.pixels_of(source, 4)) for _ in range(2))
    assert source.asked == [0, 2, 5, 7] * 2
    assert len({pixels.tobytes() for pixels in first}) == 4
    assert all(np.array_equal(*pair) for pair in zip(first, again, strict=True))
    assert (first[0].shape, first[0].dtype) == ((8, 8, 3), np.uint8)


def test_leftovers_of_a_call_that_was_stopped_are_not_measured(tmp_path: Path) -> None:
    path, left = tmp_path / "real.npz", tmp_path / "real"
    left.mkdir()
    Image.new("RGB", (8, 8)).save(left / "000099.png")
    scoring.write_statistics_of(Noise(), 4, open_images, quarters(), path)
    assert FeatureStatistics.load(path).count == 4
    assert not left.exists()


@pytest.mark.parametrize("prompts", [["cat", "dog"], []], ids=["texts", "classes"])
def test_images_are_generated_with_the_settings_of_the_run(
    called: dict[str, Any], tmp_path: Path, prompts: Sequence[str]
) -> None:
    scoring.generate_samples(run_of("image"), "pipeline", tmp_path, 5, prompts=prompts, batch_size=3)
    expected = {
        "prompts": prompts or None, "num_images": 5, "num_inference_steps": 7, "guidance_scale": 2.5,
        "batch_size": 3,
    }  # fmt: skip
    assert called == {"generate_images": (("pipeline", tmp_path), expected)}


def test_videos_are_generated_in_the_first_size_of_the_run(called: dict[str, Any], tmp_path: Path) -> None:
    run = run_of("video", data=VideoDataConfig("folder", "clips", frames=6, sizes=[(16, 32), (32, 16)]))
    scoring.generate_samples(run, "pipeline", tmp_path, 5, prompts=("cat",), batch_size=3, fps=12.0)
    expected = {
        "prompts": ["cat"], "num_videos": 5, "height": 16, "width": 32, "num_frames": 6, "fps": 12.0,
        "num_inference_steps": 7, "guidance_scale": 2.5, "batch_size": 3,
    }  # fmt: skip
    assert called == {"generate_videos": (("pipeline", tmp_path), expected)}


def test_clips_of_a_run_on_latents_have_the_size_that_these_are_decoded_to(
    called: dict[str, Any], tmp_path: Path
) -> None:
    (ltx,) = (trained for trained in TRAINED if trained.case == "LTXVideo")
    cache = write_latents(ltx, TextConfig("encoder"), tmp_path)
    run = run_of("video", data=VideoDataConfig("latents", cache))
    scoring.generate_samples(run, "pipeline", tmp_path, 5, prompts=("cat",), batch_size=3)
    size = {name: called["generate_videos"][1][name] for name in ("num_frames", "height", "width")}
    assert size == ltx.call
    scoring.load_extractor_of(run, "i3d")
    assert called["load_video_extractor"][1]["frames"] == 17
    assert scoring.size_beside_config(run) == [tuple(size.values())]
    for declared in (run_of("image"), run_of("video", data=VideoDataConfig("folder", "clips"))):
        assert scoring.size_beside_config(declared) == []


def test_an_extractor_is_one_of_what_the_run_makes(called: dict[str, Any]) -> None:
    run = run_of("video", data=VideoDataConfig("folder", "clips", frames=6))
    scoring.load_extractor_of(run, "i3d", device="meta")
    scoring.load_extractor_of(run_of("image"), "inception", device="meta")
    assert called == {
        "load_video_extractor": (("i3d",), {"frames": 6, "device": "meta"}),
        "load_extractor": (("inception",), {"device": "meta"}),
    }
