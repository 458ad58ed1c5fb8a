"""A model over two ranks is the model of one process."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig

from mhla_diffusion import MHLA, MHLAConfig

from .cases import CASES, Case, sample

# What stock classes, or ours, say of how their tokens are spread.
# LTX gives a mask of its text, which diffusers 0.42 does not spread: stock LTX fails too.
PLANNED = [name for name, case in CASES.items() if case.model._cp_plan and name != "LTXVideo"]


def compare(rank: int, name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model = case.make(mhla={"gate": True})
    # Of 2 x 8 tokens in 2 x 2 blocks each rank has one row of every block.
    inputs = case.inputs(model, case.grids[1])
    expected = sample(model, inputs)
    cotangent = torch.randn_like(expected)
    references = torch.autograd.grad(expected, list(model.parameters()), cotangent, allow_unused=True)
    # diffusers 0.42 divides by the number of accelerators to find this rank's device, even on a CPU.
    torch.accelerator.device_count = lambda: 1
    assert dist.get_world_size() == 2
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    tokens: list[int] = []

    def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens.append((args[0] if args else kwargs["hidden_states"]).shape[1])

    getattr(model, case.layers)[1].register_forward_pre_hook(note, with_kwargs=True)
    found = sample(model, inputs)
    assert tokens == [math.prod(case.grids[1]) // 2], "each rank has half of them"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    gradients = torch.autograd.grad(found, list(model.parameters()), cotangent, allow_unused=True)
    for (parameter, _), gradient, reference in zip(
        model.named_parameters(), gradients, references, strict=True
    ):
        if ".processor." in parameter:
            total = gradient.clone()
            dist.all_reduce(total)
            torch.testing.assert_close(total, reference, rtol=1e-3, atol=1e-4)


def compare_unequal_shares(rank: int) -> None:
    """Of 15 tokens, by the module alone: diffusers spreads them unequally on a GPU only."""
    torch.manual_seed(0)
    module = MHLA(MHLAConfig(blocks=(2, 2), qk_norm=True, output_norm=True), heads=2, head_dim=6, grid=(3, 5))
    q, k, v = torch.randn(3, 1, 2, 15, 6)
    expected = module(q, k, v, grid=(3, 5)).tensor_split(2, 1)[rank]
    q, k, v = (x.tensor_split(2, 2)[rank] for x in (q, k, v))
    found = module(q, k, v, grid=(3, 5), group=dist.group.WORLD)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", PLANNED)
def test_two_ranks_equal_one_process(run_processes: Callable[..., None], name: str) -> None:
    run_processes(compare, 2, name)


def test_two_unequal_shares_equal_the_whole(run_processes: Callable[..., None]) -> None:
    run_processes(compare_unequal_shares, 2)


@pytest.mark.parametrize(
    "change",
    [
        lambda case: {"attention": ["mhla", case.stock_kind]},
        lambda case: {"mhla": {"cpe": "zero"}},
        lambda case: {"mhla": {"normalizer": "official"}},
    ],
    ids=["stock layer", "cpe", "official"],
)
def test_what_needs_the_tokens_of_other_ranks_is_refused(
    case: Case, change: Callable[[Case], dict[str, Any]]
) -> None:
    with pytest.raises(ValueError, match="context parallelism needs linear attention in every layer"):
        case.make(**change(case)).enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
