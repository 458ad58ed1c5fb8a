"""A model over two ranks is the model of one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from torch import Tensor

from mhla_diffusion import MHLA, MHLAConfig, MHLADiTTransformer2DModel

SETTINGS: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 3, "num_layers": 2, "sample_size": 8,
    "patch_size": 2, "num_embeds_ada_norm": 4, "mhla_config": {"blocks": 4, "gate": True},
}  # fmt: skip


def make(seed: int = 0) -> tuple[MHLADiTTransformer2DModel, dict[str, Tensor]]:
    torch.manual_seed(seed)
    model = MHLADiTTransformer2DModel(**SETTINGS)
    for parameter in model.parameters():
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.2)
    inputs = {
        "hidden_states": torch.randn(2, 3, 4, 16), "timestep": torch.tensor([10, 500]),
        "class_labels": torch.tensor([0, 3]),
    }  # fmt: skip
    return model, inputs


def compare(rank: int) -> None:
    model, inputs = make()
    expected = model(**inputs).sample
    cotangent = torch.randn_like(expected)
    references = torch.autograd.grad(expected, list(model.parameters()), cotangent)
    # diffusers 0.42 divides by the number of accelerators to find this rank's device, even on a CPU.
    torch.accelerator.device_count = lambda: 1
    # On a grid of 2 x 8 in 2 x 2 blocks each rank has one row of every block.
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    found = model(**inputs).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    gradients = torch.autograd.grad(found, list(model.parameters()), cotangent)
    for gradient, reference in zip(gradients, references, strict=True):
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


def compare_both(rank: int) -> None:
    compare(rank)
    compare_unequal_shares(rank)


def test_two_ranks_equal_one_process(run_processes: Callable[..., None]) -> None:
    run_processes(compare_both, 2)


@pytest.mark.parametrize(
    "change",
    [{"attention": ["mhla", "softmax"]}, {"mhla_config": {"blocks": 4, "cpe": "zero"}},
     {"mhla_config": {"blocks": 4, "normalizer": "official"}}],
    ids=str,
)  # fmt: skip
def test_what_needs_the_tokens_of_other_ranks_is_refused(change: dict[str, Any]) -> None:
    model = MHLADiTTransformer2DModel(**{**SETTINGS, **change})
    with pytest.raises(ValueError, match="context parallelism needs linear attention in every layer"):
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
