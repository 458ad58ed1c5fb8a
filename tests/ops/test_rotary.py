"""Tables of positions, as they lie in memory where they can be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mhla_diffusion.ops import BlockLayout, mhla, mhla_reference
from mhla_diffusion.ops.rotary import rotary_table

LAYOUT = BlockLayout((4, 6), (2, 2))
ANGLES = torch.linspace(0, 6, 24 * 4).view(24, 4)
TURNS = torch.polar(torch.ones(24, 4), ANGLES)
TABLE = torch.stack((ANGLES.cos(), ANGLES.sin()), -1)  # [N, d / 2, 2]
BOTH = torch.stack((ANGLES.cos(), ANGLES.sin()), 1)  # [N, 2, d / 2]

PAIRS: dict[str, tuple[Tensor, Tensor, bool]] = {
    "of complex numbers": (TURNS.real, TURNS.imag, True),
    "side by side": (TABLE[..., 0], TABLE[..., 1], True),
    "of each head": (TABLE.expand(2, 24, 4, 2)[..., 0], TABLE.expand(2, 24, 4, 2)[..., 1], True),
    "conjugate": (TURNS.real, TURNS.conj().imag, False),
    "negative": (TABLE[..., 0], TABLE[..., 1]._neg_view(), False),
    "the other way round": (TABLE[..., 1], TABLE[..., 0], False),
    "each by itself": (ANGLES.cos(), ANGLES.sin(), False),
    "one behind the other": (BOTH[:, 0], BOTH[:, 1], False),
    "the same twice": (TABLE[..., 0], TABLE[..., 0], False),
    "neighbours of one channel": (TABLE[:, :1, 0], TABLE[:, :1, 1], True),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_table_is_that_of_its_pairs_and_no_copy_where_they_lie_so(name: str) -> None:
    cos, sin, lie = PAIRS[name]
    table = rotary_table((cos, sin))
    assert table is not None
    torch.testing.assert_close(table, torch.stack((cos, sin), -1).flatten(-2), rtol=0, atol=0)
    assert (table.untyped_storage().data_ptr() == cos.untyped_storage().data_ptr()) == lie


@pytest.mark.parametrize("name", ["of complex numbers", "of each head", "conjugate", "negative"])
def test_the_operator_turns_by_pairs_however_they_lie(name: str) -> None:
    rotary_emb = PAIRS[name][:2]
    inputs = [torch.randn(2, 2, 24, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    arguments: Any = (*inputs, torch.rand(4, 4, dtype=torch.float64), LAYOUT)
    out, expected = (f(*arguments, rotary_emb=rotary_emb) for f in (mhla, mhla_reference))
    torch.testing.assert_close(out, expected)
    found, wanted = (torch.autograd.grad(x.square().sum(), inputs) for x in (out, expected))
    torch.testing.assert_close(found, wanted)


def test_tables_of_the_grid_alone_leave_extra_tokens() -> None:
    table = rotary_table((TURNS.real, TURNS.imag), 27, (2, 1))
    assert table is not None
    ones = torch.tensor([1.0, 0] * 4)
    torch.testing.assert_close(table[[0, 1, 26]], ones.expand(3, 8))
    torch.testing.assert_close(table[2:26], TABLE.flatten(1))
