"""torch.compile, of whole models and of their repeated blocks, on one grid after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from .cases import EVERY_PART, Case, sample

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.mark.parametrize("dynamic", [None, True])
@torch.no_grad()
def test_a_model_is_one_graph_for_each_grid(case: Case, dynamic: bool | None) -> None:
    """By torch.compile's own defaults sizes are symbolic from the second one on."""
    model = case.make(attention=["mhla", case.stock_kind], mhla=EVERY_PART)
    graphs = 0

    def backend(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=dynamic)
    for grid, expected_graphs in [(0, 1), (3, 2), (0, 2), (3, 2)]:
        inputs = case.inputs(model, case.grids[grid])
        torch.testing.assert_close(sample(compiled, inputs), sample(model, inputs))
        assert graphs == expected_graphs


@torch.no_grad()
def test_repeated_blocks_are_compiled_for_each_grid(case: Case) -> None:
    model = case.make(attention=["mhla", case.stock_kind], mhla=EVERY_PART)
    inputs = [case.inputs(model, grid) for grid in case.grids[:2]]
    expected = [sample(model, batch) for batch in inputs]
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    for batch, output in zip(inputs, expected, strict=True):
        torch.testing.assert_close(sample(model, batch), output)
    blocks = getattr(model, case.layers)
    assert all(block._compiled_call_impl is not None for block in blocks)


def test_compiled_training_gives_the_same_gradients(case: Case) -> None:
    model = case.make(mhla=EVERY_PART)
    inputs = case.inputs(model, case.grids[3])
    parameters = list(model.parameters())
    expected = torch.autograd.grad(sample(model, inputs).square().mean(), parameters)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(sample(compiled, inputs).square().mean(), parameters)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
