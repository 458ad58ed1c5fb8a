from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from mhla_diffusion.ops import (
    MIXING_STARTS,
    BlockLayout,
    block_distances,
    content_mixing,
    extend_mixing,
    initial_mixing,
    locality_mixing,
    offset_means,
    relative_mixing,
    resize_mixing,
)

LAYOUT = BlockLayout((8, 12), (2, 3))


def test_locality_by_hand() -> None:
    # Two blocks side by side and one behind: distances 0, 1, 2 in a row.
    expected = torch.tensor([[1, 1 / 2, 0], [0, 1, 0], [0, 1 / 2, 1]])
    actual = locality_mixing(BlockLayout((1, 9), (1, 3)))
    torch.testing.assert_close(actual, expected / expected.sum(1, keepdim=True))


def test_distances_are_euclidean_on_the_block_grid() -> None:
    distances = block_distances(LAYOUT)
    assert distances[0, 5] == pytest.approx(5**0.5)  # from (0, 0) to (1, 2)
    assert torch.equal(distances, distances.T)


@pytest.mark.parametrize("start", MIXING_STARTS)
def test_starts_are_in_range_and_normalised(start: str) -> None:
    mixing = initial_mixing(LAYOUT, start)
    assert mixing.shape == (6, 6)
    assert mixing.min() >= 0
    assert mixing.max() <= 1
    axis = 0 if start == "official" else 1
    torch.testing.assert_close(mixing.sum(axis), torch.ones(6))
    assert (mixing.diagonal() >= mixing.amax(1) - 1e-7).all(), "no block weighs more than one's own"


@pytest.mark.parametrize("start", MIXING_STARTS)
def test_extra_tokens_weigh_what_the_nearest_block_does(start: str) -> None:
    plain, mixing = (initial_mixing(BlockLayout((8, 12), (2, 3), extra), start) for extra in (None, (0, 1)))
    assert mixing.shape == (7, 7)
    # Among blocks of the grid nothing changes, and rows keep their sums.
    torch.testing.assert_close(mixing[:6, 6], mixing[:6, :6].amax(-1))
    ratio = mixing[:6, :6] / plain.where(plain > 0, 1)
    torch.testing.assert_close(ratio, ratio.amax(-1, keepdim=True).where(plain > 0, 0).expand_as(ratio))
    torch.testing.assert_close(mixing.sum(-1)[:6], plain.sum(-1))
    torch.testing.assert_close(mixing[6], plain.sum(-1).mean().expand(7) / 7)
    torch.testing.assert_close(extend_mixing(plain.expand(2, 6, 6))[1], mixing)


def test_extra_tokens_beside_one_block_are_plain_linear_attention() -> None:
    mixing = initial_mixing(BlockLayout((4, 4), (1, 1), (1, 0)), "locality")
    assert torch.equal(mixing, torch.full((2, 2), 0.5))


@pytest.mark.parametrize("start", MIXING_STARTS)
def test_one_block_is_the_number_one(start: str) -> None:
    assert torch.equal(initial_mixing(BlockLayout((4, 4), (1, 1)), start), torch.ones(1, 1))


def test_an_unknown_start_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'local' is not one of locality, uniform"):
        initial_mixing(LAYOUT, "local")


@pytest.mark.parametrize(
    ("old", "new"),
    [((2, 2), (4, 4)), ((4, 4), (2, 3)), ((3,), (5,)), ((1, 2, 2), (2, 4, 3)), ((1, 2), (3, 2))],
)
def test_resizing_keeps_even_weights_and_row_sums(old: tuple[int, ...], new: tuple[int, ...]) -> None:
    layouts = BlockLayout(old, old), BlockLayout(new, new)
    M, M_new = (layout.num_blocks for layout in layouts)
    even = resize_mixing(torch.full((M, M), 0.5), *layouts)
    torch.testing.assert_close(even, torch.full((M_new, M_new), 0.5 * M / M_new))
    rows = torch.rand(3, M, M) / M
    rows = rows / rows.sum(-1, keepdim=True)
    resized = resize_mixing(rows, *layouts)
    assert resized.shape == (3, M_new, M_new)
    torch.testing.assert_close(resized.sum(-1), torch.ones(3, M_new))
    torch.testing.assert_close(resized[1], resize_mixing(rows[1], *layouts))


