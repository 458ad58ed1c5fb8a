"""Pairs of positions, which layers that are given the same tensors share."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mhla_diffusion.backbones import positions
from mhla_diffusion.backbones.positions import rotary_pairs, shared_pairs

LAYER = SimpleNamespace(heads=2, inner_dim=16)


def of_wan() -> tuple[Tensor, Tensor]:
    """Each cosine and sine twice, ``[1, N, 1, d]``."""
    angles = torch.rand(1, 24, 1, 4).repeat_interleave(2, -1) * 6
    return angles.cos(), angles.sin()


def check(given: Any, layer: Any = LAYER) -> None:
    torch.testing.assert_close(shared_pairs(given, layer), rotary_pairs(given, layer), rtol=0, atol=0)


def test_layers_share_pairs_until_they_would_be_others() -> None:
    cos, sin = of_wan()
    first = shared_pairs((cos, sin), LAYER)
    check((cos, sin))
    assert shared_pairs((cos, sin), LAYER) is first
    assert first[0].data_ptr() + 4 == first[1].data_ptr(), "views of one table"
    check((sin, cos))
    check((cos, of_wan()[1]))
    check((cos, sin), SimpleNamespace(heads=1, inner_dim=8, rotary_halves=1))
    check((cos, sin))
    sin.mul_(-1)
    check((cos, sin))
    assert not torch.equal(shared_pairs((cos, sin), LAYER)[1], first[1])
    before = shared_pairs((cos, sin), LAYER)
    cos.data = of_wan()[0]
    check((cos, sin))
    assert not torch.equal(shared_pairs((cos, sin), LAYER)[0], before[0])


def test_complex_numbers_and_their_conjugates_are_told_apart() -> None:
    turns = torch.polar(torch.ones(24, 4), torch.rand(24, 4))
    for given in (turns, turns.conj(), {"query": turns.conj()}, turns):
        check(given)


def test_nothing_is_kept_for_longer_than_the_tensors_of_a_model() -> None:
    gc.collect()
    before = len(positions._kept)
    given = of_wan()
    shared_pairs(given, LAYER)
    assert len(positions._kept) == before + 1
    del given
    gc.collect()
    assert len(positions._kept) == before


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_was_made_without_gradients_serves_training(mode: Any) -> None:
    given = of_wan()
    with mode():
        shared_pairs(given, LAYER)
    x = torch.randn(1, 24, 4, requires_grad=True)
    (x * shared_pairs(given, LAYER)[0]).sum().backward()
    assert x.grad is not None


def test_tensors_of_inference_mode_are_read_anew() -> None:
    with torch.inference_mode():
        given, before = of_wan(), len(positions._kept)
        shared_pairs(given, LAYER)
        given[0].zero_()
        check(given)
        assert len(positions._kept) == before


def test_a_compiled_function_follows_what_it_is_given() -> None:
    def turned(cos: Tensor, sin: Tensor) -> Tensor:
        return torch.stack(shared_pairs((cos, sin), LAYER))

    compiled: Any = torch.compile(turned, backend="aot_eager", fullgraph=True)
    cos, sin = of_wan()
    turned(cos, sin)
    for given in ((cos, sin), (sin, cos), (cos, sin.mul_(-1))):
        torch.testing.assert_close(compiled(*given), torch.stack(rotary_pairs(given, LAYER)))
