"""torch.compile, of whole models and of their repeated blocks, on one grid after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from .cases import CASES, EVERY_PART, sample

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


# By torch.compile's own defaults sizes are symbolic from the second one on; with dynamic, from the first.
@pytest.mark.parametrize(("name", "dynamic"), [*((name, None) for name in CASES), ("DiT", True)], ids=str)
@torch.no_grad()
def test_a_model_is_compiled_once_for_each_grid(name: str, dynamic: bool | None) -> None:
    case = CASES[name]
    model = case.make(num_layers=1, mhla=EVERY_PART)
    graphs = 0

    def backend(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=dynamic)
    counts = []
    for grid in (0, 3, 0, 3):
        inputs = case.inputs(model, case.grids[grid])
        torch.testing.assert_close(sample(compiled, inputs), sample(model, inputs))
        counts.append(graphs)
    assert counts[1] > counts[0] > 0
    assert counts[1:] == [counts[1]] * 3, "a grid that was seen is not compiled again"


@pytest.mark.parametrize("name", ["DiT", "Wan"])
@torch.no_grad()
def test_a_model_is_compiled_once_for_all_batch_sizes_but_one(name: str) -> None:
    case = CASES[name]
    model = case.make(num_layers=1, mhla=EVERY_PART)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for batch_size in (2, 3, 5, 4, 7, 6):  # among them the number of blocks, 4
        inputs = case.inputs(model, batch_size=batch_size)
        torch.testing.assert_close(sample(compiled, inputs), sample(model, inputs))
    assert counter.frame_count == 2, "one for the first size, one for all others"


@torch.no_grad()
def test_a_model_is_exported_for_any_batch_size() -> None:
    case = CASES["DiT"]
    model = case.make(num_layers=1, mhla=EVERY_PART)
    inputs = case.inputs(model, batch_size=2)
    sizes = {name: {0: torch.export.Dim("batch", min=2, max=64)} for name in inputs}
    program = torch.export.export(model, (), inputs, dynamic_shapes=sizes).module()
    inputs = case.inputs(model, batch_size=5)
    torch.testing.assert_close(program(**inputs).sample, sample(model, inputs))


# A stock layer beside ours is another graph of the same block, however its backbone is called. What a second
# grid brings is alike for all backbones.
@pytest.mark.parametrize(
    ("name", "hybrid"), [*((name, False) for name in CASES), ("Sana", True), ("Wan", True)], ids=str
)
@torch.no_grad()
def test_repeated_blocks_are_compiled_for_each_grid(name: str, hybrid: bool) -> None:
    case = CASES[name]
    layers = {"attention": ["mhla", case.stock_kind]} if hybrid else {"num_layers": 1}
    model = case.make(**layers, mhla=EVERY_PART)
    grids = case.grids[:2] if hybrid or name in ("DiT", "Wan") else case.grids[1:2]
    inputs = [case.inputs(model, grid) for grid in grids]
    expected = [sample(model, batch) for batch in inputs]
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    for batch, output in zip(inputs, expected, strict=True):
        torch.testing.assert_close(sample(model, batch), output)
    blocks = getattr(model, case.layers)
    assert all(block._compiled_call_impl is not None for block in blocks)


@pytest.mark.parametrize("name", ["DiT", "Wan"])
def test_compiled_training_gives_the_same_gradients(name: str) -> None:
    case = CASES[name]
    model = case.make(num_layers=1, mhla=EVERY_PART)
    inputs = case.inputs(model, case.grids[3])
    parameters = list(model.parameters())
    expected = torch.autograd.grad(sample(model, inputs).square().mean(), parameters)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(sample(compiled, inputs).square().mean(), parameters)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
