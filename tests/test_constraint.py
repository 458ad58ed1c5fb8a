"""Mixing matrices stay in [0, 1], whatever steps them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mhla_diffusion import MHLAConfig
from mhla_diffusion.attention import MHLA

from .test_attention import make_module


def step_far_out(module: MHLA, optimizer_class: Callable[..., torch.optim.Optimizer], **options: Any) -> None:
    """One optimizer step whose gradient pushes half of the weights up and half down, far out of [0, 1]."""
    assert module.mixing is not None
    optimizer = optimizer_class([module.mixing], lr=10.0, **options)
    signs = torch.ones_like(module.mixing)
    signs[..., ::2] = -1
    (module.mixing * signs).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
@pytest.mark.parametrize("origin", ["new", "deepcopy", "pickle"])
def test_mixing_stays_in_range_after_any_optimizer_step(
    optimizer_class: Callable[..., torch.optim.Optimizer], origin: str
) -> None:
    module, _, _ = make_module(MHLAConfig(blocks=4))
    if origin == "deepcopy":
        module = copy.deepcopy(module)
    elif origin == "pickle":
        module = pickle.loads(pickle.dumps(module))
    step_far_out(module, optimizer_class)
    assert module.mixing is not None
    assert module.mixing.min() == 0
    assert module.mixing.max() == 1


class FlatCopy(torch.optim.SGD):
    """Steps a part of a flat copy, and writes it over the weights, as DeepSpeed's ZeRO does."""

    def __init__(self, weight: torch.nn.Parameter, lr: float) -> None:
        self.copy = torch.nn.Parameter(torch.cat((weight.detach().flatten(), torch.ones(3))))
        super().__init__([self.copy], lr)
        self.weight, part = weight, self.copy.detach()[: weight.numel()]
        weight._hp_mapping = SimpleNamespace(hp_fragment=part)  # type: ignore[attr-defined]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert self.weight.grad is not None
        self.copy.grad = torch.cat((self.weight.grad.flatten(), torch.ones(3)))
        super().step(closure)


def test_mixing_stays_in_range_where_an_optimizer_steps_a_copy() -> None:
    module, _, _ = make_module(MHLAConfig.paper(blocks=4))
    assert module.mixing is not None
    optimizer = FlatCopy(module.mixing, lr=10)
    signs = torch.ones_like(module.mixing)
    signs[..., ::2] = -1
    (module.mixing * signs).sum().backward()
    optimizer.step()
    copied = optimizer.copy.detach()
    assert (copied[:-3].min(), copied[:-3].max()) == (0, 1)
    assert (copied[-3:] == -9).all(), "what lies beside it is no mixing matrix"


def test_without_constraint_mixing_is_free() -> None:
    module, _, _ = make_module(MHLAConfig(blocks=4, constraint="none"))
    step_far_out(module, torch.optim.SGD)
    assert module.mixing is not None
    assert module.mixing.min() < 0


def test_another_models_optimizer_does_not_break_a_graph() -> None:
    module, (q, k, v), _ = make_module(MHLAConfig.paper(blocks=4))
    out = module(q, k, v, grid=(4, 6))
    other, _, _ = make_module(MHLAConfig.paper(blocks=4))
    step_far_out(other, torch.optim.SGD)
    out.sum().backward()
    assert module.mixing is not None
    assert module.mixing.grad is not None
