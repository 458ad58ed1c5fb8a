"""Weights that are no plain tensors, and files that hold none of ours."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, TorchAoConfig, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

from mhla_diffusion import MHLA, MHLADiTTransformer2DModel, MHLAWanTransformer3DModel, convert_to_mhla
from mhla_diffusion.analysis import analyze_stored
from mhla_diffusion.backbones.quantised import dequantised, require_finite_parts, require_not_quantised
from mhla_diffusion.backbones.teacher import fingerprint
from mhla_diffusion.pipelines.identity import component_sha256, weights_sha256
from mhla_diffusion.training.image_models import ModelConfig
from mhla_diffusion.training.run import new_or_loaded

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


def test_a_quantised_model_has_one_identity_before_and_after_it_is_saved(tmp_path: Path) -> None:
    CASES["DiT"].stock().save_pretrained(tmp_path / "stock")
    loaded = DiTTransformer2DModel.from_pretrained(
        tmp_path / "stock", quantization_config=int8(), dtype=torch.bfloat16
    )
    model = convert_to_mhla(loaded, {"blocks": 4})
    model.save_pretrained(tmp_path / "converted")
    again = MHLADiTTransformer2DModel.from_pretrained(tmp_path / "converted", dtype=torch.bfloat16)
    assert component_sha256(again) == component_sha256(model)
    assert fingerprint(again) == fingerprint(model)


def test_a_quantised_model_is_neither_trained_nor_analysed(tmp_path: Path) -> None:
    model = CASES["DiT"].make()
    model.save_pretrained(tmp_path / "plain")
    MHLADiTTransformer2DModel.from_pretrained(
        tmp_path / "plain", quantization_config=int8(), dtype=torch.bfloat16
    ).save_pretrained(tmp_path / "int8")
    stored = str(tmp_path / "int8")
    with pytest.raises(ValueError, match="is quantised by torchao, and training needs its weights"):
        new_or_loaded(MHLADiTTransformer2DModel, ModelConfig(init_from=stored))
    with pytest.raises(ValueError, match="is quantised by torchao, and analysis needs its weights"):
        analyze_stored(stored)


def test_a_gate_at_its_start_that_float8_makes_nan_is_named(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    from torchao.quantization import Float8WeightOnlyConfig

    CASES["DiT"].make(mhla={"gate": True}).save_pretrained(tmp_path / "trained")
    convert_to_mhla(CASES["DiT"].stock(), {"blocks": 4, "gate": True}).save_pretrained(tmp_path / "new")
    load = partial(MHLADiTTransformer2DModel.from_pretrained, dtype=torch.bfloat16)
    load(tmp_path / "trained", quantization_config=TorchAoConfig(Float8WeightOnlyConfig()))
    with pytest.raises(
        ValueError, match=r'processor\.gate\.weight is NaN.*modules_to_not_convert=\["gate"\]'
    ):
        load(tmp_path / "new", quantization_config=TorchAoConfig(Float8WeightOnlyConfig()))
    left_out = TorchAoConfig(Float8WeightOnlyConfig(), modules_to_not_convert=["gate"])
    model = load(tmp_path / "new", quantization_config=left_out)
    assert sample(model, CASES["DiT"].inputs(model, dtype=torch.bfloat16)).isfinite().all()


class Codes(TwoTensor):
    """A weight of codes and scales, as quantisation leaves one."""

    def dequantize(self) -> Tensor:
        return self.a * self.b


def test_a_quantised_weight_is_the_product_of_its_parts() -> None:
    weight, scale = torch.randn(4, 4), torch.randn(4, 4)
    assert torch.equal(dequantised(Codes(weight, scale)), weight * scale)
    assert dequantised(weight) is weight


def test_a_part_of_mhla_whose_scale_is_lost_is_named(case: Case) -> None:
    model = case.make(mhla={"gate": True})
    require_finite_parts(model)
    gate = next(module for module in model.modules() if isinstance(module, MHLA)).gate
    nothing = torch.zeros_like(gate.weight)
    one_row = torch.ones_like(gate.weight)
    one_row[0] = torch.nan
    for scale in (nothing / nothing, one_row):
        gate.weight = torch.nn.Parameter(Codes(nothing, scale), requires_grad=False)
        with pytest.raises(ValueError, match=r'gate\.weight is NaN.*modules_to_not_convert=\["gate"\]'):
            require_finite_parts(model)


def test_what_needs_floating_point_says_so_of_a_quantised_model(case: Case) -> None:
    model = case.make()
    require_not_quantised(model, "M", "training")
    model.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(quant_method="torchao"))
    with pytest.raises(ValueError, match=r"M is quantised by torchao, and training .* quantization_config="):
        require_not_quantised(model, "M", "training")


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
