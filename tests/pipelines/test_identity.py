"""Hashes that tell one pipeline from another."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from mhla_diffusion.pipelines.identity import (
    component_sha256,
    describe,
    mark_converted,
    training_of,
    weights_sha256,
)
from tests.backbones.cases import CASES


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8])
def test_weights_of_every_dtype_are_hashed_as_they_lie_in_memory(dtype: torch.dtype) -> None:
    def model(value: float) -> nn.Module:
        module = nn.Module()
        weight = torch.full((2, 3), value).to(dtype)
        module.register_buffer("weight", weight.t())  # not contiguous
        module.register_buffer("scale", torch.tensor(value).to(dtype))  # no axes
        return module

    assert weights_sha256(model(1)) == weights_sha256(model(1))
    assert weights_sha256(model(1)) != weights_sha256(model(2))
    plain = nn.Module()
    plain.register_buffer("weight", torch.arange(6.0).reshape(2, 3))
    bytes_ = torch.arange(6.0).numpy().tobytes()
    assert weights_sha256(plain) == hashlib.sha256(b"weight" + bytes_).hexdigest(), "as manifests have it"


def test_weights_made_of_several_tensors_count_by_each_of_them() -> None:
    """As quantisation leaves them: numbers, and their scales."""

    def model(values: float, scale: float) -> nn.Module:
        module = nn.Module()
        module.register_buffer("weight", TwoTensor(torch.full((4,), values), torch.full((4,), scale)))
        return module

    assert weights_sha256(model(1, 2)) == weights_sha256(model(1, 2))
    assert len({weights_sha256(model(*pair)) for pair in ((1, 2), (1, 3), (2, 2))}) == 3


def test_the_adapters_that_act_and_their_strength_count() -> None:
    model = CASES["DiT"].make()
    plain = weights_sha256(model)
    for name in ("a", "b"):
        torch.manual_seed(0)
        model.add_adapter(
            LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), adapter_name=name
        )
    found = [plain]
    for active, strength in (("a", 1.0), ("a", 0.5), ("b", 1.0), (["a", "b"], [1.0, 1.0])):
        model.set_adapters(active, strength)
        found.append(weights_sha256(model))
        assert weights_sha256(model) == found[-1]
    model.disable_lora()
    found.append(weights_sha256(model))
    assert len(set(found)) == len(found)


def test_weights_that_are_not_in_memory_are_refused() -> None:
    with pytest.raises(ValueError, match=r"weight is not in memory \(device meta\)"):
        weights_sha256(nn.Linear(2, 2, bias=False, device="meta"))


def test_a_tokenizer_is_the_same_after_use_and_another_with_another_vocabulary(
    text_parts: dict[str, Any],
) -> None:
    tokenizer = text_parts["tokenizer"]
    other = copy.deepcopy(tokenizer)
    before = component_sha256(tokenizer)
    tokenizer(["a cat"], padding="max_length", max_length=4, truncation=True)
    assert component_sha256(tokenizer) == before
    other.add_tokens(["cat"])
    assert component_sha256(other) != before


def test_what_was_converted_does_not_say_that_it_was_trained(make_pipeline: Callable[..., Any]) -> None:
    facts = {"data": "30 photographs", "trained": "all weights", "base model": "someone/base"}
    pipeline = make_pipeline(training=facts)
    mark_converted(pipeline, "someone/stock")
    assert training_of(pipeline) == {"data": "30 photographs", "converted from": "someone/stock"}


def test_every_component_is_described_once(make_stock_video_pipeline: Callable[[str], Any]) -> None:
    described = describe(make_stock_video_pipeline("wan-image"))
    assert described["components"].keys() == {
        "tokenizer", "text_encoder", "vae", "image_encoder", "image_processor",
    }  # fmt: skip
    assert described["pipeline"] == {
        "class": "WanImageToVideoPipeline", "boundary_ratio": None, "expand_timesteps": False,
    }  # fmt: skip
    second = make_stock_video_pipeline("wan2.2")
    expected = describe(second)["components"]["transformer_2"]
    alone = copy.copy(second)
    alone.register_modules(transformer=None)
    found = describe(alone)
    assert found["weights_sha256"] == weights_sha256(second.transformer_2)
    assert expected == component_sha256(second.transformer_2)
    assert "transformer_2" not in found["components"]


def test_where_a_pipeline_was_loaded_from_makes_no_difference(
    make_stock_video_pipeline: Callable[[str], Any], tmp_path: Any
) -> None:
    pipeline = make_stock_video_pipeline("wan-image")
    pipeline.save_pretrained(tmp_path)
    again = type(pipeline).from_pretrained(tmp_path)
    old, new = describe(pipeline), describe(again)
    for key in ("config_sha256", "weights_sha256", "components", "pipeline"):
        assert new[key] == old[key], key
