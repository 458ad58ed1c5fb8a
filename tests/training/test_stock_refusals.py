"""What does not fit a pipeline of diffusers that models are trained for."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from diffusers import (
    AutoencoderKLWan,
)

from mhla_diffusion.training import (
    ModelConfig,
    ObjectiveConfig,
    TextConfig,
    VideoDataConfig,
    VideoLatentCacheConfig,
    VideoModelConfig,
    VideoSamplingConfig,
    build_objective,
    cache_video_latents,
)
from mhla_diffusion.training.stock import UNTRAINED
from tests.backbones.cases import CASES
from tests.training.stock_runs import TRAINED, WAN, prepare, run_of, write_latents


def test_clips_of_a_size_that_the_pipeline_does_not_make_are_refused(encoder: str, tmp_path: Path) -> None:
    sana = next(trained for trained in TRAINED if trained.case == "SanaVideo")
    sana = dataclasses.replace(sana, latents=(3, 8, 6))
    text = prepare(sana, encoder, tmp_path)
    write_latents(sana, text, tmp_path)
    run = run_of(sana, text, tmp_path)
    with pytest.raises(ValueError, match=r"heights and widths of multiples of 32, .* are of 64 x 48 pixels"):
        run.build(build_objective(run.objective))


@pytest.mark.parametrize("name", ["WanAnimate", "AnyFlow"])
def test_a_backbone_that_is_not_trained_is_refused_with_what_is_missing(name: str, tmp_path: Path) -> None:
    model = CASES[name].make()
    model.save_pretrained(tmp_path)
    missing = UNTRAINED[type(model)].split(",")[0]
    with pytest.raises(ValueError, match=rf"holds a {type(model).__name__} \({missing}.* but videos are"):
        _ = VideoModelConfig(init_from=str(tmp_path)).model_class
    with pytest.raises(ValueError, match=rf"\({missing}.* but images are trained with"):
        _ = ModelConfig(init_from=str(tmp_path)).model_class


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": ""}, "as AllegroPipeline embeds them: set text.pipeline to AllegroPipeline, here and"),
        ({"objective": ObjectiveConfig()}, "denoises by steps of ddpm: set objective.name to ddpm"),
        ({"objective": ObjectiveConfig(name="ddpm")}, "set objective.learn_variance to false"),
        ({"source": "moving_mnist"}, "trained on latents of texts: make them with mhla cache-latents"),
        ({"images": True}, "sampling.images: the model is given no such picture"),
    ],
)  # fmt: skip
def test_runs_that_do_not_fit_the_pipeline_are_refused(
    change: dict[str, Any], message: str, encoder: str, tmp_path: Path
) -> None:
    allegro = next(trained for trained in TRAINED if trained.case == "Allegro")
    CASES["Allegro"].make(**allegro.settings).save_pretrained(tmp_path / "model")
    text = TextConfig(encoder, max_length=8, pipeline=change.get("text", allegro.pipeline))
    write_latents(allegro, text, tmp_path)
    changes = {name: value for name, value in change.items() if name == "objective"}
    if change.get("images"):
        picture = tmp_path / "model" / "config.json"
        changes["sampling"] = VideoSamplingConfig(every=1, prompts=("aa",), images=(str(picture),))
    if "source" in change:
        changes["data"] = VideoDataConfig(change["source"], frames=3, sizes=((32, 32),))
    with pytest.raises(ValueError, match=message):
        build(allegro, text, tmp_path, **changes)


def build(*arguments: Any, **changes: Any) -> None:
    run = run_of(*arguments, **changes)
    run.build(build_objective(run.objective))


def test_what_a_pipeline_never_takes_is_refused_when_the_config_is_read(tmp_path: Path) -> None:
    """Before a model, an encoder or a cache is opened: none of them is there."""
    cosmos = next(trained for trained in TRAINED if trained.case == "Cosmos")
    text = TextConfig("nowhere", pipeline=cosmos.pipeline)
    with pytest.raises(ValueError, match=r"sampling.every must be 0: .* makes nothing without its guard"):
        run_of(cosmos, text, tmp_path, sampling=VideoSamplingConfig(every=1, prompts=("a",)))
    with pytest.raises(ValueError, match=r"denoises by steps of flow: set objective\.name to flow"):
        run_of(cosmos, text, tmp_path, objective=ObjectiveConfig(name="ddpm"))
    lumina = next(trained for trained in TRAINED if trained.case == "LuminaNextDiT")
    with pytest.raises(
        ValueError, match=r"text.pipeline Cosmos2\w+ is not for images: it must be one of Lumina"
    ):
        run_of(lumina, text, tmp_path)


def test_clips_of_a_pipeline_of_pictures_are_refused_before_they_are_cached(tmp_path: Path) -> None:
    cosmos = next(trained for trained in TRAINED if trained.case == "Cosmos")
    AutoencoderKLWan(**WAN).save_pretrained(tmp_path / "vae")
    clips = VideoDataConfig("folder", str(tmp_path), frames=5, sizes=((64, 64),))
    text = TextConfig("nowhere", pipeline=cosmos.pipeline)
    config = VideoLatentCacheConfig(str(tmp_path / "cache"), str(tmp_path / "vae"), clips, text)
    with pytest.raises(ValueError, match=r"makes 1 frame alone: set data.frames to 1, got 5"):
        cache_video_latents(config)
    assert not (tmp_path / "cache").exists()


def test_text_pipelines_are_those_that_models_are_trained_for() -> None:
    with pytest.raises(ValueError, match=r"text.pipeline must be one of .*, got 'FluxPipeline'"):
        TextConfig("x", pipeline="FluxPipeline")
    with pytest.raises(ValueError, match="LuminaPipeline has its own instruction before captions, or none"):
        TextConfig("x", pipeline="LuminaPipeline", instruction="sana")
