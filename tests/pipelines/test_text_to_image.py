"""Images of texts: the same as diffusers' pipelines make, and in pixels, where they make none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    SanaPipeline,
)

from mhla_diffusion import (
    MHLAConfig,
    MHLAPipeline,
    MHLAPixArtTransformer2DModel,
    MHLASanaTransformer2DModel,
    MHLATextToImagePipeline,
    convert_to_mhla,
)
from mhla_diffusion.pipelines.generation import generate_images
from mhla_diffusion.pipelines.text import SANA_INSTRUCTION, encode_texts

SHAPE: dict[str, Any] = {
    "num_attention_heads": 3, "attention_head_dim": 8, "num_layers": 1, "sample_size": 8, "patch_size": 2,
    "caption_channels": 16, "cross_attention_dim": 24,
}  # fmt: skip
PROMPTS = ["A red Car ", "two dogs"]


def randomize(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter, -0.3, 0.3)


@pytest.fixture
def make(text_parts: dict[str, Any], make_vae: Callable[[], AutoencoderKL]) -> Callable[..., Any]:
    """``make(channels=4, vae=True, conditions=False)``: a small PixArt that predicts noise and variance."""

    def make(channels: int = 4, *, vae: bool = True, conditions: bool = False) -> MHLATextToImagePipeline:
        transformer = MHLAPixArtTransformer2DModel(
            **SHAPE, in_channels=channels, out_channels=2 * channels, use_additional_conditions=conditions,
            mhla_config={"blocks": 4},
        ).eval()  # fmt: skip
        randomize(transformer)
        pipeline = MHLATextToImagePipeline(
            **text_parts, transformer=transformer, scheduler=DDIMScheduler(clip_sample=False),
            vae=make_vae() if vae else None, max_sequence_length=12,
        )  # fmt: skip
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return make


def call(pipeline: Any, **settings: Any) -> torch.Tensor:
    return pipeline(
        PROMPTS,
        generator=torch.Generator().manual_seed(1),
        num_inference_steps=3,
        output_type="pt",
        **settings,
    ).images


@pytest.mark.parametrize("conditions", [False, True])
def test_it_makes_what_the_pipelines_of_pixart_make(
    make: Callable[..., Any], conditions: bool, assert_close: Callable[..., None]
) -> None:
    ours = make(conditions=conditions)
    parts = {name: part for name, part in ours.components.items() if name != "id2label"}
    theirs = (PixArtAlphaPipeline if conditions else PixArtSigmaPipeline)(**parts)
    theirs.set_progress_bar_config(disable=True)
    size = {"height": 16, "width": 24, "negative_prompt": "a cat", "guidance_scale": 3.0}
    options = {"max_sequence_length": 12, "use_resolution_binning": False, "clean_caption": False}
    if conditions:
        # diffusers asks its sample_size whether to tell the size, and knows one that does.
        theirs.transformer.register_to_config(sample_size=128)
        expected = call(theirs, **size, **options)
        theirs.transformer.register_to_config(sample_size=8)
    else:
        expected = call(theirs, **size, **options)
    assert_close(call(ours, **size), expected)


@torch.no_grad()
@pytest.mark.parametrize("instruction", ["", SANA_INSTRUCTION])
def test_texts_are_embedded_as_sana_does(
    text_parts: dict[str, Any], sana_pipeline: SanaPipeline, instruction: str
) -> None:
    expected = sana_pipeline.encode_prompt(
        PROMPTS, do_classifier_free_guidance=False, max_sequence_length=12,
        complex_human_instruction=instruction.split("\n") if instruction else None,
    )  # fmt: skip
    found = encode_texts(**text_parts, texts=PROMPTS, max_length=12, instruction=instruction)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert found[1].sum() > 0


def test_a_sana_in_pixels_is_saved_and_generates_from_files_of_prompts(
    text_parts: dict[str, Any], tmp_path: Path
) -> None:
    transformer = MHLASanaTransformer2DModel(
        **SHAPE, in_channels=3, out_channels=3, num_cross_attention_heads=3, cross_attention_head_dim=8,
        mhla_config={"blocks": 4},
    ).eval()  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    pipeline = MHLATextToImagePipeline(
        **text_parts,
        transformer=transformer,
        scheduler=scheduler,
        max_sequence_length=12,
        training={"data": "x"},
    )
    pipeline.save_pretrained(tmp_path / "model")
    loaded = MHLAPipeline.from_pretrained(tmp_path / "model")
    for each in (loaded, pipeline):
        each.set_progress_bar_config(disable=True)
    assert torch.equal(call(pipeline), call(loaded))
    assert call(loaded, height=4, width=12).shape == (2, 3, 4, 12)
    assert "| text encoder | UMT5EncoderModel, 12 tokens |" in (tmp_path / "model" / "README.md").read_text()
    manifest = generate_images(loaded, tmp_path / "out", prompts=PROMPTS, per_prompt=2, num_inference_steps=1)
    assert len(list(manifest.parent.glob("*.png"))) == 4


def test_guidance_moves_away_from_the_negative_prompt(make: Callable[..., Any]) -> None:
    pipeline = make(3, vae=False)
    plain, guided = call(pipeline, guidance_scale=1.0), call(pipeline, guidance_scale=4.0)
    assert not torch.equal(plain, guided)
    away = call(pipeline, guidance_scale=4.0, negative_prompt="a cat")
    assert not torch.equal(guided, away)
    for one in (["a cat"], ("a cat",), ("a cat",) * len(PROMPTS)):
        assert torch.equal(away, call(pipeline, guidance_scale=4.0, negative_prompt=one))
    assert torch.equal(plain, call(pipeline, guidance_scale=1.0, negative_prompt="a cat"))


def test_one_row_of_negative_embeddings_stands_for_all(
    make: Callable[..., Any], text_parts: dict[str, Any]
) -> None:
    pipeline = make(3, vae=False)
    embeddings, mask = encode_texts(**text_parts, texts=["a cat"], max_length=12)
    given = {"negative_prompt_embeds": embeddings, "negative_prompt_attention_mask": mask}
    away = call(pipeline, guidance_scale=4.0, negative_prompt="a cat")
    assert torch.equal(away, call(pipeline, guidance_scale=4.0, **given))


def test_embeddings_stand_for_prompts(make: Callable[..., Any], text_parts: dict[str, Any]) -> None:
    pipeline = make(3, vae=False)
    embeddings, mask = encode_texts(**text_parts, texts=PROMPTS, max_length=12)
    images = pipeline(
        prompt_embeds=embeddings, prompt_attention_mask=mask, generator=torch.Generator().manual_seed(1),
        num_inference_steps=3, output_type="pt",
    ).images  # fmt: skip
    assert torch.equal(images, call(pipeline))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": None}, "give a prompt or prompt_embeds"),
        ({"prompt": []}, "nothing to generate"),
        ({"prompt": ()}, "nothing to generate"),
        ({"prompt": 3}, "a prompt must be a text or a list of texts, got 3"),
        ({"negative_prompt": [None]}, r"a prompt must be a text or a list of texts, got \[None\]"),
        ({"negative_prompt": 3}, r"a prompt must be a text or a list of texts, got \[3\]"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be at least 1, got 0"),
        ({"max_sequence_length": 0}, "max_sequence_length must be at least 1, got 0"),
        ({"negative_prompt": ["a", "b", "c"]}, "3 negative prompts for 1 prompts"),
        ({"height": 7}, r"multiples of 2, got 7 x 8"),
        ({"generator": [torch.Generator()] * 2}, "2 generators for 1 samples"),
        ({"output_type": "jpg"}, "output_type 'jpg' is not one of"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    make: Callable[..., Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(3, vae=False)(**{"prompt": "a", **settings})


def test_long_prompts_are_named(make: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    make(3, vae=False)("abcdefghijklmnopq", num_inference_steps=1)
    assert "cut after max_sequence_length 12 tokens: 'abcdefghijklmnopq'" in caplog.text


def test_a_converted_pixart_stays_with_the_pipeline_of_diffusers(
    make: Callable[..., Any], tmp_path: Path
) -> None:
    ours = make()
    stock = PixArtSigmaPipeline(
        **{**ours.components, "transformer": convert_to_mhla(ours.transformer, MHLAConfig(blocks=4))}
    )
    stock.save_pretrained(tmp_path)
    assert type(MHLAPipeline.from_pretrained(tmp_path)) is PixArtSigmaPipeline
