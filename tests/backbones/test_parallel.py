"""A model over two ranks is the model of one process."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import ContextParallelConfig
from diffusers.models.attention_processor import Attention

from mhla_diffusion import MHLA, MHLAAttnProcessor, MHLAConfig

from .cases import CASES, Case, sample

# What stock classes, or ours, say of how their tokens are spread.
# LTX gives a mask of its text, which diffusers 0.42 does not spread: stock LTX fails too.
PLANNED = [name for name, case in CASES.items() if case.model._cp_plan and name != "LTXVideo"]


def compare(rank: int, name: str, mhla: dict[str, Any]) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model = case.make(mhla=mhla)
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


# What looks at all tokens is computed by heads.
FORMS: dict[str, dict[str, Any]] = {
    "summaries": {"qk_norm": True, "output_norm": True},
    "window": {
        "mixing_per_head": True, "local": "gate", "local_margin": 1, "cpe": "identity", "qk_conv": True,
    },
    "extra": {
        "extra_block": True, "feature_map": "hedgehog", "mixing_content": True, "mixing_relative": True,
    },
    "official": {"normalizer": "official", "center_keys": True},
    "alone": {"local": "only", "routed_blocks": 1},
}  # fmt: skip


def compare_forms(rank: int) -> None:
    """By the module alone, of 15 tokens: diffusers spreads them unequally on a GPU only."""
    for name, settings in FORMS.items():
        torch.manual_seed(0)
        grid, blocks = ((4, 4), (2, 2)) if name == "official" else ((3, 5), (2, 2))
        module = MHLA(MHLAConfig.paper(blocks=blocks, **settings), heads=4, head_dim=6, grid=grid)
        for parameter in module.parameters():
            torch.nn.init.uniform_(parameter, 0.1, 1)
        number = math.prod(grid)
        extras = [(1, 2), (0, 0)] if module.config.extra_block else None
        shares = list(torch.arange(number).tensor_split(2))
        if extras is not None:  # tokens 15 and on
            shares[0] = torch.cat((torch.tensor([number]), shares[0], torch.arange(number + 1, number + 3)))
        tokens = number + (0 if extras is None else 3)
        tensors = [x.requires_grad_() for x in torch.randn(3, 2, 4, tokens, 6).unbind()]
        angles, mask = torch.rand(2, 4, tokens, 3), torch.rand(2, tokens) > 0.2
        own, whole, mine = shares[rank], {}, {}
        if name != "official":
            whole = {"key_mask": mask, "rotary_emb": (angles.cos(), angles.sin())}
            tables = angles[:, :, own]
            mine = {"key_mask": mask[:, own], "rotary_emb": (tables.cos(), tables.sin())}
        if name == "window":  # a rank on which nothing is hidden may have no mask
            mask[:, shares[1]] = True
            mine["key_mask"] = None if rank == 1 else mask[:, own]
        expected = module(*tensors, grid=grid, extra=extras and (0, 3), **whole)
        cotangent = torch.randn_like(expected)
        weights = list(module.parameters())
        references = torch.autograd.grad(expected, [*tensors, *weights], cotangent, create_graph=True)
        if name == "extra":
            penalty = sum(x.square().sum() for x in references[:3])
            references_twice = torch.autograd.grad(penalty, tensors)
        parts = [x.detach()[:, :, own].requires_grad_() for x in tensors]
        found = module(
            *parts, grid=grid, extra=extras and extras[rank], group=dist.group.WORLD, **mine
        )  # fmt: skip
        torch.testing.assert_close(found, expected[:, own])
        gradients = torch.autograd.grad(found, [*parts, *weights], cotangent[:, own], create_graph=True)
        if name == "extra":
            twice = torch.autograd.grad(sum(x.square().sum() for x in gradients[:3]), parts)
            for gradient, reference in zip(twice, references_twice, strict=True):
                torch.testing.assert_close(gradient, reference[:, :, own], rtol=1e-4, atol=1e-4)
        for gradient, reference in zip(gradients[:3], references[:3], strict=True):
            torch.testing.assert_close(gradient, reference[:, :, own])
        for gradient, reference in zip(gradients[3:], references[3:], strict=True):
            total = gradient.clone()
            dist.all_reduce(total)
            torch.testing.assert_close(total, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "mhla", [{"gate": True}, {"gate": True, "local": "auto"}], ids=["summaries", "heads"]
)
@pytest.mark.parametrize("name", PLANNED)
def test_two_ranks_equal_one_process(
    run_processes: Callable[..., None], name: str, mhla: dict[str, Any]
) -> None:
    run_processes(compare, 2, name, mhla)


def test_forms_over_unequal_shares_equal_the_whole(run_processes: Callable[..., None]) -> None:
    run_processes(compare_forms, 2)


def compare_checkpointed(rank: int) -> None:
    """Shares of 1,024 and 1,023 tokens, between which lies what is computed again in the backward."""
    torch.manual_seed(0)
    grid = (23, 89)
    layer = Attention(32, heads=4, dim_head=8)
    layer.set_processor(
        MHLAAttnProcessor(MHLAConfig(blocks=(4, 4), gate=True), heads=4, head_dim=8, grid=grid)
    )
    x = torch.randn(1, math.prod(grid), 32)
    expected = layer(x, grid=grid).tensor_split(2, 1)[rank]
    mesh = SimpleNamespace(get_group=lambda: dist.group.WORLD)
    layer.processor._parallel_config = SimpleNamespace(
        context_parallel_config=SimpleNamespace(_flattened_mesh=mesh)
    )
    found = layer(x.tensor_split(2, 1)[rank], grid=grid)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    found.square().sum().backward()
    none = torch.zeros(3, 1, 4, 1, 8)[..., : 1 - rank, :].requires_grad_()  # a rank without any token
    out = MHLA(MHLAConfig(blocks=4), heads=4, head_dim=8, grid=(4, 4))(
        *none, grid=(1, 1), group=dist.group.WORLD
    )
    assert out.shape == (1, 1 - rank, 32)
    out.sum().backward()
    hooked = MHLA(MHLAConfig(blocks=4, cpe="zero"), heads=4, head_dim=8, grid=(4, 4))
    add_hook_to_module(hooked.cpe, ModelHook())
    with pytest.raises(ValueError, match=r"a hook on Conv2d .* sees all heads"):
        hooked(*torch.zeros(3, 1, 4, 8, 8), grid=(4, 4), group=dist.group.WORLD)


def test_ranks_agree_on_what_is_computed_again_and_may_be_empty(run_processes: Callable[..., None]) -> None:
    run_processes(compare_checkpointed, 2)


def test_stock_layers_are_refused(case: Case) -> None:
    with pytest.raises(ValueError, match="context parallelism needs linear attention or MHLA in every layer"):
        case.make(attention=["mhla", case.stock_kind]).enable_parallelism(
            config=ContextParallelConfig(ulysses_degree=2)
        )


def test_models_without_a_plan_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"no plan .* SanaTransformer2DModel .* with a plan are MHLA.*MHLADiT"
    ):
        CASES["Sana"].make().enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))


def test_heads_that_ranks_do_not_divide_are_refused_where_tokens_are_exchanged(case: Case) -> None:
    with pytest.raises(ValueError, match=r"3 ranks do not divide 2 heads, as they have to where windows"):
        case.make(mhla={"cpe": "zero"}).enable_parallelism(config=ContextParallelConfig(ulysses_degree=3))
    with pytest.raises(ValueError, match=r"3 ranks do not divide 2 heads"):
        case.make(mhla={"cpe": "zero"}).enable_parallelism(config=ContextParallelConfig(ring_degree=3))
