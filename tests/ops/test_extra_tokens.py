"""Tokens that lie on no grid, and keys that do not count, against the O(N^2) reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mhla_diffusion.ops import BlockLayout, mhla, mhla_reference
from tests.ops.test_mhla import LAYOUTS, check_against_reference, make_inputs, make_rotary

AssertClose = Callable[..., None]


@pytest.mark.parametrize("extra", [(None, (2, 1)), ((1, 0), None), ((0, 2), (3, 0))], ids=str)
def test_queries_and_keys_may_each_have_extra_tokens(assert_close: AssertClose, extra: Any) -> None:
    layout, key_layout = BlockLayout((7, 9), (3, 2), extra[0]), BlockLayout((11,), (4,), extra[1])
    q, k, v = (torch.randn(2, 3, x.num_tokens, 8) for x in (layout, key_layout, key_layout))
    mixing = torch.rand(layout.num_blocks, key_layout.num_blocks)
    inputs = tuple(x.requires_grad_() for x in (q, k, v, mixing))
    check_against_reference(assert_close, layout, torch.float32, inputs=inputs, key_layout=key_layout)


def test_a_key_mask_equals_the_reference_and_a_shorter_sequence(assert_close: AssertClose) -> None:
    layout = BlockLayout((4, 6), (2, 3))
    key_mask = torch.rand(2, 24) > 0.3
    check_against_reference(assert_close, layout, torch.float32, key_mask=key_mask)
    # What the masked keys and values hold does not matter.
    q, k, v, mixing = (x.detach() for x in make_inputs(layout))
    hidden = ~key_mask[:, None, :, None]
    noisy_k, noisy_v = (torch.where(hidden, 1e3 * torch.randn_like(x), x) for x in (k, v))
    torch.testing.assert_close(
        mhla(q, noisy_k, noisy_v, mixing, layout, key_mask=key_mask),
        mhla(q, k, v, mixing, layout, key_mask=key_mask),
    )


EXTRA = [layout for layout in LAYOUTS if layout.extra is not None and any(layout.extra)]


@pytest.mark.parametrize("layout", EXTRA, ids=str)
def test_extra_tokens_are_one_more_block(layout: BlockLayout) -> None:
    """The dense matrix, written down: W has a last row and a last column for them."""
    assert layout.extra is not None
    q, k, v, mixing = make_inputs(layout)
    on_grid = BlockLayout(layout.grid, layout.blocks).block_index().tolist()
    before, after = ([len(mixing) - 1] * count for count in layout.extra)
    block = torch.tensor(before + on_grid + after)
    weights = mixing[block][:, block] * ((q.relu() + 1e-6) @ (k.relu() + 1e-6).mT)
    expected = weights @ v / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(mhla(q, k, v, mixing, layout), expected)
    torch.testing.assert_close(mhla_reference(q, k, v, mixing, layout), expected)


@pytest.mark.parametrize("normalizer", ["paper", "none"])
@pytest.mark.parametrize("layout", EXTRA, ids=str)
def test_positions_of_the_grid_alone_leave_extra_tokens_as_they_are(
    assert_close: AssertClose, layout: BlockLayout, normalizer: str
) -> None:
    cos, sin = make_rotary(layout)
    inside = layout.grid_tokens
    tables = cos[inside], sin[inside]
    check_against_reference(assert_close, layout, torch.float32, rotary_emb=tables, normalizer=normalizer)
    q, k, v, mixing = make_inputs(layout)
    still = torch.ones(layout.num_tokens, dtype=torch.bool)
    still[inside] = False
    cos[still], sin[still] = 1, 0
    found, expected = (
        mhla(q, k, v, mixing, layout, rotary_emb=emb, normalizer=normalizer) for emb in (tables, (cos, sin))
    )
    assert torch.equal(found, expected)


def test_extra_tokens_before_or_after_the_grid_are_the_same(assert_close: AssertClose) -> None:
    after = BlockLayout((4, 6), (2, 2), extra=(0, 3))
    q, k, v, mixing = make_inputs(after)
    expected = mhla(q, k, v, mixing, after)
    for before in (1, 3):
        layout = BlockLayout((4, 6), (2, 2), extra=(before, 3 - before))
        moved = (x.roll(before, 2) for x in (q, k, v))
        assert_close(mhla(*moved, mixing, layout), expected.roll(before, 2))


@pytest.mark.parametrize("text", [0, 1, 4, 9])
def test_padding_of_text_does_not_count_whatever_the_length(assert_close: AssertClose, text: int) -> None:
    """One W for texts of any length; outputs and gradients of a padded text are those of the text."""
    grid, blocks, longest = (4, 5), (2, 2), 9
    padded = BlockLayout(grid, blocks, extra=(0, longest))
    inputs = make_inputs(padded)
    layout, real = BlockLayout(grid, blocks, extra=(0, text)), slice(20 + text)
    short = [*(x.detach()[:, :, real].requires_grad_() for x in inputs[:3]), inputs[3]]
    mask = torch.arange(29).expand(2, -1) < 20 + text
    out, expected = mhla(*inputs, padded, key_mask=mask)[:, :, real], mhla(*short, layout)
    assert_close(out, expected)
    cotangent = torch.randn_like(out)
    gradients, references = (
        torch.autograd.grad(y, x, cotangent) for y, x in ((out, inputs), (expected, short))
    )
    for gradient, reference in zip(gradients[:3], references[:3], strict=True):
        assert_close(gradient[:, :, real], reference)
        assert not gradient[:, :, real.stop :].any()
    assert_close(gradients[3], references[3])
    check_against_reference(assert_close, layout, torch.float32)
