"""SanaVideo with MHLA: the stock model where its blocks see all alike, the operator's reference elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import SanaVideoTransformer3DModel
from torch import Tensor, nn

from mhla_diffusion import MHLASanaVideoTransformer3DModel, convert_to_mhla
from mhla_diffusion.ops import BlockLayout, mhla_reference

SETTINGS: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 3, "out_channels": 3, "num_layers": 3,
    "num_cross_attention_heads": 2, "cross_attention_head_dim": 12, "cross_attention_dim": 24,
    "caption_channels": 10,
}  # fmt: skip
MHLA_CONFIG = {"blocks": [1, 2, 2], "gate": True}


def make_stock(**settings: Any) -> SanaVideoTransformer3DModel:
    return SanaVideoTransformer3DModel(**{**SETTINGS, **settings})


def make_model(**settings: Any) -> MHLASanaVideoTransformer3DModel:
    return MHLASanaVideoTransformer3DModel(
        **{**SETTINGS, "mhla_config": MHLA_CONFIG, "sample_grid": (3, 4, 4), **settings}
    )


def make_inputs(
    size: tuple[int, int, int] = (3, 6, 10), *, per_token: bool = False, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    frames, height, width = size
    tokens = frames * height * width // 4
    mask = torch.ones(2, 7, dtype=dtype)
    mask[1, 4:] = 0
    return {
        "hidden_states": torch.randn(2, 3, *size, dtype=dtype),
        "timestep": torch.rand(2, tokens) * 1000 if per_token else torch.tensor([10.0, 500.0]),
        "encoder_hidden_states": torch.randn(2, 7, 10, dtype=dtype),
        "encoder_attention_mask": mask,
    }


@pytest.mark.parametrize("per_token", [False, True], ids=["", "a time for each token"])
def test_linear_alone_is_the_stock_model(per_token: bool) -> None:
    stock, model = make_stock(), make_model(attention="linear")
    model.load_state_dict(stock.state_dict())
    inputs = make_inputs(per_token=per_token)
    torch.testing.assert_close(model(**inputs).sample, stock(**inputs).sample)


def test_blocks_that_see_all_alike_are_the_stock_model() -> None:
    stock = make_stock()
    converted, info = convert_to_mhla(
        stock, {"blocks": [1, 2, 2], "mixing_init": "uniform"}, output_loading_info=True
    )
    assert info["new"] == [f"transformer_blocks.{i}.attn1.processor.mixing" for i in range(3)]
    assert info["dropped"] == []
    inputs = make_inputs()
    expected = stock(**inputs).sample
    torch.testing.assert_close(converted(**inputs).sample, expected, rtol=1e-4, atol=1e-4)
    nn.init.uniform_(converted.transformer_blocks[0].attn1.processor.mixing)
    assert not torch.allclose(converted(**inputs).sample, expected, rtol=1e-3, atol=1e-3)


def test_a_layer_is_the_operator_on_turned_features() -> None:
    """Norm over all heads, rotary positions in the numerators alone, gate, projection."""
    model = make_model()
    attn, grid = model.transformer_blocks[0].attn1, (3, 3, 5)
    for parameter in attn.parameters():
        nn.init.normal_(parameter, std=0.5)
    processor = attn.processor
    nn.init.uniform_(processor.mixing)
    x, rotary_emb = torch.randn(2, 45, 24), model.rope(torch.empty(1, 3, 3, 6, 10))
    q, k = attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(x))
    q, k, v = (y.unflatten(-1, (2, 12)).transpose(1, 2) for y in (q, k, attn.to_v(x)))
    tables = rotary_emb[0][0, :, 0, 0::2].double(), rotary_emb[1][0, :, 0, 1::2].double()
    out = mhla_reference(q, k, v, processor.mixing, BlockLayout(grid, (1, 2, 2)), rotary_emb=tables).float()
    out = out.transpose(1, 2).flatten(2) * nn.functional.silu(processor.gate(x))
    torch.testing.assert_close(
        attn(x, rotary_emb=rotary_emb, grid=grid), attn.to_out[0](out), rtol=1e-4, atol=1e-4
    )
