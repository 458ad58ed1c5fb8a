"""Joint attention: text and image in one operator, against the reference; masks, lengths, other images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mhla_diffusion import MHLAQwenImageTransformer2DModel, convert_to_mhla
from mhla_diffusion.backbones import processors
from mhla_diffusion.backbones.processors import MHLAAttnProcessor, _tokens_beyond
from mhla_diffusion.ops import BlockLayout, mhla_reference, resize_mixing

from .cases import CASES, EVERY_PART, sample

AssertClose = Callable[..., None]
CASE = CASES["QwenImage"]


def inputs_with_text(model: Any, text: int, grid: tuple[int, int] = (3, 5)) -> dict[str, Any]:
    """Arguments on a grid with a text of so many tokens, without a mask."""
    inputs = CASE.inputs(model, grid)
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"][:, :text]
    del inputs["encoder_hidden_states_mask"]
    return inputs


def test_a_layer_is_the_reference_over_text_and_image(assert_close: AssertClose) -> None:
    """With the projections, norms and rotations of the stock layer, and its outputs."""
    model = CASE.make(mhla={"gate": True}).double()
    attn, grid, text = model.transformer_blocks[0].attn, (3, 5), 7
    image, words = torch.randn(2, 15, 24).double(), torch.randn(2, text, 24).double()
    mask = torch.arange(text) < torch.tensor([[text], [4]])
    shapes = [[(1, *grid)]] * 2
    image_turns, text_turns, _ = model.pos_embed(shapes, max_txt_seq_len=text, device=image.device)
    found = attn(
        image, encoder_hidden_states=words, encoder_hidden_states_mask=mask, grid=grid,
        image_rotary_emb=(image_turns, text_turns),
    )  # fmt: skip

    def heads(x: Tensor, layer: Any, norm: Any) -> Tensor:
        x = layer(x).unflatten(-1, (2, 12)).transpose(1, 2)
        return x if norm is None else x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.weight

    q, k, v = (
        torch.cat((heads(words, *of_text), heads(image, *of_image)), 2)
        for of_text, of_image in (
            ((attn.add_q_proj, attn.norm_added_q), (attn.to_q, attn.norm_q)),
            ((attn.add_k_proj, attn.norm_added_k), (attn.to_k, attn.norm_k)),
            ((attn.add_v_proj, None), (attn.to_v, None)),
        )
    )
    turns = torch.cat((text_turns, image_turns)).to(torch.complex128)
    mixing = attn.processor.mixing
    assert mixing.shape == (5, 5)
    out = mhla_reference(
        q, k, v, mixing, BlockLayout(grid, (2, 2), (text, 0)), rotary_emb=(turns.real, turns.imag),
        key_mask=F.pad(mask, (0, 15), value=True),
    )  # fmt: skip
    gate = F.silu(attn.processor.gate(torch.cat((words, image), 1)))
    out = out.transpose(1, 2).flatten(2) * gate
    # The tables are float32.
    assert_close(found[0], attn.to_out[0](out[:, text:]), torch.float32)
    assert_close(found[1], attn.to_add_out(out[:, :text]), torch.float32)


def test_padding_of_the_text_does_not_count(assert_close: AssertClose) -> None:
    model = CASE.make(attention=["mhla", "linear"])
    for text in (1, 5, 20):
        inputs = inputs_with_text(model, text)
        padded = {
            **inputs,
            "encoder_hidden_states": F.pad(inputs["encoder_hidden_states"], (0, 0, 0, 9), value=3),
        }
        mask = torch.ones(2, text, dtype=torch.int64)  # as the pipeline has it
        expected = sample(model, inputs)
        found = sample(model, {**padded, "encoder_hidden_states_mask": F.pad(mask, (0, 9))})
        assert_close(found, expected)
        assert (sample(model, padded) - expected).abs().max() > 1e-3, "without a mask it would"


def test_the_backward_computes_norms_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = CASE.make(mhla=EVERY_PART)
    inputs = CASE.inputs(model, (3, 5))

    def gradients() -> list[Tensor | None]:
        loss = sample(model, inputs).square().mean()
        return list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))

    expected = gradients()
    calls: list[int] = []
    model.transformer_blocks[0].attn.processor.register_forward_pre_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(processors, "_MANY_TOKENS", 1)
    for gradient, reference in zip(gradients(), expected, strict=True):
        assert (gradient is None) == (reference is None)
        if gradient is not None and reference is not None:
            torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-6)
    assert len(calls) == 2, "once on the way, once on the way back"


@pytest.mark.usefixtures("fresh_dynamo")
@torch.no_grad()
def test_texts_of_any_length_are_compiled_in_one_piece(assert_close: AssertClose) -> None:
    model = CASE.make(num_layers=1, mhla=EVERY_PART)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for text in (5, 9, 14, 5):
        inputs = inputs_with_text(model, text)
        assert_close(sample(compiled, inputs), sample(model, inputs))


def test_blocks_that_weigh_all_alike_are_linear_attention(assert_close: AssertClose) -> None:
    model = CASE.make()
    for block in model.transformer_blocks:
        torch.nn.init.constant_(block.attn.processor.mixing, 0.5)
    linear = CASE.make(attention="linear")
    linear.load_state_dict(model.state_dict(), strict=False)
    assert not any(".processor." in name for name in linear.state_dict())
    inputs = CASE.inputs(model, (3, 5))
    assert_close(sample(model, inputs), sample(linear, inputs))


def test_other_images_are_in_the_block_of_the_text(assert_close: AssertClose) -> None:
    """Of an edit: the order of their tokens does not matter but for positions, and each is heard."""
    model = CASE.make()
    one = inputs_with_text(model, 6)
    other = torch.randn(2, 8, 12)
    two = {
        **one,
        "hidden_states": torch.cat((one["hidden_states"], other), 1),
        "img_shapes": [[(1, 3, 5), (1, 2, 4)]] * 2,
    }
    found = sample(model, two)
    assert found.shape == (2, 23, 12)
    assert (found[:, :15] - sample(model, one)).abs().max() > 1e-3
    attn = model.transformer_blocks[0].attn
    image, words = torch.randn(2, 23, 24), torch.randn(2, 6, 24)
    calls: list[dict[str, Any]] = []
    attn.processor.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    out, _ = attn(image, encoder_hidden_states=words, grid=(3, 5))
    assert calls[0]["extra"] == (6, 8)
    order = [*range(15), *reversed(range(15, 23))]
    assert_close(attn(image[:, order], encoder_hidden_states=words, grid=(3, 5))[0], out[:, order])


def test_what_is_no_grid_of_an_image_is_refused() -> None:
    with pytest.raises(
        ValueError, match="use_layer3d_rope is of Qwen-Image-Layered, whose pictures are many"
    ):
        CASE.make(use_layer3d_rope=True)
    model = CASE.make()
    inputs = inputs_with_text(model, 3)
    with pytest.raises(ValueError, match=r"one frame, but img_shapes begins with \(2, 3, 5\), of 2 frames"):
        model(**{**inputs, "img_shapes": [[(2, 3, 5)]] * 2})
    with pytest.raises(
        ValueError, match=r"q hold 18 tokens, but the grid \(4, 5\) has 20 and 3 extra tokens"
    ):
        model.transformer_blocks[0].attn(
            torch.randn(1, 15, 24), encoder_hidden_states=torch.randn(1, 3, 24), grid=(4, 5)
        )


def test_shapes_may_be_given_without_a_list_for_each_sample() -> None:
    """As the pipelines with ControlNet give them."""
    model = CASE.make()
    inputs = inputs_with_text(model, 3)
    expected = sample(model, inputs)
    assert torch.equal(sample(model, {**inputs, "img_shapes": [(1, 3, 5)] * 2}), expected)


def test_the_extra_block_is_in_the_config_whatever_is_asked_for() -> None:
    model = convert_to_mhla(CASE.stock(), {"blocks": [2, 2], "layers": [1]})
    assert isinstance(model, MHLAQwenImageTransformer2DModel)
    assert model.config.mhla_config["extra_block"] is True
    processor = model.transformer_blocks[1].attn.processor
    assert isinstance(processor, MHLAAttnProcessor)
    # As much as to the own block.
    torch.testing.assert_close(processor.mixing[:4, 4], processor.mixing.diagonal()[:4])
    torch.nn.init.uniform_(processor.mixing)
    old, new = BlockLayout((2, 2), (2, 2), (0, 0)), BlockLayout((1, 2), (1, 2), (0, 0))
    expected = resize_mixing(processor.mixing_matrix(), old, new)
    again = convert_to_mhla(model, {"blocks": [1, 2], "layers": [1]})
    found = again.transformer_blocks[1].attn.processor.mixing_matrix()
    torch.testing.assert_close(found, expected / expected.max().clamp_min(1))


def refuse_other_images(rank: int) -> None:
    assert _tokens_beyond((3, 5), torch.empty(1, 8 - rank, 4), dist.group.WORLD) == 0
    with pytest.raises(ValueError, match="this rank holds 9 of 15: leave other images"):
        _tokens_beyond((3, 5), torch.empty(1, 9, 4), dist.group.WORLD)


def test_other_images_are_refused_over_ranks(run_processes: Callable[..., None]) -> None:
    run_processes(refuse_other_images, 2)
