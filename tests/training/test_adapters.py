"""Which weights are trained, and adapters that become part of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from mhla_diffusion import MHLADiTPipeline, MHLATextToImagePipeline, MHLAWanTransformer3DModel
from mhla_diffusion.training import LoraConfig
from mhla_diffusion.training.adapters import merge_adapters, save_adapters, set_trainable
from mhla_diffusion.training.stock import IMAGES, VIDEOS
from mhla_diffusion.training.text import make_stock_pipeline
from tests.backbones.cases import CASES, Case, sample
from tests.text_encoders import make_text_parts


@pytest.fixture
def model() -> MHLAWanTransformer3DModel:
    return MHLAWanTransformer3DModel(
        patch_size=(2, 4, 4), in_channels=1, out_channels=1, num_layers=2, num_attention_heads=2,
        attention_head_dim=12, ffn_dim=32, text_dim=16, sample_grid=(2, 4, 4),
    )  # fmt: skip


def test_only_attention_is_trained_when_asked(model: MHLAWanTransformer3DModel) -> None:
    set_trainable(model, "attention", LoraConfig())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".attn1." in name}
    assert trained


def test_merged_adapters_are_the_same_function(model: MHLAWanTransformer3DModel) -> None:
    nn.init.normal_(model.proj_out.weight)
    arguments = (torch.randn(1, 1, 4, 16, 16), torch.tensor([500.0]), torch.randn(1, 5, 16))
    plain = model(*arguments).sample
    names = set(model.state_dict())
    set_trainable(model, "all", LoraConfig(rank=2, alpha=4))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    adapted = model(*arguments).sample
    assert not torch.allclose(adapted, plain, rtol=1e-2)
    merge_adapters(model)
    torch.testing.assert_close(model(*arguments).sample, adapted, rtol=1e-4, atol=1e-4)
    assert set(model.state_dict()) == names


def pipeline_of(case: Case, transformer: Any) -> Any:
    """The pipeline that a run of a backbone leaves; None where there is none, or it loads no adapters."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    if case.name == "DiT":
        return MHLADiTPipeline(transformer, scheduler)
    if case.name in ("PixArt", "Sana"):
        return MHLATextToImagePipeline(
            **make_text_parts("t5"), transformer=transformer, scheduler=scheduler, prediction_type="epsilon"
        )
    stock = {**IMAGES, **VIDEOS}.get(case.model)
    if stock is None and case.name != "Wan":
        return None
    pipeline = make_stock_pipeline(
        "WanPipeline" if stock is None else stock.pipeline, transformer=transformer
    )
    return pipeline if hasattr(pipeline, "load_lora_weights") else None


@pytest.mark.parametrize("name", CASES)
def test_adapters_and_attention_of_any_backbone_are_read_back_beside_the_model_they_were_trained_from(
    name: str, tmp_path: Path
) -> None:
    case, lora = CASES[name], LoraConfig(rank=2, alpha=4)
    base = case.make(mhla={"gate": True})
    trained = copy.deepcopy(base)
    set_trainable(trained, "all", lora)
    adapters = [name for name, _ in trained.named_parameters() if ".lora_" in name]
    assert adapters
    assert not any(case.model.attention_name in name.split(".") for name in adapters)
    inputs = case.inputs(trained, case.grids[3])
    optimizer = torch.optim.Adam((p for p in trained.parameters() if p.requires_grad), lr=0.1)
    sample(trained, inputs).square().mean().backward()
    optimizer.step()
    expected = sample(trained, inputs)
    save_adapters(trained, lora, tmp_path)

    ways: list[Callable[[Any], None]] = [lambda model: model.load_lora_adapter(tmp_path)]
    if pipeline_of(case, base) is not None:
        ways.append(lambda model: pipeline_of(case, model).load_lora_weights(tmp_path))
    for load in ways:
        model = copy.deepcopy(base)
        load(model)
        torch.testing.assert_close(sample(model, inputs), expected)
    plain = sample(base, inputs)
    assert not torch.allclose(plain, expected, rtol=1e-2, atol=1e-2)
    merge_adapters(trained)
    torch.testing.assert_close(sample(trained, inputs), expected, rtol=1e-3, atol=1e-3)
