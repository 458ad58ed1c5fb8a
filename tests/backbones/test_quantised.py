"""Weights that are no plain tensors, and files that hold none of ours."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import TorchAoConfig, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch.testing._internal.two_tensor import TwoTensor

from mhla_diffusion import MHLAWanTransformer3DModel, convert_to_mhla
from mhla_diffusion.pipelines.identity import weights_sha256

from .cases import CASES, Case, randomize, sample

CONFIG = {"blocks": [1, 2, 2], "gate": True}
WIDE = {**CASES["Wan"].settings, "attention_head_dim": 64, "ffn_dim": 128, "freq_dim": 32, "text_dim": 32}


def int8() -> TorchAoConfig:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def in_bfloat16(model: Any) -> dict[str, Any]:
    return {
        key: value.bfloat16() if value.is_floating_point() else value
        for key, value in model.example_inputs((2, 4, 4)).items()
    }


@torch.no_grad()
def test_a_quantised_model_is_converted_saved_and_loaded(tmp_path: Path) -> None:
    quantised = int8()
    stock = WanTransformer3DModel(**WIDE).bfloat16()
    randomize(stock)
    stock.save_pretrained(tmp_path / "stock")
    loaded = WanTransformer3DModel.from_pretrained(
        tmp_path / "stock", quantization_config=quantised, dtype=torch.bfloat16
    )
    model = convert_to_mhla(loaded, CONFIG)
    inputs = in_bfloat16(model)
    expected, codes = sample(model, inputs), weights_sha256(model)
    model.save_pretrained(tmp_path / "converted")
    again = MHLAWanTransformer3DModel.from_pretrained(tmp_path / "converted", dtype=torch.bfloat16)
    assert type(again.blocks[0].attn1.to_q.weight).__name__ == "Int8Tensor"
    assert torch.equal(sample(again, inputs), expected)
    assert weights_sha256(again) == codes


@torch.no_grad()
def test_a_model_of_ours_is_quantised_on_loading(tmp_path: Path) -> None:
    quantised = int8()
    model = MHLAWanTransformer3DModel(**WIDE, mhla_config=CONFIG, sample_grid=(2, 4, 4)).bfloat16()
    randomize(model)
    model.save_pretrained(tmp_path / "plain")
    loaded = MHLAWanTransformer3DModel.from_pretrained(
        tmp_path / "plain", quantization_config=quantised, dtype=torch.bfloat16
    )
    inputs = in_bfloat16(model)
    expected, found = (sample(each, inputs).float() for each in (model, loaded))
    assert 0 < (found - expected).norm() / expected.norm() < 0.1
    loaded.save_pretrained(tmp_path / "int8")
    again = MHLAWanTransformer3DModel.from_pretrained(tmp_path / "int8", dtype=torch.bfloat16)
    assert torch.equal(sample(again, inputs).float(), found)


def test_layers_that_quantisation_replaced_are_not_converted(case: Case) -> None:
    stock = case.stock()
    stock.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(quant_method="bitsandbytes"))
    with pytest.raises(ValueError, match=r"quantised by bitsandbytes.*give quantization_config="):
        convert_to_mhla(stock, case.config())


def test_tensors_of_tensors_that_nobody_can_save_are_named(case: Case, tmp_path: Path) -> None:
    model = case.make()
    name = case.projections[0]
    layer = getattr(case.attention(getattr(model, case.layers)[0]), name)
    layer.weight = torch.nn.Parameter(TwoTensor(layer.weight.data, layer.weight.data), requires_grad=False)
    for refused in (
        lambda: model.save_pretrained(tmp_path / "out"),
        lambda: convert_to_mhla(model, case.config()),
    ):
        with pytest.raises(ValueError, match=rf"\.{name}\.weight is a TwoTensor.*quantization_config="):
            refused()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["Wan", "SkyReelsV2", "WanVACE", "LTXVideo"])
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_a_stock_model_of_one_file_is_converted(name: str, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    case = CASES[name]
    stock = case.stock()
    stock.save_pretrained(tmp_path)
    weights = str(tmp_path / "diffusion_pytorch_model.safetensors")
    arguments = {"config": str(tmp_path), "low_cpu_mem_usage": low_cpu_mem_usage}
    with pytest.raises(ValueError, match="single files hold stock models: give mhla_config="):
        case.model.from_single_file(weights, **arguments)
    model = case.model.from_single_file(weights, mhla_config=case.config(), **arguments)
    inputs = case.inputs(model)
    assert torch.equal(sample(model, inputs), sample(convert_to_mhla(stock, case.config()), inputs))
    part = load_file(weights)
    del part[sorted(part)[-1]]
    save_file(part, weights)
    with pytest.raises(ValueError, match=f"lacks weights of {case.model.stock.__name__}"):
        case.model.from_single_file(weights, mhla_config=case.config(), **arguments)
