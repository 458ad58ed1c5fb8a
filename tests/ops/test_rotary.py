"""Tables of positions, which layers share."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from mhla_diffusion.ops import BlockLayout, mhla, rotary
from mhla_diffusion.ops.rotary import rotary_table


def positions() -> tuple[Tensor, Tensor]:
    """As Wan has them: each cosine and sine twice, ``[1, N, 1, d]``."""
    angles = torch.rand(1, 24, 1, 4).repeat_interleave(2, -1) * 6
    return angles.cos(), angles.sin()


def views(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Views that each layer takes anew."""
    return cos[:, :, 0, 0::2], sin[:, :, 0, 1::2]


def test_layers_share_a_table_until_it_would_be_another() -> None:
    with torch.no_grad():
        cos, sin = positions()
        table = rotary_table(views(cos, sin))
        assert table is not None
        assert rotary_table(views(cos, sin)) is table
        torch.testing.assert_close(table, torch.stack(views(cos, sin), -1).flatten(-2))
        others = {
            "other views": (cos[:, :, 0, 0::2][:, 4:], sin[:, :, 0, 1::2][:, 4:]),
            "other sines": views(cos, positions()[1]),
            "sines as cosines": views(sin, sin),
        }
        for name, other in others.items():
            expected = torch.stack(other, -1).flatten(-2)
            torch.testing.assert_close(rotary_table(other), expected, msg=name)
        more = rotary_table(views(cos, sin), 27, (2, 1))
        assert more is not None
        assert more.shape[-2] == 27
        table = rotary_table(views(cos, sin))
        sin.mul_(-1)
        torch.testing.assert_close(
            rotary_table(views(cos, sin)), torch.stack(views(cos, sin), -1).flatten(-2)
        )
        assert not torch.equal(rotary_table(views(cos, sin)), table)  # type: ignore[arg-type]


def test_nothing_is_kept_for_longer_than_the_tensors_of_a_model() -> None:
    gc.collect()
    before = len(rotary._kept)
    cos, sin = positions()
    rotary_table(views(cos, sin))
    assert len(rotary._kept) == before + 1
    del cos
    gc.collect()
    assert len(rotary._kept) == before


def test_a_table_that_was_made_without_gradients_serves_training() -> None:
    """And so does one that was made in inference mode, of tensors from outside."""
    layout = BlockLayout((4, 6), (2, 2))
    for mode in (torch.no_grad, torch.inference_mode):
        cos, sin = positions()
        with mode():
            rotary_table(views(cos, sin))
        q, k, v = (torch.randn(1, 2, 24, 8, requires_grad=True) for _ in range(3))
        mhla(q, k, v, torch.rand(4, 4), layout, rotary_emb=views(cos, sin)).sum().backward()
        assert q.grad is not None
    with torch.inference_mode():
        inside = positions()
        made = rotary_table(views(*inside))
        inside[0].zero_()
        assert not torch.equal(rotary_table(views(*inside)), made)  # type: ignore[arg-type]


def test_training_saves_one_table_for_all_layers() -> None:
    layout, (cos, sin) = BlockLayout((4, 6), (2, 2)), positions()
    saved: set[int] = set()

    def note(x: Tensor) -> Tensor:
        if x.shape == (1, 24, 8) and not x.requires_grad:
            saved.add(x.data_ptr())
        return x

    x = torch.randn(1, 2, 24, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        for _ in range(3):
            x = mhla(x, x, x, torch.rand(4, 4), layout, rotary_emb=views(cos, sin))
    assert len(saved) == 1


@pytest.mark.parametrize("changed", [False, True])
def test_a_compiled_function_follows_the_tables_that_it_is_given(changed: bool) -> None:
    layout = BlockLayout((4, 6), (2, 2))
    q, k, v = torch.randn(3, 1, 2, 24, 8)

    def attend(cos: Tensor, sin: Tensor) -> Tensor:
        return mhla(q, k, v, torch.ones(4, 4), layout, rotary_emb=views(cos, sin))

    compiled: Any = torch.compile(attend, backend="aot_eager", fullgraph=True)
    cos, sin = positions()
    attend(cos, sin)
    compiled(cos, sin)
    if changed:
        sin.mul_(-1)
    torch.testing.assert_close(compiled(cos, sin), attend(cos, sin))
    torch.testing.assert_close(compiled(sin, cos), attend(sin, cos))
