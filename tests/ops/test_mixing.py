from __future__ import annotations

import pytest
import torch

from mhla_diffusion.ops import MIXING_STARTS, BlockLayout, block_distances, initial_mixing, locality_mixing

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
def test_one_block_is_the_number_one(start: str) -> None:
    assert torch.equal(initial_mixing(BlockLayout((4, 4), (1, 1)), start), torch.ones(1, 1))


def test_an_unknown_start_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'local' is not one of locality, uniform"):
        initial_mixing(LAYOUT, "local")