def test_resizing_interpolates_by_hand() -> None:
    # Two blocks to four: places 0, 1/4, 3/4 and 1 of the way from the first to the second.
    mixing = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    way = torch.tensor([0, 0.25, 0.75, 1])
    queries = torch.stack([1 - way, way], dim=1)
    expected = queries @ queries.T  # [4, 4], rows not yet of sum 1
    resized = resize_mixing(mixing, BlockLayout((1, 2), (1, 2)), BlockLayout((1, 4), (1, 4)))
    torch.testing.assert_close(resized, expected / expected.sum(1, keepdim=True))


def test_resizing_to_the_same_blocks_is_the_identity() -> None:
    mixing = torch.rand(6, 6)
    assert torch.equal(resize_mixing(mixing, LAYOUT, BlockLayout((16, 16), (2, 3))), mixing)


@pytest.mark.parametrize(("old", "new"), [(4, 6), (6, 4)])
def test_a_resized_locality_start_is_near_that_of_the_new_blocks(old: int, new: int) -> None:
    layouts = BlockLayout((12, 12), (old, old)), BlockLayout((12, 12), (new, new))
    difference = resize_mixing(locality_mixing(layouts[0]), *layouts) - locality_mixing(layouts[1])
    assert difference.abs().sum(-1).max() < 0.12, "of rows that sum to 1"


def test_a_row_of_zeros_stays_zero() -> None:
    layouts = BlockLayout((2, 2), (2, 2)), BlockLayout((3, 3), (3, 3))
    assert torch.equal(resize_mixing(torch.zeros(4, 4), *layouts), torch.zeros(9, 9))


def test_resizing_for_cross_attention_keeps_row_sums() -> None:
    old, new = BlockLayout((2, 2), (2, 2)), BlockLayout((3, 2), (3, 2))
    old_keys, new_keys = BlockLayout((3,), (3,)), BlockLayout((5,), (5,))
    rows = torch.rand(4, 3)
    rows = rows / rows.sum(-1, keepdim=True)
    resized = resize_mixing(rows, old, new, from_keys=old_keys, to_keys=new_keys)
    assert resized.shape == (6, 5)
    torch.testing.assert_close(resized.sum(-1), torch.ones(6))
    assert resize_mixing(rows, old, old, from_keys=old_keys, to_keys=old_keys) is rows


def test_resizing_keeps_what_a_token_of_the_text_weighs_beside_one_of_the_image() -> None:
    old, new = BlockLayout((4, 4), (2, 2), (0, 1)), BlockLayout((4, 4), (4, 2), (3, 0))
    mixing = torch.full((3, 5, 5), 0.2)
    mixing[1, :4, 4] = 0.6  # every block hears the text three times as much
    mixing[2, 4] = torch.tensor(
        [0.1, 0.1, 0.3, 0.3, 0.2]
    )  # and the text the lower half, as much as the upper
    even, loud, low = resize_mixing(mixing, old, new)
    torch.testing.assert_close(even, torch.full((9, 9), 1 / 9))
    torch.testing.assert_close(loud[:8], torch.tensor([1.0] * 8 + [3.0]).expand(8, 9) * 1.4 / 11)
    torch.testing.assert_close(low[:8], even[:8])
    rows = torch.tensor([0.1, 0.1, 0.15, 0.15, 0.25, 0.25, 0.3, 0.3, 0.2])
    torch.testing.assert_close(low[8], rows / rows.sum())
    torch.testing.assert_close(resize_mixing(mixing, old, new).sum(-1)[:, 0], torch.tensor([1, 1.4, 1]))
    assert resize_mixing(mixing, old, BlockLayout((8, 8), (2, 2), (9, 9))) is mixing


def test_resizing_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"has extra tokens: add their row and column with extend_mixing"):
        resize_mixing(torch.rand(6, 6), LAYOUT, BlockLayout((8, 12), (2, 3), (0, 1)))
    with pytest.raises(ValueError, match=r"\[\.\.\., M, M_k\] with M = 6 .* got \(4, 4\)"):
        resize_mixing(torch.rand(4, 4), LAYOUT, LAYOUT)
    with pytest.raises(ValueError, match="the numbers of axes differ"):
        resize_mixing(torch.rand(6, 6), LAYOUT, BlockLayout((1, 2, 3), (1, 2, 3)))


