from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel
from torch import Tensor

from mhla_diffusion import MHLAConfig, MHLADiTTransformer2DModel, convert_to_mhla
from mhla_diffusion.ops import BlockLayout, resize_mixing

from .cases import CASES

MakeModel = Callable[..., MHLADiTTransformer2DModel]
MakeStock = Callable[..., DiTTransformer2DModel]
MakeInputs = Callable[..., dict[str, Tensor]]


@pytest.mark.parametrize(
    ("config", "new"),
    [
        (MHLAConfig(blocks=4), ["local", "mixing"]),
        (MHLAConfig.paper(blocks=4), ["mixing"]),
        ({"blocks": 4, "cpe": "zero", "gate": True, "output_norm": True},
         ["cpe.bias", "cpe.weight", "gate.bias", "gate.weight", "mixing", "norm.weight"]),
        ({"blocks": 1}, []),
    ],
    ids=["mhla", "the paper's", "every part", "linear"],
)  # fmt: skip
def test_every_weight_carries_over_and_what_is_new_is_reported(
    make_stock: MakeStock, config: MHLAConfig | dict[str, Any], new: list[str]
) -> None:
    stock = make_stock()
    before = {key: value.clone() for key, value in stock.state_dict().items()}
    model, report = convert_to_mhla(stock, config, output_loading_info=True)
    after = model.state_dict()
    assert report == {
        "new": [f"transformer_blocks.{i}.attn1.processor.{name}" for i in (0, 1) for name in new],
        "dropped": [],
    }
    assert after.keys() == before.keys() | set(report["new"])
    assert all(torch.equal(after[key], value) for key, value in before.items())
    # Taken over, not copied, each by a parameter of its own.
    old, fresh = dict(stock.named_parameters()), dict(model.named_parameters())
    assert all(fresh[key].data_ptr() == value.data_ptr() for key, value in old.items())
    assert all(fresh[key] is not value for key, value in old.items())
    assert stock.state_dict().keys() == before.keys(), "the model given is as it was"


@pytest.mark.parametrize("stored", ["auto", None, "gate"])
@pytest.mark.parametrize("wanted", [MHLAConfig(blocks=4), {"blocks": 4}], ids=["config", "dict"])
def test_other_blocks_keep_the_window_that_a_model_has(
    make_stock: MakeStock, tmp_path: Path, stored: str | None, wanted: MHLAConfig | dict[str, Any]
) -> None:
    model = convert_to_mhla(make_stock(), MHLAConfig(blocks=(4, 2), local=stored))
    model.save_pretrained(tmp_path)
    for again in (
        type(model).from_pretrained(tmp_path, mhla_config=wanted),
        convert_to_mhla(copy.deepcopy(model), wanted),
    ):
        processor = again.transformer_blocks[0].attn1.processor
        assert (processor.config.blocks, processor.config.local) == (4, stored)
        assert (processor.local is None) == (stored is None)
    for impossible in (MHLAConfig(blocks=1), {"blocks": 4, "normalizer": "none"}):
        plain = type(model).from_pretrained(tmp_path, mhla_config=impossible)
        assert plain.transformer_blocks[0].attn1.processor.local is None
    with pytest.raises(ValueError, match="is a list of 3 configs, but the model has 2 layers"):
        convert_to_mhla(copy.deepcopy(model), [MHLAConfig(blocks=4)] * 3)
    without = MHLAConfig.paper(blocks=4)
    plain = type(model).from_pretrained(tmp_path, mhla_config=without)
    assert plain.transformer_blocks[0].attn1.processor.config == without


@pytest.mark.parametrize("training", [True, False])
def test_dtypes_and_mode_are_kept(make_stock: MakeStock, training: bool) -> None:
    stock = make_stock().to(torch.bfloat16).train(training)
    stock.proj_out_2.float()
    model = convert_to_mhla(stock, {"blocks": 4, "gate": True})
    state = model.state_dict()
    assert all(state[key].dtype == value.dtype for key, value in stock.state_dict().items())
    assert model.training is training
    processor = model.transformer_blocks[0].attn1.processor
    assert {parameter.dtype for parameter in processor.parameters()} == {torch.bfloat16}
    assert all(module.training is training for module in model.modules())


