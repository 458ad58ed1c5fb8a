"""LTX-Video on tokens with coordinates, and with tokens of conditions ahead of the grid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from .cases import CASES, sample

CASE = CASES["LTXVideo"]
GRID = (2, 3, 4)


def coordinates(grid: tuple[int, ...], *, time: int = 0) -> Tensor:
    """``[2, 3, N]``, so that the rope makes of them what it makes of a grid's sizes."""
    places = torch.cartesian_prod(*(torch.arange(float(size)) for size in grid)).T
    places[0] += time
    return (places * torch.tensor([20.0, 2048, 2048])[:, None]).expand(2, -1, -1)


def with_coordinates(inputs: dict[str, Any], video_coords: Tensor) -> dict[str, Any]:
    sizes = ("num_frames", "height", "width")
    return {**{k: v for k, v in inputs.items() if k not in sizes}, "video_coords": video_coords}


@pytest.mark.parametrize("attention", ["mhla", "linear", "softmax"])
def test_coordinates_say_what_sizes_do(attention: str) -> None:
    model = CASE.make(attention=attention)
    inputs = CASE.inputs(model, GRID)
    found = sample(model, with_coordinates(inputs, coordinates(GRID)))
    torch.testing.assert_close(found, sample(model, inputs))


def test_tokens_ahead_of_the_grid_are_extra(assert_close: Callable[..., None]) -> None:
    model = CASE.make(mhla={"extra_block": True, "gate": True})
    inputs = CASE.inputs(model, GRID)
    plain = sample(model, inputs)
    ahead = torch.randn(2, 12, 3)
    places = coordinates((1, 3, 4), time=7)
    calls: list[Any] = []
    processor = model.transformer_blocks[1].attn1.processor
    processor.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((kwargs["grid"], kwargs["extra"])), with_kwargs=True
    )

    def run(order: Tensor) -> Tensor:
        arguments = with_coordinates(inputs, torch.cat((places[:, :, order], coordinates(GRID)), 2))
        arguments["hidden_states"] = torch.cat((ahead[:, order], inputs["hidden_states"]), 1)
        return sample(model, arguments)[:, 12:]

    found = run(torch.arange(12))
    assert calls == [(GRID, (12, 0))]
    assert (found - plain).abs().max() > 1e-3
    assert_close(run(torch.randperm(12)), found)


def test_tokens_ahead_of_the_grid_without_a_block_for_them_are_refused() -> None:
    model = CASE.make()
    inputs = CASE.inputs(model, GRID)
    arguments = with_coordinates(inputs, torch.cat((coordinates((1, 3, 4), time=7), coordinates(GRID)), 2))
    arguments["hidden_states"] = torch.cat((torch.randn(2, 12, 3), inputs["hidden_states"]), 1)
    with pytest.raises(ValueError, match=r"for extra tokens, got \(12, 0\): set extra_block=True"):
        model(**arguments)
    linear = CASE.make(attention="linear")
    assert sample(linear, arguments).isfinite().all(), "where all tokens are alike"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda places: places[:, :, :-1], r"2 x 3 x 4 places .* but 23 tokens: MHLA needs a whole grid"),
        (lambda places: places + 1, r"2 x 3 x 4 places .* but 30 tokens"),
    ],
)
def test_coordinates_of_no_grid_are_refused(change: Callable[[Tensor], Tensor], message: str) -> None:
    model = CASE.make()
    inputs = CASE.inputs(model, GRID)
    places = change(coordinates(GRID))
    if places.shape[-1] == 24:  # none of them lies at 0
        places = torch.cat((places[:, :, :6], places), 2)
    inputs["hidden_states"] = torch.randn(2, places.shape[-1], 3)
    with pytest.raises(ValueError, match=message):
        model(**with_coordinates(inputs, places))


@pytest.mark.parametrize("time", [0, -2], ids=["from 0 again", "before 0"])
def test_frames_behind_the_video_are_refused(time: int) -> None:
    """As ``LTXI2VLongMultiPromptPipeline`` has them; the video would be taken for tokens ahead of a grid."""
    inputs = CASE.inputs(model := CASE.make(mhla={"extra_block": True}), GRID)
    places = torch.cat((coordinates(GRID), coordinates((1, 3, 4), time=time)), 2)
    arguments = with_coordinates(inputs, places)
    arguments["hidden_states"] = torch.cat((inputs["hidden_states"], torch.randn(2, 12, 3)), 1)
    with pytest.raises(ValueError, match="LTXI2VLongMultiPromptPipeline has them, have no place on the grid"):
        model(**arguments)
    assert sample(CASE.make(attention="softmax"), arguments).isfinite().all()
