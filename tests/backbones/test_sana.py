"""Sana with MHLA: the stock model with one block, and where its blocks see all alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import SanaControlNetModel
from torch import Tensor, nn

from mhla_diffusion import convert_to_mhla

from .cases import CASES, sample

CASE = CASES["Sana"]


@pytest.mark.parametrize("grid", CASE.grids, ids=str)
@torch.no_grad()
def test_one_block_is_sanas_own_attention_to_rounding(grid: tuple[int, ...]) -> None:
    stock, linear, mhla = CASE.stock(), CASE.make(attention="linear"), CASE.make(mhla={"blocks": 1})
    for model in (linear, mhla):
        model.load_state_dict(stock.state_dict())
        inputs = CASE.inputs(model, grid)
        torch.testing.assert_close(sample(model, inputs), sample(stock, inputs), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_blocks_that_see_all_alike_are_the_stock_model() -> None:
    stock = CASE.stock()
    converted = convert_to_mhla(stock, CASE.config(mixing_init="uniform"))
    inputs = CASE.inputs(converted)
    expected = sample(stock, inputs)
    torch.testing.assert_close(sample(converted, inputs), expected, rtol=1e-4, atol=1e-4)
    nn.init.uniform_(converted.transformer_blocks[0].attn1.processor.mixing)
    assert not torch.allclose(sample(converted, inputs), expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_what_the_stock_model_takes_beside_text_is_heard() -> None:
    """Guidance of Sprint, and what a ControlNet adds."""
    model = CASE.make(attention=["mhla", "linear"], guidance_embeds=True, qk_norm="rms_norm_across_heads")
    inputs = {**CASE.inputs(model), "guidance": torch.tensor([0.1, 0.4])}
    controlled = control(inputs)
    outputs = [
        sample(model, changed)
        for changed in (inputs, {**inputs, "guidance": torch.tensor([0.3, 0.4])}, {**inputs, **controlled})
    ]
    assert not torch.equal(outputs[0][0], outputs[1][0])
    assert torch.equal(outputs[0][1], outputs[1][1])
    assert not torch.allclose(outputs[0], outputs[2], rtol=1e-2)


def control(inputs: dict[str, Tensor]) -> dict[str, Any]:
    """What a ControlNet makes of the same inputs and a picture."""
    controlnet = SanaControlNetModel(
        **{name: value for name, value in CASE.settings.items() if name != "num_layers"}, num_layers=1
    )
    for parameter in controlnet.parameters():
        nn.init.normal_(parameter, std=0.2)
    arguments = {name: value for name, value in inputs.items() if name != "guidance"}
    return {"controlnet_block_samples": controlnet(**arguments, controlnet_cond=torch.ones(2, 3, 4, 4))[0]}
