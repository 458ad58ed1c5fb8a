from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from mhla_diffusion.ops import BlockLayout, recommended_layout

LAYOUTS = [
    BlockLayout((8, 8), (2, 4)),
    BlockLayout((4, 16), (2, 2)),
    BlockLayout((7, 5), (3, 2)),
    BlockLayout((5, 9), (5, 4)),
    BlockLayout((3, 6, 4), (3, 3, 2)),
    BlockLayout((5, 7, 3), (2, 3, 2)),
    BlockLayout((63,), (8,)),
    BlockLayout((6, 6), (1, 1)),
    BlockLayout((4, 6), (2, 3), extra=(2, 3)),
    BlockLayout((5, 3), (2, 2), extra=(0, 20)),
    BlockLayout((4, 4), (2, 2), extra=(0, 0)),
]


def axis_blocks(tokens: int, count: int) -> list[int]:
    """The block of each token along an axis, written down from the specification."""
    sizes = [-(-tokens // count)] * (tokens % count) + [tokens // count] * (count - tokens % count)
    return [block for block, size in enumerate(sizes) for _ in range(size)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_blocks_are_boxes_as_even_as_they_can_be(layout: BlockLayout) -> None:
    axes = [axis_blocks(n, b) for n, b in zip(layout.grid, layout.blocks, strict=True)]
    positions = torch.cartesian_prod(*[torch.arange(n) for n in layout.grid]).reshape(
        math.prod(layout.grid), -1
    )
    before, after = layout.extra or (0, 0)
    index = layout.block_index().tolist()
    last = math.prod(layout.blocks)
    assert index[:before] + index[layout.grid_tokens.stop :] == [last] * (before + after)
    for token, block in zip(positions.tolist(), index[layout.grid_tokens], strict=True):
        expected = 0
        for axis, (place, count) in enumerate(zip(token, layout.blocks, strict=True)):
            expected = expected * count + axes[axis][place]
        assert block == expected


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_pack_sorts_tokens_by_block_and_pads_with_zero(layout: BlockLayout) -> None:
    x = torch.randn(2, 3, layout.num_tokens, 4)
    packed = layout.pack(x)
    for block in range(layout.num_blocks):
        tokens = x[:, :, layout.block_index() == block]
        content = packed[:, :, block]
        real = content.abs().sum((0, 1, 3)) > 0
        torch.testing.assert_close(content[:, :, real], tokens, rtol=0, atol=0)
    assert packed.count_nonzero() == x.count_nonzero()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_unpack_inverts_pack_forward_and_backward(layout: BlockLayout) -> None:
    x = torch.randn(2, layout.num_tokens, 4, requires_grad=True)
    y = layout.unpack(layout.pack(x))
    torch.testing.assert_close(y, x, rtol=0, atol=0)
    gradient = torch.randn_like(x)
    torch.testing.assert_close(torch.autograd.grad(y, x, gradient)[0], gradient, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("grid", "num_blocks", "blocks"),
    [
        ((16, 16), 16, (4, 4)),
        ((32, 32), 64, (8, 8)),
        ((8, 32), 16, (2, 8)),
        ((21, 30, 50), 1, (1, 1, 1)),
        ((16, 16), 3, (1, 3)),
    ],
)
def test_a_number_of_blocks_is_divided_evenly(
    grid: tuple[int, ...], num_blocks: int, blocks: tuple[int, ...]
) -> None:
    layout = BlockLayout.with_num_blocks(grid, num_blocks)
    assert layout.blocks == blocks
    assert layout.num_blocks == num_blocks


@pytest.mark.parametrize(
    ("grid", "blocks", "message"),
    [
        ((4, 4), (5, 1), r"axis 0 .* 4 tokens and cannot hold 5 blocks"),
        ((4, 4), (0, 1), r"cannot hold 0 blocks"),
        ((4, 4), (2,), r"same number of axes"),
        ((), (), r"same number of axes"),
    ],
)
def test_impossible_layouts_are_refused(grid: tuple[int, ...], blocks: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockLayout(grid, blocks)


@pytest.mark.parametrize("extra", [(3,), (1, -1)])
def test_impossible_extra_tokens_are_refused(extra: Any) -> None:
    with pytest.raises(ValueError, match=r"extra must be \(before, after\).*each 0 or more, got"):
        BlockLayout((4, 4), (2, 2), extra)


def test_an_impossible_number_of_blocks_names_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"17 blocks do not divide over the grid \(4, 4\).*\[12, 16\]|\[9, 12, 16\]"
    ):
        BlockLayout.with_num_blocks((4, 4), 17)


def test_the_wrong_number_of_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected 16 tokens.*got 15"):
        BlockLayout((4, 4), (2, 2)).pack(torch.zeros(1, 15, 2))


@pytest.mark.parametrize(
    "grid",
    [
        (16, 16), (32, 32), (45, 80), (64, 64), (128, 128), (21, 30, 50), (21, 30, 52), (21, 45, 80),
        (1024, 1024), (33, 90, 160), (1, 30, 52), (14, 14), (7, 11), (97, 101), (63,), (1, 1), (2, 1), (2, 2),
    ],
    ids=str,
)  # fmt: skip
def test_recommended_blocks_keep_mixing_cheap_and_are_not_few(grid: tuple[int, ...]) -> None:
    layout = recommended_layout(grid)
    tokens, blocks = layout.num_tokens, layout.num_blocks
    most = max(1, math.sqrt(tokens / 2))
    assert blocks <= most
    assert blocks == 1 or 2 * blocks**2 / (4 * tokens + 2 * blocks**2) <= 0.2
    assert blocks >= most / 2


@pytest.mark.parametrize(
    ("grid", "blocks"),
    [
        ((16, 16), (2, 4)),
        ((32, 32), (4, 4)),
        ((128, 128), (8, 8)),
        ((21, 30, 50), (3, 3, 10)),
        ((21, 30, 52), (3, 3, 13)),
        ((21, 45, 80), (3, 5, 10)),
    ],
)
def test_recommended_blocks_of_common_grids_are_whole(grid: tuple[int, ...], blocks: tuple[int, ...]) -> None:
    layout = recommended_layout(grid)
    assert layout.is_even
    assert layout.blocks == blocks


def test_recommended_blocks_are_ragged_where_whole_ones_would_be_few() -> None:
    assert recommended_layout((97, 101)).blocks == (6, 11)  # both sides are prime


def test_no_blocks_are_recommended_for_an_empty_grid() -> None:
    with pytest.raises(ValueError, match="same number of axes"):
        recommended_layout(())
    with pytest.raises(ValueError, match="0 tokens"):
        recommended_layout((0, 4))


def test_a_margin_is_in_tokens_or_in_sides_of_a_block() -> None:
    video = BlockLayout((2, 24, 9), (2, 4, 4))  # the largest block has 1 x 6 x 3 tokens
    assert video.margins(2) == (2, 2, 2)
    assert video.margins(0.25) == (0, 2, 1), "to the nearest token, none of a single frame"
    assert video.margins(0.5) == (1, 3, 2)
    assert video.margins((1, 0.5, 0)) == (1, 3, 0)
    assert video.reach_size(0.25) == 1 * 10 * 5 == video.reach((0, 2, 1))[0].shape[1]
    assert video.margins(np.int64(2)) == (2, 2, 2), "tokens, and no share"
    for margin in ((1, 1), -1, (1, -0.5, 0), [1, 1, 1], 1.5):
        with pytest.raises(
            ValueError, match=r"margin must be an integer >= 0 .*for all axes or each of 3, got"
        ):
            video.margins(margin)  # type: ignore[arg-type]


def test_sums_of_blocks_are_in_the_dtype_that_is_asked_for() -> None:
    layout = BlockLayout((64, 64), (1, 2))
    x = torch.rand(1, 1, 4096, 8).bfloat16()
    expected = layout.pack(x.float()).sum(-2)
    torch.testing.assert_close(layout.block_sums(x, torch.float32), expected)


def test_half_of_the_blocks_suffice_where_more_would_be_uneven() -> None:
    assert recommended_layout((1, 9)).blocks == (1, 2)


def test_margins_reach_no_further_than_the_grid() -> None:
    layout = BlockLayout((4,), (2,))
    assert layout.reach(3)[0].shape[1] == layout.reach_size(3) == 4