def test_what_is_frozen_and_checkpointed_stays_so(make_stock: MakeStock) -> None:
    stock = make_stock()
    stock.proj_out_2.requires_grad_(False)
    stock.enable_gradient_checkpointing()
    model = convert_to_mhla(stock, {"blocks": 4})
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["proj_out_2.weight", "proj_out_2.bias"]
    assert model.is_gradient_checkpointing


def test_an_mhla_model_gets_another_config(make_model: MakeModel, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    mhla = {"blocks": 4, "gate": True, "cpe": "zero"}
    model = make_model(attention=["softmax", "mhla"], mhla_config=mhla)
    converted, report = convert_to_mhla(model, {"blocks": (1, 2), "gate": True}, output_loading_info=True)
    assert converted.layer_attention == ["mhla", "mhla"]
    assert converted.mixing_blocks == (1, 2)
    before, after = (
        model.transformer_blocks[1].attn1.processor,
        converted.transformer_blocks[1].attn1.processor,
    )
    layouts = BlockLayout((2, 2), (2, 2)), BlockLayout((1, 2), (1, 2))
    resized = resize_mixing(before.mixing, *layouts)
    torch.testing.assert_close(after.mixing, resized / resized.max().clamp_min(1))
    assert torch.equal(after.gate.weight, before.gate.weight)
    assert report["dropped"] == [
        f"transformer_blocks.1.attn1.processor.cpe.{name}" for name in ("bias", "weight")
    ]
    assert {key.split(".")[1] for key in report["new"]} == {"0"}, "the layer that had softmax"
    assert "transformer_blocks.1.attn1.processor: mixing resized, blocks (2, 2) to (1, 2)" in caplog.text
    assert torch.equal(converted.pos_embed.proj.weight, model.pos_embed.proj.weight)


@pytest.mark.parametrize("constraint", ["clamp", "softmax", "none"])
def test_even_mixing_is_the_same_function_with_other_blocks(
    constraint: str, make_model: MakeModel, make_inputs: MakeInputs
) -> None:
    model = make_model(mhla_config={"blocks": 4, "mixing_init": "uniform", "constraint": "none"})
    for block in model.transformer_blocks:
        torch.nn.init.constant_(block.attn1.processor.mixing, 0.9)
    expected = model(**make_inputs()).sample
    converted = convert_to_mhla(model, {"blocks": (1, 2), "constraint": constraint, "mixing_per_head": True})
    torch.testing.assert_close(converted(**make_inputs()).sample, expected)
    mixing = converted.transformer_blocks[0].attn1.processor.mixing_matrix()
    assert mixing.shape == (2, 2, 2)
    if constraint == "clamp":
        assert mixing.max() <= 1, "rows keep their sum of 3.6, which 2 weights cannot hold"
    back = convert_to_mhla(converted, {"blocks": 4})
    assert back.transformer_blocks[0].attn1.processor.mixing.shape == (4, 4)
    torch.testing.assert_close(back(**make_inputs()).sample, expected)


def test_each_layer_may_have_a_config_of_its_own(
    make_stock: MakeStock, make_inputs: MakeInputs, tmp_path: Path
) -> None:
    configs = [MHLAConfig(blocks=4, local="gate", feature_map="hedgehog"), MHLAConfig(blocks=2, cpe="zero")]
    model = convert_to_mhla(make_stock(), configs, attention=["mhla", "linear"])
    first, second = (block.attn1.processor for block in model.transformer_blocks)
    assert (first.blocks, first.local is None, first.cpe is None) == ((2, 2), False, True)
    assert (second.blocks, second.local is None, second.cpe is None) == ((1, 1), True, False)
    model.save_pretrained(tmp_path)
    again = MHLADiTTransformer2DModel.from_pretrained(tmp_path)
    assert again.layer_attention == ["mhla", "linear"]
    assert torch.equal(again(**make_inputs()).sample, model(**make_inputs()).sample)
    resized = MHLADiTTransformer2DModel.from_pretrained(
        tmp_path, mhla_config=[dataclasses.replace(configs[0], blocks=2), configs[1]]
    )
    assert resized.transformer_blocks[0].attn1.processor.blocks == (1, 2)
    with pytest.raises(ValueError, match=r"a list of 1 configs, but the model has 2 layers"):
        convert_to_mhla(make_stock(), configs[:1], attention=["mhla", "linear"])


def test_gradients_reach_every_converted_weight(make_stock: MakeStock, make_inputs: MakeInputs) -> None:
    model = convert_to_mhla(make_stock(), {"blocks": 4, "cpe": "zero", "gate": True, "output_norm": True})
    model(**make_inputs()).sample.square().mean().backward()
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_fields_that_an_old_config_carries_along_do_not_matter(
    make_stock: MakeStock, make_inputs: MakeInputs
) -> None:
    """Checkpoints of the time when DiT was a Transformer2DModel have more fields than the class has."""
    stock = make_stock()
    stock.register_to_config(num_vector_embeds=None, use_linear_projection=False, cross_attention_dim=None)
    model = convert_to_mhla(stock, MHLAConfig(layers=()))
    assert torch.equal(model(**make_inputs()).sample, stock(**make_inputs()).sample)


def test_blocks_that_cost_too_much_are_warned_of_at_the_callers_line(make_stock: MakeStock) -> None:
    with pytest.warns(UserWarning, match=r"blocks=\(1, 2\) keeps it at 20 %"):
        convert_to_mhla(make_stock(), {"blocks": 16})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_to_mhla(make_stock(), {"blocks": 4})


def test_windows_that_grow_with_the_grid_are_warned_of() -> None:
    """With 16 blocks, whatever the grid, a window is a share of all tokens."""
    shape = {"num_attention_heads": 1, "attention_head_dim": 4, "num_layers": 1, "sample_size": 128}
    with pytest.warns(UserWarning, match=r"windows of 2304 tokens.* blocks=\(8, 8\) makes them 576"):
        MHLADiTTransformer2DModel(**shape, patch_size=1, mhla_config=MHLAConfig(blocks=16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MHLADiTTransformer2DModel(**shape, patch_size=1, mhla_config=MHLAConfig.paper(blocks=16))
        MHLADiTTransformer2DModel(**shape, patch_size=1, mhla_config=MHLAConfig(blocks=64))
        MHLADiTTransformer2DModel(**shape, patch_size=2, mhla_config=MHLAConfig(blocks=16))


def test_models_without_an_mhla_form_are_refused() -> None:
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2)
    with pytest.raises(ValueError, match=r"no MHLA form of AutoencoderKL; .* DiTTransformer2DModel"):
        convert_to_mhla(vae, MHLAConfig(blocks=4))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"blocks": 4, "layers": [9]}, r"names layer 9, but the layers are 0 to 1"),
        ({"blocks": 7}, r"7 blocks do not divide over the grid \(4, 4\)"),
        ({"block": 4}, r"unknown MHLA setting block"),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_the_model_is_refused(
    make_stock: MakeStock, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        convert_to_mhla(make_stock(), config)


def test_the_weight_of_a_window_follows_other_blocks() -> None:
    model = CASES["DiT"].make(num_layers=1, mhla={"local": "shared"})
    config = {**model.config.mhla_config, "blocks": [2, 1]}
    old = model.transformer_blocks[0].attn1.processor
    new = convert_to_mhla(copy.deepcopy(model), config).transformer_blocks[0].attn1.processor
    expected = copy.deepcopy(new)
    expected.take_mixing(old)
    assert not torch.allclose(new.local, old.local)
    torch.testing.assert_close(new.local, expected.local)


def test_one_config_after_one_for_each_layer_and_the_reverse_keep_what_is_not_named() -> None:
    model = CASES["DiT"].make(mhla={"local": "gate"})
    again = convert_to_mhla(model, [{"blocks": 4}, {"blocks": 2}])
    assert [block.attn1.processor.config.local for block in again.transformer_blocks] == ["gate"] * 2
    each = [MHLAConfig(blocks=4, local="gate"), MHLAConfig(blocks=4, local=None)]
    model = convert_to_mhla(CASES["DiT"].stock(), each)
    again = convert_to_mhla(model, MHLAConfig(blocks=4, layers=(0,)))
    assert again.layer_attention == ["mhla", "softmax"]


def test_blocks_of_a_model_are_those_of_its_first_layer_that_mixes() -> None:
    assert CASES["DiT"].make(attention=["linear", "mhla"]).mixing_blocks == (2, 2)
