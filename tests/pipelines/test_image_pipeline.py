from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import PipelineCallback
from PIL import Image
from torch import Tensor

from mhla_diffusion import MHLADiTPipeline, MHLADiTTransformer2DModel, MHLAPipeline

MakePipeline = Callable[..., MHLADiTPipeline]
AssertClose = Callable[..., None]

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


def generate(pipeline: Any, labels: Any = (0, 2), *, seed: int = 0, **arguments: Any) -> Any:
    """Two images in three steps, as a tensor unless told otherwise."""
    labels = list(labels) if isinstance(labels, tuple) else labels
    settings = {
        "num_inference_steps": 3,
        "output_type": "pt",
        "generator": torch.Generator().manual_seed(seed),
    }
    return pipeline(labels, **{**settings, **arguments}).images


@pytest.mark.parametrize(
    ("scheduler", "learned_variance"),
    [
        (DDIMScheduler(), False),
        (DDPMScheduler(), False),
        (DDPMScheduler(variance_type="learned_range"), True),
        (DDIMScheduler(prediction_type="v_prediction"), False),
        (DPMSolverMultistepScheduler(), True),
        (DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), False),
        (EulerAncestralDiscreteScheduler(), False),
        (HeunDiscreteScheduler(), False),
        (FlowMatchEulerDiscreteScheduler(), False),
        (FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True), False),
        (UniPCMultistepScheduler(**FLOW), False),
        (DPMSolverMultistepScheduler(**FLOW), False),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, bool) else str(value),
)
def test_every_scheduler_that_fits_generates(
    make_pipeline: MakePipeline, scheduler: Any, learned_variance: bool
) -> None:
    pipeline = make_pipeline(scheduler=scheduler, out_channels=8 if learned_variance else 4)
    images = generate(pipeline)
    assert images.shape == (2, 3, 16, 16)
    assert images.isfinite().all()
    assert images.std() > 0
    assert torch.equal(images, generate(pipeline)), "the seed alone decides"
    assert not torch.equal(images, generate(pipeline, seed=1))
    assert not torch.equal(images, generate(pipeline, labels=(1, 2)))


@pytest.mark.parametrize(
    "scheduler",
    [DDPMScheduler(), DDPMScheduler(variance_type="learned_range"), EulerAncestralDiscreteScheduler()],
    ids=["variance not used", "learned variance", "scaled input"],
)
@torch.no_grad()
def test_sampling_equals_the_loop_by_hand(
    make_pipeline: MakePipeline, assert_close: AssertClose, scheduler: Any
) -> None:
    pipeline = make_pipeline(scheduler=scheduler, out_channels=8, vae=False).to(dtype=torch.float64)
    images = generate(pipeline, labels=[1], guidance_scale=3.0, output_type="latent")

    generator = torch.Generator().manual_seed(0)
    scheduler.set_timesteps(3)
    latents = torch.randn(1, 4, 8, 8, generator=generator, dtype=torch.float64) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(latents, t)
        known, null = (
            pipeline.transformer(scaled, timestep=t[None], class_labels=torch.tensor([label])).sample
            for label in (1, 3)
        )
        prediction = null[:, :4] + 3 * (known[:, :4] - null[:, :4])
        if scheduler.config.get("variance_type") == "learned_range":
            prediction = torch.cat([prediction, known[:, 4:]], dim=1)
        latents = scheduler.step(prediction, t, latents, generator=generator).prev_sample
    assert_close(images, latents)


@pytest.mark.parametrize("channels", [1, 4])
def test_fast_solvers_take_the_config_of_a_learned_variance(
    make_pipeline: MakePipeline, channels: int
) -> None:
    """DPM-Solver cuts predictions to three channels where the config names a learned variance."""
    training = DDPMScheduler(variance_type="learned_range")
    pipeline = make_pipeline(scheduler=training, channels=channels, out_channels=2 * channels, vae=False)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(training.config, variance_type=None)
    expected = generate(pipeline, output_type="latent")
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(training.config)
    assert torch.equal(generate(pipeline, output_type="latent"), expected)
    assert pipeline.scheduler.config.variance_type == "learned_range"


