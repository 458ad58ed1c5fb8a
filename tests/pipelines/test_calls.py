"""Arguments of a call mean what they mean to the pipelines of diffusers, to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import SanaPipeline
from diffusers.callbacks import SDCFGCutoffCallback
from torch import Tensor

from mhla_diffusion import (
    MHLAConfig,
    MHLASanaTransformer2DModel,
    MHLATextToImagePipeline,
    MHLAWanPipeline,
    convert_to_mhla,
)

PROMPTS = ["red", "two"]  # of as many tokens: SanaPipeline exchanges the masks of several images of a prompt
Pair = tuple[Any, Any]


def seeded(*seeds: int) -> Any:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return generators if len(seeds) > 1 else generators[0]


def randomize(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter, -0.3, 0.3)


class Noted:
    """Callback that keeps what it was given, changes it, and stops after the second step."""

    def __init__(self, names: list[str]) -> None:
        self.names, self.seen = names, dict[int, dict[str, Tensor]]()

    def __call__(self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
        assert list(tensors) == self.names
        given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        self.seen[step] = {name: tensor.clone() for name, tensor in given.items()}
        pipeline._interrupt = step == 1
        return {name: tensor * 0.9 for name, tensor in given.items()}


def require_same_calls(pair: Pair, calls: list[dict[str, Any]], **settings: Any) -> None:
    for arguments in calls:
        made = []
        for pipeline in pair:
            given = {name: value() if callable(value) else value for name, value in arguments.items()}
            made.append(pipeline(return_dict=False, **settings, **given)[0])
        assert torch.equal(*map(torch.as_tensor, made)), list(arguments)
        assert not torch.as_tensor(made[0]).isnan().any()


def require_same_callbacks(pair: Pair, **call: Any) -> None:
    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    made, seen = [], []
    for pipeline in pair:
        noted = Noted(names)
        made.append(
            pipeline(
                return_dict=False, generator=seeded(1), callback_on_step_end=noted,
                callback_on_step_end_tensor_inputs=names, **call,
            )[0]
        )  # fmt: skip
        seen.append(noted.seen)
    assert torch.equal(*made)
    assert [list(steps) for steps in seen] == [[0, 1], [0, 1]], "three steps were asked for"
    for ours, theirs in zip(*(steps.values() for steps in seen), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture
def sana_pair(sana_pipeline: SanaPipeline) -> Pair:
    """Ours, and diffusers' with the same parts."""
    transformer = MHLASanaTransformer2DModel(
        **{**sana_pipeline.transformer.config, "sample_size": 8}, mhla_config={"blocks": 4}
    ).eval()  # fmt: skip
    randomize(transformer)
    sana_pipeline.register_modules(transformer=transformer)
    ours = MHLATextToImagePipeline(**sana_pipeline.components, max_sequence_length=8)
    for pipeline in (ours, sana_pipeline):
        pipeline.set_progress_bar_config(disable=True)
    return ours, sana_pipeline


def sana_call(pipeline: Any, **call: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "prompt": PROMPTS, "height": 32, "width": 64, "num_inference_steps": 3, "guidance_scale": 3.0,
        "output_type": "latent",
    }  # fmt: skip
    if isinstance(pipeline, SanaPipeline):
        settings |= {
            "max_sequence_length": 8, "use_resolution_binning": False, "clean_caption": False,
            "complex_human_instruction": None,
        }  # fmt: skip
    return {**settings, **call}


