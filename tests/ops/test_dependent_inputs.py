"""Gradients, with a graph of their own, where queries, keys, values and weights depend on each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mhla_diffusion import MHLA, MHLAConfig
from mhla_diffusion.ops import BlockLayout, content_mixing, mhla, mhla_local, mhla_reference

LAYOUT = BlockLayout((4, 6), (2, 3))


def _content(x: Tensor, mixing: Tensor) -> Tensor:
    k = x.tanh()
    weights = content_mixing(mixing, x, k, torch.ones(2, dtype=x.dtype), LAYOUT)
    return mhla(x, k, x + 1, weights, LAYOUT)


def _window(x: Tensor, mixing: Tensor) -> Tensor:
    weight = torch.zeros(2, dtype=x.dtype)
    return mhla_local(x, x, x, mixing, LAYOUT, window=(x, x.tanh()), weight=weight, form="shared")


FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "all one": lambda x, w: mhla(x, x, x, w, LAYOUT),
    "values of keys": lambda x, w: mhla(x.sin(), x, 2 * x, w, LAYOUT),
    "keys of queries": lambda x, w: mhla(x, x.tanh(), x + 1, w, LAYOUT),
    "weights of content": _content,
    "a window": _window,
}


@pytest.mark.parametrize("form", FORMS)
def test_a_graph_of_the_gradient_changes_no_gradient(form: str) -> None:
    torch.manual_seed(0)
    mixing = torch.rand(6, 6, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 2, 24, 4, dtype=torch.float64, requires_grad=True)
    out = FORMS[form](x, mixing).pow(2).sum()
    plain = torch.autograd.grad(out, (x, mixing), retain_graph=True)
    with_graph = torch.autograd.grad(out, (x, mixing), create_graph=True)
    for found, expected in zip(with_graph, plain, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


def test_both_orders_are_those_of_the_reference() -> None:
    torch.manual_seed(0)
    mixing = torch.rand(6, 6, dtype=torch.float64)

    def orders(operator: Any) -> tuple[Tensor, Tensor]:
        x = torch.randn(2, 2, 24, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        x.requires_grad_()
        first = torch.autograd.grad(operator(x, x, x, mixing, LAYOUT).pow(2).sum(), x, create_graph=True)[0]
        return first, torch.autograd.grad(first.pow(2).sum(), x)[0]

    for found, expected in zip(orders(mhla), orders(mhla_reference), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_layer_with_content_has_one_gradient() -> None:
    torch.manual_seed(0)
    config = MHLAConfig.paper(blocks=4, mixing_content=True, constraint="softmax")
    layer = MHLA(config, heads=2, head_dim=8, grid=(4, 4)).double()
    assert layer.strength is not None
    layer.strength.data.fill_(0.7)
    q, k, v = (torch.randn(1, 2, 16, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out = layer(q, k, v, grid=(4, 4)).pow(2).sum()
    plain = torch.autograd.grad(out, q, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(out, q, create_graph=True)[0], plain)


def test_directions_of_nothing_have_no_gradient() -> None:
    q = torch.randn(1, 1, 16, 4)
    layout = BlockLayout((4, 4), (2, 2))
    q[:, :, layout.block_index("cpu") == 0] = 0
    q.requires_grad_()
    content_mixing(torch.rand(4, 4), q, torch.randn(1, 1, 16, 4), torch.ones(1), layout).sum().backward()
    assert q.grad is not None
    assert q.grad.abs().max() < 100
    content_mixing(torch.rand(4, 4), q, torch.randn(1, 1, 16, 4), torch.ones(1), layout).pow(
        2
    ).sum().backward()
    assert q.grad.abs().max() < 100
    assert q.grad.abs().max() > 0
