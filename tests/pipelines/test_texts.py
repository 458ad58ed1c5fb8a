"""Texts as embeddings: of every kind of text encoder, the same as diffusers' pipelines have them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PixArtSigmaPipeline, SanaPipeline, StableDiffusionPipeline, WanPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from mhla_diffusion import MHLAWanPipeline
from mhla_diffusion.pipelines.text import encode_texts, long_prompts, prepare_tokenizer
from tests.text_encoders import KINDS, POSITIONS, WIDTH, make_text_parts

PROMPTS = ["a Red car ", "two dogs, and no end of it", ""]


def without_filling(parts: dict[str, Any], text: str, length: int) -> torch.Tensor:
    """Embed the tokens of one text alone."""
    ids = parts["tokenizer"](text, truncation=True, max_length=length)["input_ids"]
    if not ids:
        return torch.zeros(0, WIDTH)
    return parts["text_encoder"](torch.tensor([ids])).last_hidden_state[0]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_those_of_the_text_alone_whatever_it_is_filled_up_with(kind: str) -> None:
    parts = make_text_parts(kind)
    found, mask = encode_texts(**parts, texts=PROMPTS, max_length=12)
    assert (found.shape, mask.shape) == ((3, 12, WIDTH), (3, 12))
    assert found.isfinite().all()
    for prompt, embeddings, shown in zip(PROMPTS, found, mask, strict=True):
        expected = without_filling(parts, prompt.lower().strip(), 12)
        assert shown.tolist() == [1] * len(expected) + [0] * (12 - len(expected))
        torch.testing.assert_close(embeddings[: len(expected)], expected)
    assert mask.sum(dim=1).tolist()[1] == 12, "cut there"


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_videos_take_decoders_as_well(kind: str) -> None:
    """Decoders' tokenizers fill up at the beginning, where diffusers' Wan would take the embeddings from."""
    parts = make_text_parts(kind)
    pipeline = MHLAWanPipeline(**parts, scheduler=None)
    found, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False, max_sequence_length=12)
    for prompt, embeddings in zip(PROMPTS, found, strict=True):
        expected = without_filling(parts, prompt.strip(), 12)
        torch.testing.assert_close(embeddings[: len(expected)], expected)
        assert not embeddings[len(expected) :].any()


@torch.no_grad()
@pytest.mark.parametrize("instruction", ["", "say it: "])
def test_gemma_embeds_as_in_the_pipeline_of_sana(instruction: str) -> None:
    parts = make_text_parts("gemma")
    theirs = SanaPipeline(**parts, vae=None, transformer=None, scheduler=None)
    embeddings, mask, negative, negative_mask = theirs.encode_prompt(
        PROMPTS, negative_prompt="no", device=torch.device("cpu"), max_sequence_length=20,
        complex_human_instruction=[instruction] if instruction else None,
    )  # fmt: skip
    found = encode_texts(**make_text_parts("gemma"), texts=PROMPTS, max_length=20, instruction=instruction)
    assert torch.equal(found[0], embeddings)
    assert torch.equal(found[1], mask)
    found = encode_texts(**make_text_parts("gemma"), texts=["no"] * 3, max_length=20)
    assert torch.equal(found[0], negative)
    assert torch.equal(found[1], negative_mask)


@torch.no_grad()
def test_t5_embeds_as_in_the_pipelines_of_pixart_and_wan() -> None:
    parts = make_text_parts("t5")
    theirs = PixArtSigmaPipeline(**parts, vae=None, transformer=None, scheduler=None)
    expected = theirs.encode_prompt(PROMPTS, device="cpu", max_sequence_length=20)
    found = encode_texts(**parts, texts=PROMPTS, max_length=20)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    arguments = {"negative_prompt": ["a", "b", "c"], "num_videos_per_prompt": 2, "max_sequence_length": 20}
    wan = WanPipeline(**parts, vae=None, scheduler=None).encode_prompt(PROMPTS, **arguments)
    ours = MHLAWanPipeline(**parts, scheduler=None).encode_prompt(PROMPTS, **arguments)
    assert all(torch.equal(*pair) for pair in zip(ours, wan, strict=True))


@torch.no_grad()
def test_clip_embeds_as_in_the_pipeline_of_stable_diffusion() -> None:
    """That shows the model what it is filled up with, which no token of the text before it sees."""
    parts = make_text_parts("clip")
    parts["tokenizer"].model_max_length = 20
    theirs = StableDiffusionPipeline(
        **parts, vae=None, unet=None, scheduler=None, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    expected, _ = theirs.encode_prompt(PROMPTS, torch.device("cpu"), 1, do_classifier_free_guidance=False)
    found, mask = encode_texts(**parts, texts=PROMPTS, max_length=20)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("kind", KINDS)
def test_texts_longer_than_the_positions_of_an_encoder_are_refused(kind: str) -> None:
    parts = make_text_parts(kind)
    limit = {"t5": None, "roberta": POSITIONS - 2}.get(kind, POSITIONS)
    assert encode_texts(**parts, texts=["a" * 99], max_length=limit or 90)[1].all(), "cut"
    if limit is None:
        return
    for length, instruction in ((limit + 1, ""), (limit - 20, "a text of many letters that stands before")):
        with pytest.raises(ValueError, match=rf"are longer than the {limit} that .* has positions for"):
            encode_texts(**parts, texts=["a"], max_length=length, instruction=instruction)


def test_a_tokenizer_is_saved_as_it_was_used(tmp_path: Path) -> None:
    for kind in KINDS:
        parts = make_text_parts(kind)
        encode_texts(**parts, texts=["a"], max_length=8)
        parts["tokenizer"].save_pretrained(tmp_path / kind)
        again = AutoTokenizer.from_pretrained(tmp_path / kind)
        assert (again.padding_side, again.pad_token) == ("right", parts["tokenizer"].pad_token)


TOKENIZERS = {kind: make_text_parts(kind)["tokenizer"] for kind in KINDS}
for tokenizer in TOKENIZERS.values():
    prepare_tokenizer(tokenizer)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=12) | st.text("ab .,\n\t<s>", max_size=12)), st.integers(1, 12))
def test_long_texts_are_those_of_more_tokens(texts: list[str], length: int) -> None:
    for tokenizer in TOKENIZERS.values():
        expected = [text for text in dict.fromkeys(texts) if len(tokenizer(text)["input_ids"]) > length]
        assert long_prompts(texts, tokenizer, length) == expected
        tokenizer(["a"], truncation=True, max_length=2, padding="max_length")  # which it remembers


def test_texts_that_are_cut_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    from mhla_diffusion.training.text import CaptionEncoder

    with caplog.at_level(logging.WARNING):
        encoder = CaptionEncoder(
            lambda caption: torch.zeros(0),
            tokenizer=TOKENIZERS["gemma"],
            text_encoder=None,
            max_length=POSITIONS,
        )
        assert encoder.warn_of_long(["a" * 99, "b", "a" * 99]) == 1
    assert "1 of 2 captions have more than text.max_length 64 tokens and are cut there" in caplog.text