class Called:
    """Pipeline with the settings that make two comparable."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline

    def __call__(self, **call: Any) -> Any:
        return self.pipeline(**sana_call(self.pipeline, **call))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_of_texts_take_what_sana_takes(sana_pair: Pair, dtype: torch.dtype) -> None:
    pair = Called(sana_pair[0].to(dtype)), Called(sana_pair[1].to(dtype))
    embeddings, mask, negative, negative_mask = sana_pair[1].encode_prompt(
        PROMPTS, negative_prompt="no", max_sequence_length=8
    )
    texts = {
        "prompt": None, "prompt_embeds": embeddings, "prompt_attention_mask": mask, "negative_prompt": None,
        "negative_prompt_embeds": negative, "negative_prompt_attention_mask": negative_mask,
    }  # fmt: skip
    noise = torch.randn(2, 4, 8, 16, generator=seeded(0))
    calls: list[dict[str, Any]] = [
        {"generator": lambda: seeded(1)},
        {"generator": lambda: seeded(1), "negative_prompt": "a cat"},
        {"generator": lambda: seeded(1), "negative_prompt": ["a cat", "no"], "guidance_scale": 1.0},
        {"generator": lambda: seeded(1, 2, 3, 4), "num_images_per_prompt": 2},
        {"latents": noise},
        {"latents": noise, **texts},
    ]
    if dtype == torch.float32:  # else diffusers' pixels are rounded once more
        calls += [{"latents": noise, "output_type": output_type} for output_type in ("np", "pt")]
    require_same_calls(pair, calls)


@torch.no_grad()
def test_times_are_those_that_sana_scales(sana_pair: Pair) -> None:
    call: dict[str, Any] = {"latents": torch.randn(2, 4, 8, 16, generator=seeded(0))}
    before = Called(sana_pair[0])(**call).images
    sana_pair[0].transformer.register_to_config(timestep_scale=0.01)  # which both have
    require_same_calls((Called(sana_pair[0]), Called(sana_pair[1])), [call])
    assert not torch.allclose(Called(sana_pair[0])(**call).images, before)
    model = sana_pair[0].transformer
    given = model.denoising_arguments(torch.zeros(1, 4, 8, 16), torch.tensor([500.0]), {})
    torch.testing.assert_close(given["timestep"], torch.tensor([5.0]))
    drawn = model.at_time(model.example_inputs((4, 8)), 500.0)
    torch.testing.assert_close(drawn["timestep"], torch.tensor([5.0]))


@torch.no_grad()
def test_callbacks_of_images_of_texts_are_those_of_sana(sana_pair: Pair) -> None:
    require_same_callbacks((Called(sana_pair[0]), Called(sana_pair[1])), negative_prompt="a cat")
    require_same_callbacks((Called(sana_pair[0]), Called(sana_pair[1])), guidance_scale=1.0)


def test_guidance_can_be_cut_off(sana_pair: Pair) -> None:
    """In SanaPipeline it cannot: the mask of the negative prompt stays."""
    call = {**sana_call(sana_pair[0]), "prompt": "red", "latents": torch.randn(1, 4, 8, 16)}
    cut = SDCFGCutoffCallback(cutoff_step_ratio=0.0)
    made = sana_pair[0](**call, callback_on_step_end=cut).images
    assert made.isfinite().all()
    assert not torch.equal(made, sana_pair[0](**call).images)
    with pytest.raises(ValueError, match="returned prompt_embeds of 1 rows for 2 images; give 2, or 4"):
        sana_pair[0](**sana_call(sana_pair[0]), callback_on_step_end=cut)


def test_without_a_text_encoder_embeddings_do(sana_pair: Pair) -> None:
    ours, _ = sana_pair
    text = torch.randn(1, 8, 16)
    call = {**sana_call(ours), "prompt": None, "prompt_embeds": text, "latents": torch.randn(1, 4, 8, 16)}
    expected = ours(**call, negative_prompt_embeds=text).images
    ours.register_modules(text_encoder=None, tokenizer=None)
    assert torch.equal(ours(**call, negative_prompt_embeds=text).images, expected)
    assert ours(**{**call, "guidance_scale": 1.0}).images.isfinite().all()
    for wrong, message in (
        ({"prompt": "red"}, "give a prompt or its embeddings, not both"),
        ({"negative_prompt": "no", "negative_prompt_embeds": text}, "not both"),
        ({"negative_prompt_embeds": text[:, :4]}, r"one shape, got \(1, 8, 16\) and \(1, 4, 16\)"),
        ({"prompt_attention_mask": torch.ones(1, 4)}, r"the mask must be \(1, 8\), .* got \(1, 4\)"),
        ({}, "this pipeline has no text encoder: give prompt_embeds"),
    ):
        with pytest.raises(ValueError, match=message):
            ours(**{**call, **wrong})


def small(pipeline: Any) -> Callable[..., Any]:
    settings: dict[str, Any] = {
        "prompt": PROMPTS, "height": 16, "width": 32, "num_frames": 5, "num_inference_steps": 3,
        "max_sequence_length": 8, "guidance_scale": 3.0, "output_type": "latent",
    }  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return lambda **call: pipeline(**{**settings, **call})


@torch.no_grad()
def test_videos_take_what_wan_takes(make_stock_video_pipeline: Callable[..., Any]) -> None:
    stock = make_stock_video_pipeline("wan")
    randomize(stock.transformer)
    parts = {name: part for name, part in stock.components.items() if part is not None}
    softmax = convert_to_mhla(stock.transformer, MHLAConfig(layers=()))
    pair = small(MHLAWanPipeline(**{**parts, "transformer": softmax})), small(stock)
    embeddings, negative = stock.encode_prompt(PROMPTS, negative_prompt="no", max_sequence_length=8)
    noise = torch.randn(2, 4, 2, 2, 4, generator=seeded(0))
    calls: list[dict[str, Any]] = [
        {"generator": lambda: seeded(1), "negative_prompt": "a cat"},
        {"generator": lambda: seeded(1), "guidance_scale": 1.0},
        {"generator": lambda: seeded(1, 2, 3, 4), "num_videos_per_prompt": 2},
        {"latents": noise},
        {"latents": noise, "prompt": None, "prompt_embeds": embeddings, "negative_prompt_embeds": negative},
        {"latents": noise, "attention_kwargs": {}},
        {"latents": noise, "output_type": "np"},
        {"latents": noise, "output_type": "pt"},
    ]
    require_same_calls(pair, calls)
    require_same_callbacks(pair, negative_prompt="a cat")


@torch.no_grad()
def test_videos_of_images_are_those_of_wan(make_stock_video_pipeline: Callable[..., Any]) -> None:
    stock = make_stock_video_pipeline("wan-image")
    randomize(stock.transformer)
    softmax = convert_to_mhla(stock.transformer, MHLAConfig(layers=()))
    pair = small(type(stock)(**{**stock.components, "transformer": softmax})), small(stock)
    settings = {"image": torch.rand(1, 3, 16, 32, generator=seeded(0)), "prompt": "red"}
    calls: list[dict[str, Any]] = [
        {"generator": lambda: seeded(1)},
        {"generator": lambda: seeded(1), "guidance_scale": 1.0, "output_type": "np"},
    ]
    require_same_calls(pair, calls, **settings)
    require_same_callbacks(pair, **settings)
    # Which diffusers takes in place of the image, and then misses that.
    for pipeline in pair:
        with pytest.raises(ValueError, match="Cannot forward both `image`"):
            pipeline(**settings, image_embeds=torch.randn(1, 5, 16))
