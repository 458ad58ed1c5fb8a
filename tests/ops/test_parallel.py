"""Ranks that hold parts of a sequence give what one process gives, and exchange a fixed number of bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mhla_diffusion.ops import BlockLayout, composite, exchanged_bytes, mhla, mhla_parallel
from mhla_diffusion.ops.features import Features
from mhla_diffusion.ops.operators import summarize
from mhla_diffusion.ops.parallel import _centred

RAGGED, VIDEO = BlockLayout((7, 5), (3, 2)), BlockLayout((3, 4, 4), (1, 2, 2))
RAGGED_TEXT = BlockLayout((7, 5), (3, 2), extra=(0, 7))
# The ends of each rank's tokens. Blocks lie on several ranks, and a rank may have none.
CASES: list[tuple[BlockLayout, list[int], dict[str, Any]]] = [
    (RAGGED, [18, 35], {}),
    (RAGGED, [3, 3, 35], {"per_head": True}),
    (RAGGED, [0, 35], {"mask": True, "feature_map": "elu"}),
    (VIDEO, [17, 20, 48], {"rotary": True}),
    (VIDEO, [10, 48], {"rotary": True, "normalizer": "none", "mask": True}),
    # With extra tokens the ends are those on the grid; each rank has some of the extra ones, or none.
    (RAGGED_TEXT, [18, 35], {"rotary": True, "mask": True, "extra": [(2, 0), (0, 5)]}),
    (RAGGED_TEXT, [3, 3, 35], {"extra": [(0, 4), (2, 1), (0, 0)], "per_head": True}),
]


def make(layout: BlockLayout, case: dict[str, Any]) -> tuple[list[Tensor], dict[str, Any], Tensor]:
    """q, k, v and mixing; options; a cotangent of the output. The same in every process."""
    generator = torch.Generator().manual_seed(1)

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    options = dict(case)
    q, k, v, cotangent = (rand(2, 3, layout.num_tokens, 6) for _ in range(4))
    mixing = rand(*([3] if options.pop("per_head", False) else []), *[layout.num_blocks] * 2).abs()
    if options.pop("rotary", False):
        angles = rand(layout.num_tokens, 3)
        options["rotary_emb"] = (angles.cos(), angles.sin())
    if options.pop("mask", False):
        options["key_mask"] = rand(2, layout.num_tokens) > -0.5
    return [x.requires_grad_() for x in (q, k, v, mixing)], options, cotangent


def compare(rank: int, ends: list[int], layout: BlockLayout, case: dict[str, Any]) -> None:
    extras = case.get("extra")
    inputs, options, cotangent = make(layout, {key: x for key, x in case.items() if key != "extra"})
    expected = mhla(*inputs, layout, **options)
    references = torch.autograd.grad(expected, inputs, cotangent, create_graph=True)
    seconds = torch.autograd.grad(references[1].pow(2).sum(), inputs[:3])
    start, stop = ([0, *ends][rank + i] for i in range(2))
    part = torch.arange(start, stop)
    if extras is not None:
        first = ends[-1] + sum(map(sum, extras[:rank]))
        before, after = torch.arange(first, first + sum(extras[rank])).split(extras[rank])
        part, layout = torch.cat((before, part, after)), dataclasses.replace(layout, extra=extras[rank])
    local = [x.detach()[:, :, part].requires_grad_() for x in inputs[:3]]
    mixing = inputs[3].detach().requires_grad_()
    if "rotary_emb" in options:
        options["rotary_emb"] = tuple(table[part] for table in options["rotary_emb"])
    if "key_mask" in options:
        options["key_mask"] = options["key_mask"][:, part]
    out = mhla_parallel(*local, mixing, layout, start, **options)
    torch.testing.assert_close(out, expected[:, :, part])
    gradients = torch.autograd.grad(out, [*local, mixing], cotangent[:, :, part], create_graph=True)
    # Of a penalty on gradients, of which each rank has a part.
    found = torch.autograd.grad(gradients[1].pow(2).sum(), local)
    for gradient, reference in zip(found, seconds, strict=True):
        torch.testing.assert_close(gradient, reference[:, :, part])
    for gradient, reference in zip(gradients[:3], references[:3], strict=True):
        torch.testing.assert_close(gradient, reference[:, :, part])
    total = gradients[3].detach().clone()
    dist.all_reduce(total)
    torch.testing.assert_close(total, references[3])


def count_bytes(rank: int) -> None:
    """The bytes of all collectives, forward and backward, at two lengths of the sequence."""
    sent: list[int] = []
    original = dist.all_reduce

    def counting(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(x.numel() * x.element_size())
        return original(x, *args, **kwargs)

    dist.all_reduce = counting
    try:
        for side in (4, 16):
            layout = BlockLayout((side, side), (2, 2))
            half = layout.num_tokens // 2
            q, k, v = torch.randn(3, 1, 2, half, 8).requires_grad_().unbind()
            out = mhla_parallel(q, k, v, torch.ones(4, 4), layout, rank * half)
            expected = exchanged_bytes(layout, batch=1, heads=2, d=8, d_v=8)
            assert expected == 4 * 2 * 4 * 9 * 8
            assert sent == [expected]
            out.sum().backward()
            assert sent == [expected] * 2
            sent.clear()
    finally:
        dist.all_reduce = original


def compare_all(rank: int, cases: list[Any]) -> None:
    for layout, ends, case in cases:
        compare(rank, ends, layout, case)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_equal_one_process(run_processes: Callable[..., None], ranks: int) -> None:
    cases = [case for case in CASES if len(case[1]) == ranks]
    assert cases
    run_processes(compare_all, ranks, cases)


def test_the_bytes_exchanged_do_not_grow_with_the_tokens(run_processes: Callable[..., None]) -> None:
    run_processes(count_bytes, 2)


def test_centred_summaries_give_the_same() -> None:
    """What the GPU kernels read after the exchange, with gradients."""
    layout, features = RAGGED, Features("relu", 1e-6, normalized=True, shared=True)
    q, k, v = torch.randn(3, 1, 2, 35, 6, dtype=torch.float64).unbind()
    mixing = torch.rand(6, 6, dtype=torch.float64)
    results = []
    for centre in (False, True):
        leaves = [x.clone().requires_grad_() for x in (k, v + 3)]
        summaries = summarize(*leaves, layout, features)
        if centre:
            summaries = _centred(summaries)
            assert summaries.centre.mean() > 2
            assert summaries.matrices[..., :-1, :].sum((2, 4)).abs().max() < 1e-9
        its = mixing, layout, features, torch.float64
        out, _ = composite.read(q, summaries.matrices, summaries.centre, *its)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_wan_exchanges_what_the_paper_says() -> None:
    """59 MB in bfloat16 for 150 blocks of Wan2.1-1.3B; we exchange float32, as sums are."""
    layout = BlockLayout((21, 30, 50), (3, 5, 10))
    assert exchanged_bytes(layout, 1, 12, 128, 128, normalizer="none") == pytest.approx(2 * 59e6, rel=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": 6}, r"tokens 6 to 18 are not on the grid \(4, 4\) of 16"),
        ({"normalizer": "official"}, "over ranks take 'paper' or 'none'"),
        ({"mixing": torch.ones(3, 3)}, r"M = 4, got \(3, 3\)"),
        ({"key_mask": torch.ones(1, 16, dtype=torch.bool)}, r"\[1, 12\]"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], message: str) -> None:
    x = torch.ones(1, 1, 12, 4)
    arguments = {"q": x, "k": x, "v": x, "mixing": torch.ones(4, 4), "start": 4}
    with pytest.raises(ValueError, match=message):
        mhla_parallel(layout=BlockLayout((4, 4), (2, 2)), **{**arguments, **change})


def test_centres_of_keys_without_features_are_finite() -> None:
    features = Features("relu", 0.0, normalized=True, shared=True)
    keys, values = -torch.ones(1, 2, 35, 6), torch.randn(1, 2, 35, 6)
    summaries = _centred(summarize(keys, values, RAGGED, features))
    assert summaries.centre.isfinite().all()
    assert summaries.matrices.isfinite().all()
