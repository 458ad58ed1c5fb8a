"""What the model is told of a sample, what is dropped, and what the card says of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from mhla_diffusion.pipelines.video import MHLAWanPipeline
from mhla_diffusion.training import TextConfig
from mhla_diffusion.training.conditioning import Captions, ClassLabels
from mhla_diffusion.training.text import (
    CaptionEncoder,
    EmbeddedText,
    image_caption_encoder,
    video_caption_encoder,
)
from tests.text_encoders import make_text_parts


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


@pytest.fixture(params=["images", "videos"])
def encoder(request: pytest.FixtureRequest, text_parts: dict[str, Any]) -> CaptionEncoder:
    if request.param == "images":
        return image_caption_encoder(**text_parts, config=TextConfig("x", max_length=8))
    parts = MHLAWanPipeline(
        **text_parts, vae=None, scheduler=FlowMatchEulerDiscreteScheduler(), max_sequence_length=8
    )
    return video_caption_encoder(parts)


def test_a_share_of_the_labels_becomes_the_null_class() -> None:
    labels = torch.arange(400) % 2
    conditioning = ClassLabels(["cat", "dog"], null_label=2, dropout=0.25)
    given = conditioning.arguments({"class_labels": labels}, generators(400))["class_labels"]
    dropped = given == 2
    assert torch.equal(given[~dropped], labels[~dropped])
    assert dropped.float().mean() == pytest.approx(0.25, abs=0.06)
    again = conditioning.arguments({"class_labels": labels[:9]}, generators(9))["class_labels"]
    assert torch.equal(again, given[:9]), "each sample's draw is its own"


def test_captions_become_embeddings_and_dropped_ones_that_of_the_empty_text(encoder: CaptionEncoder) -> None:
    captions = ["abc", "xyz"] * 20
    whole = Captions([encoder], 0.0).arguments({"caption": captions}, generators(40))["encoder_hidden_states"]
    some = Captions([encoder], 0.5).arguments({"caption": captions}, generators(40))["encoder_hidden_states"]
    empty = Captions([encoder], 0.0).arguments({"caption": [""]}, generators(1))["encoder_hidden_states"][0]
    assert whole.shape == (40, 8, 16)
    assert torch.equal(whole[0], whole[2])
    assert not torch.equal(whole[0], whole[1])
    kept = [torch.equal(a, b) for a, b in zip(some, whole, strict=True)]
    assert 0 < sum(kept) < 40
    assert all(torch.equal(row, empty) for row, keep in zip(some, kept, strict=True) if not keep)


def test_labels_and_captions_drop_the_same_samples(encoder: CaptionEncoder) -> None:
    labels = torch.zeros(30, dtype=torch.long)
    null = ClassLabels(["cat"], null_label=1, dropout=0.4).arguments({"class_labels": labels}, generators(30))
    texts = torch.ones(30, 8, 16)
    text = Captions([encoder], 0.4, embedded=True).arguments(
        {"text": texts, "tokens": torch.full((30,), 8)}, generators(30)
    )
    kept = (text["encoder_hidden_states"] == 1).all(dim=2).all(dim=1)
    assert torch.equal(kept, null["class_labels"] == 0)


def test_only_an_encoder_that_is_used_in_training_moves(encoder: CaptionEncoder) -> None:
    Captions([encoder], 0.1, embedded=True).to(torch.device("meta"))
    assert encoder.text_encoder.device.type == "cpu"
    Captions([encoder], 0.1).to(torch.device("meta"))
    assert encoder.text_encoder.device.type == "meta"


def test_facts_for_the_card(encoder: CaptionEncoder) -> None:
    assert ClassLabels(["a", "b"], 2, 0.1).facts("x, 5 samples") == {
        "data": "x, 5 samples of 2 classes", "class dropout": 0.1,
    }  # fmt: skip
    assert Captions([encoder], 0.2).facts("x, 5 samples") == {"data": "x, 5 samples", "caption dropout": 0.2}


def test_without_its_condition_a_caption_is_the_empty_one(encoder: CaptionEncoder) -> None:
    conditioning = Captions([encoder], 0.0, masked=True)
    arguments = {**conditioning.arguments({"caption": ["abc", "ab"]}, generators(2)), "other": 3}
    empty = conditioning.arguments({"caption": ["", ""]}, generators(2))
    found = conditioning.unconditional(arguments)
    assert found["other"] == 3
    assert all(torch.equal(found[name], empty[name]) for name in empty)
    assert not torch.equal(arguments["encoder_attention_mask"], found["encoder_attention_mask"])


@pytest.fixture
def t5() -> CaptionEncoder:
    return image_caption_encoder(*make_text_parts("t5").values(), config=TextConfig("x", max_length=8))


def test_each_sample_is_given_its_own_images(t5: CaptionEncoder) -> None:
    images = torch.rand(2, 2, 3, 4)  # two samples of two images
    batch = {"text": torch.ones(2, 8, 16), "tokens": torch.tensor([8, 8]), "image_embeds": images}
    found = Captions([t5], 0.0, embedded=True).arguments(batch, generators(2))
    assert torch.equal(found["encoder_hidden_states_image"].unflatten(0, (2, 2)), images)


def test_a_caption_is_dropped_for_all_encoders_or_for_none(t5: CaptionEncoder) -> None:
    second = copy.copy(t5)
    second.number = 1
    batch = {}
    for suffix in ("", "_2"):
        batch |= {f"text{suffix}": torch.ones(40, 8, 16), f"tokens{suffix}": torch.full((40,), 8)}
    found = Captions([t5, second], 0.5, embedded=True).arguments(batch, generators(40))
    kept = [(found[f"encoder_hidden_states{suffix}"] == 1).all((1, 2)) for suffix in ("", "_2")]
    assert torch.equal(*kept)
    assert 0 < kept[0].sum() < 40


def test_captions_are_encoded_again_on_another_device(t5: CaptionEncoder) -> None:
    calls: list[int] = []
    t5.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    t5("abc")
    t5("abc")
    assert len(calls) == 1
    t5.to(torch.device("cpu"))
    t5("abc")
    assert len(calls) == 2


def test_the_empty_text_keeps_what_fills_it_up_where_it_is_no_longer(t5: CaptionEncoder) -> None:
    filled = EmbeddedText(torch.ones(4, 16), 2)  # two tokens, and two rows beyond them
    t5._empty = lambda: filled
    found = [t5.empty_for(EmbeddedText(torch.zeros(4, 16), tokens)) for tokens in (1, 2, 3)]
    assert [(len(its.values), its.tokens) for its in found] == [(1, 1), (4, 2), (4, 2)]
