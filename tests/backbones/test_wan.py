"""Wan with MHLA: the stock model where attention is softmax, the operator's reference where it is not."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor, nn

from mhla_diffusion import MHLAWanTransformer3DModel, convert_to_mhla
from mhla_diffusion.backbones import positions, processors
from mhla_diffusion.ops import BlockLayout, mhla_reference

SETTINGS: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 3, "out_channels": 4, "num_layers": 3,
    "text_dim": 10, "freq_dim": 16, "ffn_dim": 40,
}  # fmt: skip
IMAGE: dict[str, Any] = {"image_dim": 6, "added_kv_proj_dim": 24}
MHLA_CONFIG = {"blocks": [1, 2, 2], "normalizer": "none", "output_norm": True, "gate": True}


def make_stock(**settings: Any) -> WanTransformer3DModel:
    return WanTransformer3DModel(**{**SETTINGS, **settings})


def make_model(**settings: Any) -> MHLAWanTransformer3DModel:
    return MHLAWanTransformer3DModel(
        **{**SETTINGS, "mhla_config": MHLA_CONFIG, "sample_grid": (3, 4, 4), **settings}
    )


def make_inputs(
    size: tuple[int, int, int] = (3, 6, 10), *, image: bool = False, per_token: bool = False
) -> dict[str, Tensor]:
    frames, height, width = size
    tokens = frames * height * width // 4
    inputs = {
        "hidden_states": torch.randn(2, 3, *size),
        "timestep": torch.rand(2, tokens) * 1000 if per_token else torch.tensor([10.0, 500.0]),
        "encoder_hidden_states": torch.randn(2, 512, 10),
    }
    if image:
        inputs["encoder_hidden_states_image"] = torch.randn(2, 257, 6)
    return inputs


@pytest.mark.parametrize("per_token", [False, True], ids=["", "a time for each token"])
@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
def test_softmax_alone_is_the_stock_model(image: bool, per_token: bool) -> None:
    settings = IMAGE if image else {}
    stock, model = make_stock(**settings), make_model(attention="softmax", **settings)
    model.load_state_dict(stock.state_dict())
    inputs = make_inputs(image=image, per_token=per_token)
    assert torch.equal(model(**inputs).sample, stock(**inputs).sample)
    assert torch.equal(model(**inputs, return_dict=False)[0], stock(**inputs).sample)


@pytest.mark.parametrize("normalizer", ["none", "paper"])
def test_a_layer_is_the_operator_on_turned_features(normalizer: str) -> None:
    """Norm over all heads, rotary positions in the numerators alone, per-head norm, gate, projection."""
    model = make_model(mhla_config={**MHLA_CONFIG, "normalizer": normalizer})
    attn, grid = model.blocks[0].attn1, (3, 3, 5)
    for parameter in attn.parameters():
        nn.init.normal_(parameter, std=0.5)
    processor = attn.processor
    nn.init.uniform_(processor.mixing)
    x, rotary_emb = torch.randn(2, 45, 24), model.rope(torch.empty(1, 3, 3, 6, 10))
    q, k = attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(x))
    q, k, v = (y.unflatten(-1, (2, 12)).transpose(1, 2) for y in (q, k, attn.to_v(x)))
    tables = rotary_emb[0][0, :, 0, 0::2].double(), rotary_emb[1][0, :, 0, 1::2].double()
    layout = BlockLayout(grid, (1, 2, 2))
    out = mhla_reference(q, k, v, processor.mixing, layout, normalizer=normalizer, rotary_emb=tables).float()
    out = processor.norm(out).transpose(1, 2).flatten(2) * nn.functional.silu(processor.gate(x))
    torch.testing.assert_close(
        attn(x, None, None, rotary_emb, grid=grid), attn.to_out[0](out), rtol=1e-4, atol=1e-4
    )


def test_layers_share_one_table_of_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """In each forward, and in training once for all of them."""
    made: list[int] = []

    def make_pairs(*arguments: Any) -> Any:
        made.append(arguments[0][0].shape[1])
        return rotary_pairs(*arguments)

    rotary_pairs = positions.rotary_pairs
    monkeypatch.setattr(positions, "rotary_pairs", make_pairs)
    model, saved = make_model(), set()

    def note(x: Tensor) -> Tensor:
        if x.shape[-2:] == (45, 12) and not x.requires_grad and x.ndim == 3:
            saved.add(x.data_ptr())
        return x

    for grid in ((3, 6, 10), (3, 4, 4), (3, 6, 10)):
        model(**make_inputs(grid))
    assert made == [45, 12, 45]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        model(**make_inputs((3, 6, 10)))
    assert len(saved) == 1


def test_a_new_model_hears_time_and_text() -> None:
    inputs = make_inputs((3, 8, 8))
    model = make_model()
    first = model(**inputs).sample
    for name in ("timestep", "encoder_hidden_states"):
        assert not torch.equal(first, model(**inputs | {name: inputs[name].flip(0)}).sample)


@pytest.mark.parametrize("size", [(3, 6, 10), (1, 2, 8), (5, 4, 2)], ids=str)
def test_any_size_runs_forward_and_backward(size: tuple[int, int, int]) -> None:
    model = make_model(attention=["mhla", "softmax", "linear"])
    out = model(**make_inputs(size)).sample
    assert out.shape == (2, 4, *size)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_what_is_computed_again_gives_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = make_model(mhla_config={**MHLA_CONFIG, "qk_norm": True}), make_inputs()
    parameters = list(model.parameters())
    nn.init.normal_(model.proj_out.weight)
    monkeypatch.setattr(processors, "_MANY_TOKENS", 1)
    again = torch.autograd.grad(model(**inputs).sample.square().sum(), parameters)
    monkeypatch.setattr(processors, "_MANY_TOKENS", 1000)
    kept = torch.autograd.grad(model(**inputs).sample.square().sum(), parameters)
    assert all(torch.equal(a, b) for a, b in zip(again, kept, strict=True))


@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
def test_conversion_keeps_every_stock_weight(image: bool) -> None:
    stock = make_stock(**(IMAGE if image else {}))
    model, info = convert_to_mhla(stock, {**MHLA_CONFIG, "layers": [1, 2]}, output_loading_info=True)
    assert model.layer_attention == ["softmax", "mhla", "mhla"]
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in stock.state_dict().items())
    assert info["dropped"] == []
    assert len(info["new"]) == 2 * 4, "mixing, per-head norm, weight and bias of the gate"
    assert model(**make_inputs(image=image)).sample.isfinite().all()


def test_patches_are_those_of_the_config() -> None:
    model = make_model(patch_size=(1, 1, 2))
    inputs = model.example_inputs((3, 4, 5))
    assert inputs["hidden_states"].shape[2:] == (3, 4, 10)
    assert model(**inputs).sample.shape[2:] == (3, 4, 10)


def test_strides_are_those_of_the_autoencoder_of_the_stock_model() -> None:
    made = inspect.signature(AutoencoderKLWan).parameters
    time, space = (made[f"scale_factor_{axis}"].default for axis in ("temporal", "spatial"))
    assert MHLAWanTransformer3DModel.vae_stride == (time, space, space)
