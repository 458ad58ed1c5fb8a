"""The constraint holds after any optimizer's step, whatever way the model came about."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mhla_diffusion import MHLAAttnProcessor, MHLADiTTransformer2DModel

MakeModel = Callable[..., MHLADiTTransformer2DModel]
MakeInputs = Callable[..., dict[str, Tensor]]

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=1e4),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=5.0),
    "Adam foreach": lambda parameters: torch.optim.Adam(parameters, lr=5.0, foreach=True),
    "AdamW fused": lambda parameters: torch.optim.AdamW(parameters, lr=5.0, fused=True),
}


def as_it_is(model: MHLADiTTransformer2DModel, folder: Path) -> MHLADiTTransformer2DModel:
    return model


def copied(model: MHLADiTTransformer2DModel, folder: Path) -> MHLADiTTransformer2DModel:
    return copy.deepcopy(model)


def loaded(model: MHLADiTTransformer2DModel, folder: Path, **options: Any) -> MHLADiTTransformer2DModel:
    model.save_pretrained(folder)
    return MHLADiTTransformer2DModel.from_pretrained(folder, **options)


def loaded_at_once(model: MHLADiTTransformer2DModel, folder: Path) -> MHLADiTTransformer2DModel:
    return loaded(model, folder, low_cpu_mem_usage=False)


def cast(model: MHLADiTTransformer2DModel, folder: Path) -> MHLADiTTransformer2DModel:
    return model.to(torch.float64)


@pytest.mark.parametrize("origin", [as_it_is, copied, loaded, loaded_at_once, cast])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_mixing_lies_in_range_after_any_step(
    make_model: MakeModel,
    make_inputs: MakeInputs,
    tmp_path: Path,
    optimizer: str,
    origin: Callable[..., MHLADiTTransformer2DModel],
) -> None:
    model = origin(make_model(), tmp_path)
    mixing = [m.mixing for m in model.modules() if isinstance(m, MHLAAttnProcessor)]
    before = [matrix.clone() for matrix in mixing]
    # The mixing matrices alone: elsewhere such a step would leave nothing finite to look at.
    step = OPTIMIZERS[optimizer](mixing)
    model(**make_inputs(dtype=model.dtype)).sample.square().mean().backward()
    step.step()
    for matrix, start in zip(mixing, before, strict=True):
        assert not torch.equal(matrix, start)
        assert matrix.min() == 0
        assert matrix.max() == 1


def test_anothers_step_leaves_a_living_graph_alone(make_model: MakeModel, make_inputs: MakeInputs) -> None:
    model = make_model()
    expected = torch.autograd.grad(model(**make_inputs()).sample.square().mean(), list(model.parameters()))
    loss = model(**make_inputs()).sample.square().mean()
    other = torch.nn.Linear(2, 2)
    other(torch.ones(2)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=1.0).step()
    assert all(map(torch.equal, torch.autograd.grad(loss, list(model.parameters())), expected))