@pytest.mark.parametrize(
    ("prediction_type", "scheduler", "message"),
    [
        ("epsilon", FlowMatchEulerDiscreteScheduler(), "trained for epsilon.*expects flow_prediction"),
        ("epsilon", UniPCMultistepScheduler(**FLOW), "trained for epsilon.*expects flow_prediction"),
        ("flow_prediction", DDIMScheduler(), "trained for flow_prediction.*DDIMScheduler expects epsilon"),
        ("v_prediction", DDIMScheduler(), "trained for v_prediction.*expects epsilon"),
    ],
    ids=str,
)
def test_a_scheduler_for_another_objective_is_refused(
    make_pipeline: MakePipeline, prediction_type: str, scheduler: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generate(make_pipeline(prediction_type=prediction_type, scheduler=scheduler))


def test_a_scheduler_put_in_later_is_held_against_the_first(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline(scheduler=FlowMatchEulerDiscreteScheduler())
    pipeline.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match="trained for flow_prediction"):
        generate(pipeline)


def test_guidance_moves_away_from_the_null_class(make_pipeline: MakePipeline) -> None:
    """One DDIM step to x0 is linear in the prediction, so images are linear in the scale."""
    pipeline = make_pipeline(vae=False, scheduler=DDIMScheduler(clip_sample=False))
    one, two, three = (
        generate(pipeline, guidance_scale=scale, num_inference_steps=1, output_type="latent")
        for scale in (1.0, 2.0, 3.0)
    )
    torch.testing.assert_close(two - one, three - two)
    assert not torch.allclose(one, two)


def test_a_batch_is_the_images_on_their_own(make_pipeline: MakePipeline, assert_close: AssertClose) -> None:
    # In float64: steps from pure noise enlarge the rounding, which differs with the size of a batch.
    pipeline = make_pipeline(vae=False).to(dtype=torch.float64)
    batch, *alone = (
        generate(
            pipeline, labels=labels, generator=[torch.Generator().manual_seed(i) for i in labels],
            output_type="latent",
        )
        for labels in ([0, 1, 2], [0], [1], [2])
    )  # fmt: skip
    assert batch.dtype == torch.float64
    assert_close(batch, torch.cat(alone))


def test_num_images_per_prompt_keeps_the_order_of_the_labels(
    make_pipeline: MakePipeline, assert_close: AssertClose
) -> None:
    pipeline = make_pipeline()
    repeated = generate(pipeline, labels=(0, 2), num_images_per_prompt=2)
    assert_close(repeated, generate(pipeline, labels=(0, 0, 2, 2)))


@pytest.mark.parametrize(
    "labels",
    [["cat", "fox"], ["kitten", 2], [0, "fox"], (0, 2), [["cat"], [2]], torch.tensor([0, 2])],
    ids=str,
)
def test_classes_go_by_id_or_name(make_pipeline: MakePipeline, labels: Any) -> None:
    pipeline = make_pipeline()
    assert pipeline.get_label_ids(list(labels)) == [0, 2]
    assert torch.equal(generate(pipeline, labels=labels), generate(pipeline, labels=(0, 2)))


def test_a_single_label_is_a_single_image(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline()
    assert torch.equal(generate(pipeline, labels="dog"), generate(pipeline, labels=[1]))
    assert torch.equal(generate(pipeline, labels=1), generate(pipeline, labels=[1]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": [3]}, r"class id 3 is out of range: the model knows 0 to 2"),
        ({"labels": [-1]}, r"class id -1 is out of range"),
        ({"labels": ["wolf", 0]}, r"unknown class 'wolf'; the names are cat, dog, fox, kitten"),
        ({"labels": []}, r"nothing to generate"),
        ({"num_images_per_prompt": 0}, r"nothing to generate"),
        ({"height": 18}, r"height and width must be multiples of 4, got 18 x 16"),
        ({"width": -4}, r"width must be at least 1, got -4"),
        ({"width": 0}, r"width must be at least 1, got 0"),
        ({"height": 0}, r"height must be at least 1, got 0"),
        ({"generator": [torch.Generator()]}, r"1 generators for 2 samples; give one, or a list with one"),
        ({"latents": torch.zeros(2, 4, 8, 4)}, r"latents must be \(2, 4, 8, 8\), got \(2, 4, 8, 4\)"),
        ({"output_type": "jpg"}, r"output_type 'jpg' is not one of pil, np, pt, latent"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"\['noise'\] are not among \['latents'\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_that_do_not_fit_are_refused(
    make_pipeline: MakePipeline, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generate(make_pipeline(), **arguments)


def test_without_names_the_refusal_says_to_give_ids(make_pipeline: MakePipeline) -> None:
    parts = make_pipeline()
    pipeline = MHLADiTPipeline(parts.transformer, parts.scheduler)
    with pytest.raises(ValueError, match="no id2label, give class ids"):
        generate(pipeline, labels=["cat"])


@pytest.mark.parametrize("size", [(8, 32), (24, 16)], ids=str)
def test_images_of_any_shape(make_pipeline: MakePipeline, size: tuple[int, int]) -> None:
    height, width = size
    assert generate(make_pipeline(), height=height, width=width).shape == (2, 3, height, width)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_output_types_hold_the_same_images(make_pipeline: MakePipeline, channels: int, mode: str) -> None:
    pipeline = make_pipeline(channels=channels, vae=False)
    tensor = generate(pipeline, output_type="pt")
    assert tensor.shape == (2, channels, 8, 8)
    assert 0 <= tensor.min() < tensor.max() <= 1
    latents = generate(pipeline, output_type="latent")
    torch.testing.assert_close(tensor, (latents / 2 + 0.5).clamp(0, 1))
    array = generate(pipeline, output_type="np")
    np.testing.assert_array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    pictures = generate(pipeline, output_type="pil")
    assert all(isinstance(picture, Image.Image) and picture.mode == mode for picture in pictures)
    values = np.stack([np.asarray(picture).reshape(8, 8, channels) for picture in pictures])
    np.testing.assert_array_equal(values, (array * 255).round())


def test_latents_are_decoded_by_the_vae(make_pipeline: MakePipeline, assert_close: AssertClose) -> None:
    pipeline = make_pipeline()
    latents = generate(pipeline, output_type="latent")
    assert latents.shape == (2, 4, 8, 8)
    with torch.no_grad():
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    assert_close(generate(pipeline), (decoded / 2 + 0.5).clamp(0, 1))


def test_a_shift_of_the_vae_is_undone(make_pipeline: MakePipeline, assert_close: AssertClose) -> None:
    pipeline = make_pipeline()
    pipeline.vae.register_to_config(shift_factor=0.7)
    latents = generate(pipeline, output_type="latent")
    with torch.no_grad():
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor + 0.7).sample
    assert_close(generate(pipeline), (decoded / 2 + 0.5).clamp(0, 1))


def test_a_tuple_holds_what_the_output_class_holds(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline()
    arguments = {"num_inference_steps": 2, "output_type": "pt"}
    (images,) = pipeline([0], generator=torch.Generator().manual_seed(0), return_dict=False, **arguments)
    assert torch.equal(images, pipeline([0], generator=torch.Generator().manual_seed(0), **arguments).images)


def test_latents_given_take_the_place_of_noise(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline(scheduler=EulerAncestralDiscreteScheduler())
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    torch.randn(2, 4, 8, 8, generator=generator)  # what drawing the noise would have used up
    assert torch.equal(generate(pipeline, latents=noise, generator=generator), generate(pipeline))


def test_a_callback_sees_every_step_and_changes_latents(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline(vae=False)
    seen: list[tuple[int, int]] = []

    def callback(
        pipe: MHLADiTPipeline, step: int, t: Tensor, tensors: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        assert pipe is pipeline
        assert list(tensors) == ["latents"]
        assert tensors["latents"].shape == (2, 4, 8, 8)
        seen.append((step, int(t)))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == pipe.num_timesteps - 1 else {}

    assert not generate(pipeline, output_type="latent", callback_on_step_end=callback).any()
    assert seen == list(enumerate(pipeline.scheduler.timesteps.tolist()))
    assert pipeline.guidance_scale == 4.0


def test_a_callback_can_interrupt(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline()
    steps: list[int] = []

    def callback(
        pipe: MHLADiTPipeline, step: int, t: Tensor, tensors: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        steps.append(step)
        pipe._interrupt = step == 1
        return tensors

    assert generate(pipeline, num_inference_steps=5, callback_on_step_end=callback).shape == (2, 3, 16, 16)
    assert steps == [0, 1]
    generate(pipeline, num_inference_steps=2)
    assert not pipeline.interrupt, "the next call starts afresh"


class Halving(PipelineCallback):
    @property
    def tensor_inputs(self) -> list[str]:
        return ["latents"]

    def callback_fn(self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: Any) -> Any:
        return {"latents": callback_kwargs["latents"] / 2}


def test_callback_objects_of_diffusers_work(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline(vae=False)
    halved = generate(
        pipeline,
        num_inference_steps=1,
        output_type="latent",
        callback_on_step_end=Halving(cutoff_step_ratio=1.0),
    )
    torch.testing.assert_close(halved * 2, generate(pipeline, num_inference_steps=1, output_type="latent"))


@pytest.mark.parametrize(
    "scheduler", [DDIMScheduler(), HeunDiscreteScheduler()], ids=lambda s: type(s).__name__
)
def test_the_progress_bar_counts_steps(
    make_pipeline: MakePipeline, capsys: pytest.CaptureFixture[str], scheduler: Any
) -> None:
    pipeline = make_pipeline(scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=False)
    generate(pipeline, num_inference_steps=4)
    assert "4/4" in capsys.readouterr().err


def test_components_build_the_same_pipeline(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline()
    assert set(pipeline.components) == {"transformer", "scheduler", "vae"}
    rebuilt = MHLADiTPipeline(**pipeline.components)
    rebuilt.set_progress_bar_config(disable=True)
    assert torch.equal(generate(rebuilt), generate(pipeline))


@pytest.mark.parametrize("vae", [True, False])
@pytest.mark.parametrize("opener", [MHLADiTPipeline, MHLAPipeline])
def test_saving_and_loading_changes_nothing(
    make_pipeline: MakePipeline, tmp_path: Path, opener: Any, vae: bool
) -> None:
    pipeline = make_pipeline(vae=vae, training={"data": "pets"}, scheduler=FlowMatchEulerDiscreteScheduler())
    pipeline.save_pretrained(tmp_path)
    loaded = opener.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is MHLADiTPipeline
    assert isinstance(loaded.transformer, MHLADiTTransformer2DModel)
    assert (loaded.vae is None) is not vae
    assert loaded.labels == pipeline.labels == {"cat": 0, "kitten": 0, "dog": 1, "fox": 2}
    assert loaded.config.training == {"data": "pets"}
    assert loaded.config.prediction_type == "flow_prediction"
    assert torch.equal(generate(loaded, labels=["cat"]), generate(pipeline, labels=["cat"]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_on_loading(make_pipeline: MakePipeline, tmp_path: Path, dtype: torch.dtype) -> None:
    pipeline = make_pipeline()
    pipeline.save_pretrained(tmp_path)
    loaded = MHLAPipeline.from_pretrained(tmp_path, dtype=dtype)
    loaded.set_progress_bar_config(disable=True)
    assert {p.dtype for model in (loaded.transformer, loaded.vae) for p in model.parameters()} == {dtype}
    assert generate(loaded, output_type="latent").dtype == dtype
    images = generate(loaded)
    assert images.dtype == torch.float32
    assert images.isfinite().all()
    assert all(np.asarray(picture).std() > 0 for picture in generate(loaded, output_type="pil"))


def test_sharded_and_variant_files_load(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    pipeline = make_pipeline()
    pipeline.save_pretrained(tmp_path, max_shard_size="20KB", variant="ema")
    assert len(list((tmp_path / "transformer").glob("*.ema*.safetensors"))) > 1
    loaded = MHLAPipeline.from_pretrained(tmp_path, variant="ema")
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(generate(loaded), generate(pipeline))


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_a_stock_model_gives_what_dit_pipeline_gives(
    make_stock_pipeline: Callable[[], DiTPipeline], assert_close: AssertClose, guidance_scale: float
) -> None:
    stock = make_stock_pipeline()
    ours = MHLADiTPipeline(**stock.components)
    ours.set_progress_bar_config(disable=True)
    expected, images = (
        generate(pipeline, labels=[1, 7], guidance_scale=guidance_scale) for pipeline in (stock, ours)
    )
    assert_close(images, expected)


def test_leaf_offloading_of_a_pipeline(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline()
    expected = generate(pipeline)
    pipeline.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )
    assert torch.equal(generate(pipeline), expected)


def test_the_pipeline_takes_a_vae_of_its_own(
    make_pipeline: MakePipeline, make_vae: Callable[[], AutoencoderKL], tmp_path: Path
) -> None:
    pipeline = make_pipeline()
    pipeline.save_pretrained(tmp_path)
    vae = make_vae()
    loaded = MHLAPipeline.from_pretrained(tmp_path, vae=vae)
    assert loaded.vae is vae