@pytest.mark.parametrize("layout", [BlockLayout((8, 8), (2, 4)), BlockLayout((5, 6, 4), (3, 1, 2))], ids=str)
def test_relative_mixing_is_a_function_of_the_offset(layout: BlockLayout) -> None:
    count = math.prod(2 * blocks - 1 for blocks in layout.blocks)
    weights = torch.rand(3, count)
    matrix = relative_mixing(weights, layout.blocks)
    assert matrix.shape == (3, layout.num_blocks, layout.num_blocks)
    positions = torch.cartesian_prod(*(torch.arange(blocks) for blocks in layout.blocks))
    by_offset: dict[tuple[int, ...], Tensor] = {}
    for i, j in itertools.product(range(layout.num_blocks), repeat=2):
        offset = tuple((positions[i] - positions[j]).tolist())
        assert torch.equal(matrix[:, i, j], by_offset.setdefault(offset, matrix[:, i, j]))
    assert len(by_offset) == count
    torch.testing.assert_close(offset_means(matrix, layout.blocks), weights)


def test_extra_tokens_lie_at_no_offset_and_have_weights_of_their_own() -> None:
    weights = torch.rand(3, 3 * 5 + 3)
    matrix = relative_mixing(weights, (2, 3), extra=True)
    assert matrix.shape == (3, 7, 7)
    torch.testing.assert_close(matrix[:, :6, :6], relative_mixing(weights[:, :15], (2, 3)))
    column, row, own = weights[:, 15:].unbind(1)
    assert torch.equal(matrix[:, :6, 6], column[:, None].expand(3, 6))
    assert torch.equal(matrix[:, 6, :6], row[:, None].expand(3, 6))
    assert torch.equal(matrix[:, 6, 6], own)
    torch.testing.assert_close(offset_means(matrix, (2, 3), extra=True), weights)


def test_mixing_by_content_leaves_out_what_is_masked() -> None:
    q, k = torch.randn(2, 1, 2, 96, 8)
    mask = torch.rand(1, 96) < 0.7
    mixing, strength = torch.rand(4, 4), torch.ones(2)
    layout = BlockLayout((8, 12), (2, 2))
    found = [
        content_mixing(
            mixing, q, torch.where(mask[:, None, :, None], k, held), strength, layout, key_mask=mask
        )
        for held in (torch.tensor(0.0), torch.tensor(100.0), torch.tensor(math.nan))
    ]
    assert found[0].isfinite().all()
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert not torch.allclose(content_mixing(mixing, q, k, strength, layout), found[0])


def test_content_is_weighed_in_float32_under_autocast() -> None:
    q, k = torch.randn(2, 1, 2, 16, 8)
    arguments = (torch.rand(4, 4), q, k, torch.ones(2), BlockLayout((4, 4), (2, 2)))
    expected = content_mixing(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        found = content_mixing(*arguments)
    torch.testing.assert_close(found, expected)


def test_queries_that_are_zero_get_no_gradient_of_their_direction() -> None:
    q, k = torch.zeros(1, 2, 16, 8, requires_grad=True), torch.randn(1, 2, 16, 8)
    mixing = content_mixing(torch.rand(4, 4), q, k, torch.ones(2), BlockLayout((4, 4), (2, 2)))
    (gradient,) = torch.autograd.grad(mixing[..., 0].sum(), q)
    assert not gradient.any()


def test_weights_of_offsets_are_stored_from_the_key_behind_to_the_key_in_front() -> None:
    by_offset = torch.tensor([1.0, 2.0, 3.0])
    expected = torch.tensor([[2.0, 1.0], [3.0, 2.0]])
    assert torch.equal(relative_mixing(by_offset, (2,)), expected), "query - key of -1, 0, 1"


def test_extra_tokens_weigh_as_the_most_weighed_block() -> None:
    wider = extend_mixing(torch.tensor([[0.2, 0.6], [0.5, 0.5]]))
    torch.testing.assert_close(wider[0, 2], wider[0, 1])
