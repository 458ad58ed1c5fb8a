"""Every scheduler of diffusers against a model that knows the clean sample, in the pipelines themselves."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from mhla_diffusion import MHLADiTPipeline, MHLAPipeline, MHLAWanPipeline, MHLAWanTransformer3DModel
from mhla_diffusion.pipelines.schedulers import PREDICTIONS, prediction_of, scales_inputs

MakePipeline = Callable[..., MHLADiTPipeline]

CLEAN = 0.5
FLOW = {"use_flow_sigmas": True}
OF_SAMPLE = UniPCMultistepScheduler(prediction_type="sample", **FLOW)
OF_VELOCITY = UniPCMultistepScheduler(prediction_type="flow_prediction", **FLOW)
BAR = (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0)

# Schedulers that lead no model of ours to its sample, whatever it predicts.
UNFIT = {
    "BlockRefinementScheduler", "CMStochasticIterativeScheduler", "CogVideoXDPMScheduler",
    "DDIMInverseScheduler", "DDPMWuerstchenScheduler", "DiscreteDDIMScheduler",
    "EDMDPMSolverMultistepScheduler", "EDMEulerScheduler", "EntropyBoundScheduler", "HeliosDMDScheduler",
    "HeliosScheduler", "IPNDMScheduler", "KarrasVeScheduler", "MiniMaxH3Scheduler", "PiflowScheduler",
    "RePaintScheduler", "SCMScheduler", "ScoreSdeVeScheduler", "UnCLIPScheduler",
}  # fmt: skip


def schedulers() -> dict[str, Any]:
    """Every class that can be made here, with every prediction that it has a name for."""
    found = {}
    for name in (name for name in dir(diffusers) if name.endswith("Scheduler")):
        scheduler_class = getattr(diffusers, name)
        settings: list[dict[str, Any]] = [{}]
        parameters = inspect.signature(scheduler_class.__init__).parameters
        if "prediction_type" in parameters:
            types = ("epsilon", "v_prediction", "sample", "flow_prediction")
            flows = ({}, FLOW) if "use_flow_sigmas" in parameters else ({},)
            settings = [{"prediction_type": kind, **flow} for kind in types for flow in flows]
        for values in settings:
            try:
                scheduler = scheduler_class(**values)
            except Exception:  # it needs a package, or arguments
                continue
            kind = values.get("prediction_type", "")
            found[f"{name} {kind}{' flow' * ('use_flow_sigmas' in values)}".strip()] = scheduler
    return found


SCHEDULERS = schedulers()


def knows_the_sample(prediction: str) -> Callable[..., tuple[Tensor]]:
    """Return the forward of a model that was trained to predict this, and to the end."""

    def forward(hidden_states: Tensor, timestep: Tensor, **_: Any) -> tuple[Tensor]:
        time = float(timestep.flatten()[0])
        if prediction.startswith("flow"):
            signal, level = 1 - time / 1000, max(time / 1000, 1e-3)
        else:
            below = min(max(int(time), 0), 999)
            bar = torch.lerp(BAR[below], BAR[min(below + 1, 999)], time - below).item()
            signal, level = bar**0.5, (1 - bar) ** 0.5
        clean = torch.full_like(hidden_states, CLEAN)
        noise = (hidden_states - signal * clean) / level
        answers = {
            "epsilon": noise,
            "v_prediction": signal * noise - level * clean,
            "flow_prediction": noise - clean,
        }
        return (answers.get(prediction, clean),)

    return forward


def generate(pipeline: Any, prediction: str, **arguments: Any) -> Tensor:
    pipeline.transformer.forward = knows_the_sample(prediction)
    pipeline.set_progress_bar_config(disable=True)
    settings = {
        "guidance_scale": 1.0, "output_type": "latent", "return_dict": False, "num_inference_steps": 40,
        "generator": torch.Generator().manual_seed(0),
    }  # fmt: skip
    return pipeline(**{**settings, **arguments})[0]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_leads_to_the_sample_or_is_refused(name: str, make_pipeline: MakePipeline) -> None:
    scheduler = SCHEDULERS[name]
    assert name.partition(" ")[0] not in UNFIT or prediction_of(scheduler) is None
    taken = []
    for prediction in PREDICTIONS:
        pipeline = make_pipeline(prediction_type=prediction, channels=3, vae=False, num_layers=1)
        pipeline.scheduler = scheduler  # of which DDIMScheduler, the first, says the noise
        if prediction_of(scheduler, alphas_cumprod=BAR) != prediction:
            with pytest.raises(ValueError, match="the model was trained for"):
                generate(pipeline, prediction, class_labels=[1, 2])
            continue
        taken.append(prediction)
        images = generate(pipeline, prediction, class_labels=[1, 2])
        assert (images - CLEAN).abs().mean() < 0.06, prediction
    assert len(taken) <= 1


def test_what_the_settings_of_a_scheduler_say_is_what_it_takes() -> None:
    found = {name: prediction_of(scheduler) for name, scheduler in SCHEDULERS.items()}
    for name, taken in found.items():
        scheduler_class, _, kind = name.partition(" ")
        # This solver treats a flow and its neighbour alike, down to the last steps.
        if scheduler_class in UNFIT or scheduler_class in ("SASolverScheduler",) or not kind:
            continue
        if kind.endswith(" flow"):
            meant = {"flow_prediction": "flow_prediction", "sample": "flow_sample"}.get(kind.split()[0])
            inverse = scheduler_class.endswith("InverseScheduler")
            assert taken == meant or inverse, name
        elif taken is not None:
            assert taken == kind, name
    flows = {name for name, taken in found.items() if taken == "flow_prediction" and " " not in name}
    assert flows >= {"FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"}
    assert found["DDIMScheduler epsilon"] == "epsilon"
    assert found["EulerDiscreteScheduler v_prediction"] == "v_prediction"
    of_other_noise = SCHEDULERS["HeunDiscreteScheduler epsilon"]
    assert prediction_of(of_other_noise) == "epsilon"
    assert prediction_of(of_other_noise, alphas_cumprod=BAR) is None


REFUSED: list[tuple[str, Any, str]] = [
    ("flow_sample", FlowMatchEulerDiscreteScheduler(), r"flow_sample.* expects flow_prediction\. Take UniPC"),
    ("flow_prediction", OF_SAMPLE, r"flow_prediction.* UniPCMultistepScheduler expects flow_sample"),
    ("flow_prediction", DDIMScheduler(), "expects epsilon"),
    ("flow_prediction", LCMScheduler(), "LCMScheduler expects epsilon"),
    (
        "flow_prediction",
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        r"cannot sample here \(ValueError: .*mu",
    ),
]


@pytest.fixture
def make_video_pipeline(text_parts: dict[str, Any]) -> Callable[..., MHLAWanPipeline]:
    def make(**settings: Any) -> MHLAWanPipeline:
        transformer = MHLAWanTransformer3DModel(
            patch_size=(2, 4, 4), num_attention_heads=2, attention_head_dim=12, in_channels=1, out_channels=1,
            num_layers=1, text_dim=16, freq_dim=16, ffn_dim=32, mhla_config={"blocks": [1, 1, 2]},
            sample_grid=(2, 2, 3),
        ).eval()  # fmt: skip
        return MHLAWanPipeline(**text_parts, transformer=transformer, max_sequence_length=8, **settings)

    return make


@pytest.mark.parametrize(
    ("prediction", "scheduler", "message"), REFUSED, ids=["sample", "velocity", "noise", "lcm", "shift"]
)
def test_images_and_videos_refuse_alike(
    prediction: str,
    scheduler: Any,
    message: str,
    make_pipeline: MakePipeline,
    make_video_pipeline: Callable[..., MHLAWanPipeline],
) -> None:
    image = make_pipeline(scheduler=scheduler, prediction_type=prediction, channels=3, vae=False)
    video = make_video_pipeline(scheduler=scheduler, prediction_type=prediction)
    for pipeline, arguments in ((image, {"class_labels": 1}), (video, {"prompt": "a cat"})):
        with pytest.raises(ValueError, match=message):
            generate(pipeline, prediction, **arguments)


@pytest.mark.parametrize(
    ("prediction", "scheduler"),
    [("flow_sample", OF_SAMPLE), ("flow_prediction", OF_VELOCITY)],
    ids=["sample", "velocity"],
)
def test_a_video_pipeline_keeps_what_its_first_scheduler_takes(
    prediction: str,
    scheduler: Any,
    make_video_pipeline: Callable[..., MHLAWanPipeline],
    tmp_path: Path,
) -> None:
    pipeline = make_video_pipeline(scheduler=scheduler)
    assert pipeline.config.prediction_type == prediction
    torch.testing.assert_close(
        generate(pipeline, prediction, prompt="a cat").mean(), torch.tensor(CLEAN), atol=0.02, rtol=0
    )
    pipeline.save_pretrained(tmp_path)
    other = OF_SAMPLE if scheduler is OF_VELOCITY else OF_VELOCITY
    assert MHLAPipeline.from_pretrained(tmp_path).config.prediction_type == prediction
    with pytest.raises(ValueError, match=f"trained for {prediction}"):
        MHLAPipeline.from_pretrained(tmp_path, scheduler=other)
    pipeline.scheduler = other
    with pytest.raises(ValueError, match=f"trained for {prediction}"):
        pipeline.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_what_earlier_versions_called_the_clean_sample_of_a_flow(
    make_pipeline: MakePipeline, tmp_path: Path
) -> None:
    make_pipeline(scheduler=OF_SAMPLE, vae=False, channels=3).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["prediction_type"] == "flow_sample"
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "prediction_type": "flow_prediction"}))
    pipeline = MHLAPipeline.from_pretrained(tmp_path)
    assert (generate(pipeline, "flow_sample", class_labels=1) - CLEAN).abs().max() < 0.02
    with pytest.raises(ValueError, match="UniPCMultistepScheduler expects flow_prediction"):
        MHLAPipeline.from_pretrained(tmp_path, scheduler=OF_VELOCITY)


@pytest.mark.parametrize("name", ["wan", "sana_video"])
def test_stock_pipelines_are_not_opened_with_a_scheduler_of_another_kind(
    name: str, make_stock_video_pipeline: Callable[[str], Any], tmp_path: Path
) -> None:
    make_stock_video_pipeline(name).save_pretrained(tmp_path)
    for prediction, scheduler, message in REFUSED:
        if prediction == "flow_prediction":
            with pytest.raises(ValueError, match=message):
                MHLAPipeline.from_pretrained(tmp_path, scheduler=scheduler, mhla_config={"blocks": 1})
    assert MHLAPipeline.from_pretrained(tmp_path, scheduler=OF_VELOCITY).scheduler is OF_VELOCITY


def test_pipelines_that_scale_their_inputs_are_told_from_those_that_do_not() -> None:
    scaling = ("DiTPipeline", "PixArtAlphaPipeline", "PixArtSigmaPipeline", "StableDiffusionPipeline")
    assert all(scales_inputs(getattr(diffusers, name)) for name in scaling)
    plain = ("WanPipeline", "SanaVideoPipeline", "LTXPipeline")
    assert not any(scales_inputs(getattr(diffusers, name)) for name in plain)
