"""Requests to our pipelines: every argument of the stock call, and what cannot be made."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, DiTPipeline, FlowMatchEulerDiscreteScheduler, WanPipeline

from mhla_diffusion import MHLADiTPipeline, MHLAWanPipeline, MHLAWanTransformer3DModel
from mhla_diffusion.pipelines.requests import ClassNames


@pytest.fixture(params=["pixels", "latents"])
def pipeline(request: Any, text_parts: dict[str, Any], video_vae: AutoencoderKLWan) -> MHLAWanPipeline:
    latents = request.param == "latents"
    transformer = MHLAWanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4 if latents else 1,
        out_channels=4 if latents else 1, num_layers=1, text_dim=16, freq_dim=16, ffn_dim=32,
        mhla_config={"blocks": [1, 1, 1]}, sample_grid=(2, 2, 2) if not latents else (1, 2, 2),
    ).eval()  # fmt: skip
    pipeline = MHLAWanPipeline(
        **text_parts, vae=video_vae if latents else None, transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(), max_sequence_length=8,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


@pytest.mark.parametrize(("ours", "stock"), [(MHLAWanPipeline, WanPipeline), (MHLADiTPipeline, DiTPipeline)])
def test_every_argument_of_the_stock_call_goes_by_name(ours: type, stock: type) -> None:
    names = inspect.signature(ours.__call__).parameters
    assert set(inspect.signature(stock.__call__).parameters) <= set(names)
    assert not any(parameter.kind == parameter.VAR_KEYWORD for parameter in names.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "nothing to generate: the list of prompts is empty"),
        ({"prompt": None}, "nothing to generate: give a prompt or prompt_embeds"),
        ({"prompt": [["a"], ["b"]]}, r"prompt must be a text or a list of texts, got \[\['a'\], \['b'\]\]"),
        ({"prompt": 3}, "prompt must be a text or a list of texts, got 3"),
        ({"prompt": "a", "negative_prompt": [1]}, "negative_prompt must be a text or a list of texts"),
        ({"prompt": "a", "num_videos_per_prompt": 0}, "num_videos_per_prompt must be at least 1, got 0"),
        ({"prompt": "a", "num_inference_steps": 0}, "num_inference_steps must be at least 1, got 0"),
        ({"prompt": "a", "num_frames": 0}, "num_frames must be at least 1, got 0"),
        ({"prompt": "a", "num_inference_steps": 2.5}, "num_inference_steps must be a whole number, got 2.5"),
        (
            {"prompt": "a", "guidance_scale": np.float32("nan")},
            "guidance_scale must be a finite number, got nan",
        ),
        ({"prompt": "a", "guidance_scale": torch.tensor(np.inf)}, "guidance_scale must be a finite number"),
        ({"prompt": "a", "height": "16"}, "height must be a whole number, got '16'"),
        (
            {"prompt": "a", "generator": 7},
            "generator must be a torch.Generator or a list of them, got 7: of a seed",
        ),
        ({"prompt": "a", "generator": [7]}, r"generator must be .*, got \[7\]: of a seed"),
        ({"prompt": "a", "generator": tuple(generators(1))}, r"generator must be .*, got \(<torch"),
        ({"prompt": ["a", "b"], "generator": generators(1)}, "1 generators for 2 samples; give one, or a"),
        ({"prompt": ["a", "b"], "generator": generators(3)}, "3 generators for 2 samples"),
    ],
)
def test_what_cannot_be_made_is_refused_in_one_line(
    pipeline: MHLAWanPipeline, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        pipeline(**arguments)
    assert "\n" not in str(caught.value)


def test_empty_texts_are_prompts_and_one_generator_serves_all(pipeline: MHLAWanPipeline) -> None:
    def generate(**arguments: Any) -> np.ndarray:
        return pipeline(num_inference_steps=1, guidance_scale=1.0, **arguments).frames

    assert len(generate(prompt="")) == 1
    assert len(generate(prompt="a", num_videos_per_prompt=None)) == 1
    assert len(generate(prompt=["", "a"], generator=generators(1)[0])) == 2
    both = generate(prompt=["a", "b"], generator=generators(2))
    first = generate(prompt=["a"], generator=generators(1))
    np.testing.assert_allclose(both[:1], first, atol=1e-4)


def test_a_whole_label_wins_over_a_name_among_others() -> None:
    names = ClassNames(
        {0: "pepper", 1: "salt, pepper", 2: "crane, bird", 3: "crane, machine", 4: "sea", 5: "sea"}
    )
    assert names.find(["pepper", "salt", "salt, pepper", "bird", 4], 6) == [0, 1, 1, 2, 4]
    assert ClassNames({1: "salt, pepper", 0: "pepper"}).find("pepper", 2) == [0]
    with pytest.raises(ValueError, match="'crane' is a name of the classes 2 and 3: give the id"):
        names.find(["bird", "crane"], 6)
    with pytest.raises(ValueError, match="'sea' is a name of the classes 4 and 5: give the id"):
        names.find("sea", 6)


@pytest.mark.parametrize("labels", [[0.5], [None], [[0, 1.5]]], ids=str)
def test_labels_of_another_form_are_refused(labels: Any) -> None:
    with pytest.raises(ValueError, match="class labels are names or ids, got"):
        ClassNames({0: "a", 1: "b"}).find(labels, 2)


def test_lists_in_lists_are_one_list_as_for_the_stock_pipeline() -> None:
    names = ClassNames({0: "a", 1: "b"})
    assert names.find([["a"], [1]], 2) == names.find([torch.tensor([0, 1])], 2) == [0, 1]


def test_ids_of_numpy_and_torch_are_ids() -> None:
    names = ClassNames({0: "a", 1: "b"})
    assert names.find(torch.tensor([1, 0]), 2) == names.find(np.array([1, 0]), 2) == [1, 0]


def test_no_steps_are_refused_for_images(make_pipeline: Callable[..., MHLADiTPipeline]) -> None:
    with pytest.raises(ValueError, match="num_inference_steps must be at least 1, got 0"):
        make_pipeline()("cat", num_inference_steps=0)


def test_guidance_that_is_no_number_is_refused(
    make_pipeline: Callable[..., MHLADiTPipeline], pipeline: MHLAWanPipeline
) -> None:
    for number in (float("nan"), float("inf")):
        for call in (
            lambda x: make_pipeline(vae=False)([0], guidance_scale=x),
            lambda x: pipeline("a", guidance_scale=x),
        ):
            with pytest.raises(ValueError, match=f"guidance_scale must be a finite number, got {number}"):
                call(number)


def test_the_class_of_no_class_is_out_of_range() -> None:
    with pytest.raises(ValueError, match="class id 2 is out of range: the model knows 0 to 1"):
        ClassNames({0: "a", 1: "b"}).find(2, 2)
