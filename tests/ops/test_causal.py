"""Causal MHLA: the parallel form, the streaming state and the dense form are one function."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mhla_diffusion import MHLAConfig
from mhla_diffusion.causal import CausalMHLA
from mhla_diffusion.ops import (
    BlockLayout,
    MHLAState,
    causal_mixing,
    mhla,
    mhla_causal,
    mhla_causal_reference,
)

AssertClose = Callable[..., None]
CASES: list[dict[str, Any]] = [
    {},
    {"normalizer": "none"},
    {"feature_map": "elu"},
    {"feature_map": "softmax", "rotary": True},
    {"rotary": True, "per_head": True},
    {"rotary": True, "normalizer": "none", "mask": True},
]


def make(
    tokens: int = 19, blocks: int = 5, dtype: torch.dtype = torch.float64, **case: Any
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """q, k, v and mixing of two samples and three heads, d 6 and d_v 5; options."""
    q, k, v = torch.randn(2, 3, tokens, 6), torch.randn(2, 3, tokens, 6), torch.randn(2, 3, tokens, 5)
    mixing = torch.rand(*([3] if case.pop("per_head", False) else []), blocks, blocks)
    if case.pop("rotary", False):
        angles = torch.rand(tokens, 3, dtype=torch.float64) * 2 * math.pi
        case["rotary_emb"] = (angles.cos(), angles.sin())
    if case.pop("mask", False):
        case["key_mask"] = torch.rand(2, tokens) > 0.3
    return tuple(x.to(dtype).requires_grad_() for x in (q, k, v, mixing)), case


def state_outputs(inputs: tuple[Tensor, ...], options: dict[str, Any], pieces: list[int]) -> Tensor:
    """The outputs of a state that is given the sequence in pieces."""
    q, k, v, mixing = inputs
    names = ("feature_map", "normalizer")
    state = MHLAState(mixing, 4, **{name: options[name] for name in names if name in options})
    outputs, start = [], 0
    for length in pieces:
        part = slice(start, start + length)
        tables = {}
        if "rotary_emb" in options:
            tables["rotary_emb"] = tuple(table[part] for table in options["rotary_emb"])
        if "key_mask" in options:
            tables["key_mask"] = options["key_mask"][:, part]
        outputs.append(state.prefill(q[:, :, part], k[:, :, part], v[:, :, part], **tables))
        start += length
    assert state.tokens == start == q.shape[2]
    return torch.cat(outputs, 2)


@pytest.mark.parametrize("tokens", [1, 4, 8, 19])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_parallel_form_equals_the_dense_one(assert_close: AssertClose, case: Any, tokens: int) -> None:
    inputs, options = make(tokens, **case)
    out, expected = mhla_causal(*inputs, 4, **options), mhla_causal_reference(*inputs, 4, **options)
    assert_close(out, expected)
    gradients, references = (
        torch.autograd.grad((x * torch.arange(x.numel()).view_as(x)).sum(), inputs) for x in (out, expected)
    )
    for gradient, reference in zip(gradients, references, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_are_float32(assert_close: AssertClose, dtype: torch.dtype) -> None:
    inputs, _ = make(dtype=dtype)
    out = mhla_causal(*inputs, 4)
    assert out.dtype == dtype
    assert_close(out, mhla_causal_reference(*inputs, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(mhla_causal(*inputs, 4), out, rtol=0, atol=0)


@pytest.mark.parametrize("pieces", [[19], [1] * 19, [3, 1, 12, 3], [4, 4, 11], [0, 19]], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_decoding_equals_the_parallel_form(assert_close: AssertClose, case: Any, pieces: list[int]) -> None:
    inputs, options = make(**case)
    with torch.no_grad():
        assert_close(state_outputs(inputs, options, pieces), mhla_causal(*inputs, 4, **options))


def test_step_is_one_token() -> None:
    (q, k, v, mixing), _ = make()
    state = MHLAState(mixing, 4)
    out = torch.cat(
        [state.step(q[:, :, t : t + 1], k[:, :, t : t + 1], v[:, :, t : t + 1]) for t in range(19)], 2
    )
    torch.testing.assert_close(out, mhla_causal(q, k, v, mixing, 4).detach())
    assert not out.requires_grad
    with pytest.raises(ValueError, match=r"step takes one token.*\(2, 3, 19, 6\)"):
        state.step(q, k, v)


def test_nothing_comes_from_later() -> None:
    (q, k, v, mixing), _ = make()
    changed = [torch.cat((x[:, :, :10], torch.randn_like(x[:, :, 10:])), 2) for x in (q, k, v)]
    before, after = mhla_causal(q, k, v, mixing, 4), mhla_causal(*changed, mixing, 4)
    torch.testing.assert_close(before[:, :, :10], after[:, :, :10])
    assert not torch.allclose(before[:, :, 10:], after[:, :, 10:])


def test_the_last_token_sees_what_it_sees_without_order() -> None:
    (q, k, v, mixing), _ = make(20)
    out = mhla(q, k, v, mixing.tril(), BlockLayout((20,), (5,)))
    torch.testing.assert_close(mhla_causal(q, k, v, mixing, 4)[:, :, -1], out[:, :, -1])


def test_the_cost_of_a_token_does_not_grow_inside_a_block() -> None:
    q, k, v = torch.randn(3, 1, 1, 64, 8)
    state = MHLAState(torch.rand(8, 8), 8)
    costs = []
    for t in range(64):
        with FlopCounterMode(display=False) as counter:
            state.step(q[:, :, t : t + 1], k[:, :, t : t + 1], v[:, :, t : t + 1])
        costs.append(counter.get_total_flops())
    inside = {cost for t, cost in enumerate(costs) if t % 8}
    assert len(inside) == 1, "the past adds nothing"
    (cost,) = inside
    for block in range(8):
        assert costs[8 * block] - cost == 2 * block * 8 * 9, "summaries are mixed once a block: 2 M d (d + 1)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 0}, "block_size must be an integer of at least 1 token, got 0"),
        ({"block_size": (4, 4)}, r"block_size must be an integer of at least 1 token, got \(4, 4\)"),
        ({"block_size": 3}, r"needs 7 blocks of 3 tokens, but mixing is for 5"),
        ({"mixing": torch.rand(2, 5, 5)}, r"H = 3, got \(2, 5, 5\)"),
        ({"mixing": torch.rand(5, 4)}, r"mixing must be \[M, M\]"),
        ({"k": torch.rand(2, 3, 18, 6)}, r"same B, H, N"),
        ({"feature_map": "exp"}, "feature_map 'exp' is not one of relu"),
        (
            {"rotary_emb": (torch.rand(1, 3), torch.rand(1, 3))},
            r"rotary_emb must be \(cos, sin\), each .*got \(1, 3\)",
        ),
        ({"key_mask": torch.ones(2, 18, dtype=torch.int64)}, r"key_mask must be a bool tensor"),
        (
            {"key_mask": torch.ones(2, 5, dtype=torch.bool)},
            r"key_mask must be a bool tensor .*got .*\(2, 5\)",
        ),
        ({"normalizer": "official"}, "'official' of the causal form is not one of paper, none"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], message: str) -> None:
    (q, k, v, mixing), _ = make()
    with pytest.raises(ValueError, match=message):
        mhla_causal(**{"q": q, "k": k, "v": v, "mixing": mixing, "block_size": 4, **change})


def test_more_tokens_than_blocks_are_refused_and_change_nothing() -> None:
    (q, k, v, mixing), _ = make(20)
    state = MHLAState(mixing, 4)
    state.prefill(q, k, v)
    with pytest.raises(ValueError, match=r"needs 6 blocks of 4 tokens, but mixing is for 5.*resize_mixing"):
        state.step(q[:, :, :1], k[:, :, :1], v[:, :, :1])
    assert state.tokens == 20


@pytest.mark.parametrize("pieces", [[19], [1] * 19, [3, 1, 12, 3]], ids=str)
@pytest.mark.parametrize("shape", [(1,), (2,), (4,), (9,), (3, 3)], ids=str)
def test_weights_by_distance_give_what_their_matrix_gives(
    assert_close: AssertClose, shape: tuple[int, ...], pieces: list[int]
) -> None:
    (q, k, v, _), options = make(rotary=True)
    weights = torch.rand(shape, dtype=torch.float64)
    state = MHLAState(weights, 2, relative=True)
    outputs, start = [], 0
    for length in pieces:
        part = slice(start, start + length)
        tables = tuple(table[part] for table in options["rotary_emb"])
        outputs.append(state.prefill(q[:, :, part], k[:, :, part], v[:, :, part], rotary_emb=tables))
        start += length
    matrix = causal_mixing(weights, 10)
    assert matrix.shape == (*shape[:-1], 10, 10)
    assert torch.equal(matrix[..., 9, [9, 0]], weights[..., [0, min(9, shape[-1] - 1)]])
    assert not matrix.triu(1).any()
    assert_close(torch.cat(outputs, 2), mhla_causal_reference(q, k, v, matrix, 2, **options).detach())


def test_a_state_of_weights_by_distance_does_not_grow() -> None:
    q, k, v = torch.randn(3, 1, 2, 120, 4)
    state = MHLAState(torch.rand(5), 4, relative=True)
    sizes = [state.prefill(q, k, v) is None or state.nbytes for _ in range(4)]
    assert sizes == [4 * 2 * 5 * 4 * 4] * 4, "four summaries of two heads, [d + 1, d] in float32"


def test_samples_of_a_state_are_selected_in_the_middle_of_a_block(assert_close: AssertClose) -> None:
    (q, k, v, mixing), _ = make()
    state = MHLAState(mixing, 4)
    state.prefill(q[:, :, :10], k[:, :, :10], v[:, :, :10])
    beams = torch.tensor([1, 1, 0])
    state.select(beams)
    out = state.prefill(*(x[beams][:, :, 10:] for x in (q, k, v)))
    assert_close(out, mhla_causal(q, k, v, mixing, 4)[beams][:, :, 10:].detach())


def test_weights_by_distance_of_another_number_of_heads_are_refused() -> None:
    (q, k, v, _), _ = make()
    with pytest.raises(
        ValueError,
        match=r"relative mixing must be \[m\] or \[H, m\] with H = 3 and m of at least 1, got \(2, 5\)",
    ):
        MHLAState(torch.rand(2, 5), 4, relative=True).prefill(q, k, v)


@pytest.mark.parametrize("shape", [(0,), (3, 0), ()], ids=str)
@pytest.mark.parametrize("relative", [False, True])
def test_weights_of_no_block_are_refused(shape: tuple[int, ...], relative: bool) -> None:
    (q, k, v, _), _ = make()
    with pytest.raises(ValueError, match=r"mixing must be .*got \(.*\)"):
        MHLAState(torch.rand(shape), 4, relative=relative).prefill(q, k, v)


@pytest.mark.parametrize("normalizer", ["paper", "none"])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("tokens", [3, 4], ids=["inside a block", "between blocks"])
@pytest.mark.parametrize(
    "given", [(1, 3, 6, 5), (4, 3, 6, 5), (2, 1, 6, 5), (2, 3, 1, 5), (2, 3, 6, 1)], ids=str
)
def test_tokens_of_other_sizes_than_those_before_are_refused_and_change_nothing(
    given: tuple[int, ...], tokens: int, relative: bool, normalizer: str
) -> None:
    (q, k, v, mixing), _ = make()
    weights = mixing[0] if relative else mixing
    states = [MHLAState(weights, 4, normalizer=normalizer, relative=relative) for _ in range(2)]
    for state in states:
        state.prefill(q[:, :, :tokens], k[:, :, :tokens], v[:, :, :tokens])
    samples, heads, d, d_v = given
    other_q, other_v = torch.rand(samples, heads, 1, d).double(), torch.rand(samples, heads, 1, d_v).double()
    with pytest.raises(
        ValueError, match=r"\(2, 3, 6, 5\), got tokens of " + re.escape(str(given)) + r".*select"
    ):
        states[0].step(other_q, other_q, other_v)
    following = [x[:, :, tokens : tokens + 1] for x in (q, k, v)]
    assert torch.equal(states[0].step(*following), states[1].step(*following))
    assert states[0].tokens == states[1].tokens


@pytest.mark.parametrize("narrow", [0, 2])
def test_tokens_of_fewer_axes_are_refused(narrow: int) -> None:
    (q, k, v, mixing), _ = make()
    state = MHLAState(mixing, 4)
    one = [x[:, :, :1] for x in (q, k, v)]
    one[narrow] = one[narrow][:, :, 0, :1]
    with pytest.raises(ValueError, match=r"\[B, H, (1|N), d\]"):
        state.step(*one)
    with pytest.raises(ValueError, match=r"must be \[B, H, N, d\]"):
        mhla_causal(q[0, 0], k[0, 0], v[0, 0], mixing, 4)
    with pytest.raises(ValueError, match=r"must be \[B, H, N, d\]"):
        state.prefill(q[0, 0], k[0, 0], v[0, 0])


def test_masked_values_are_never_read() -> None:
    q, k, v = torch.randn(3, 1, 2, 9, 4)
    mask, mixing = torch.arange(9)[None] != 3, torch.rand(3, 3)
    expected = mhla_causal(q, k, v, mixing, 4, key_mask=mask)
    v[:, :, 3] = torch.nan
    torch.testing.assert_close(mhla_causal(q, k, v, mixing, 4, key_mask=mask), expected)
    torch.testing.assert_close(MHLAState(mixing, 4).prefill(q, k, v, key_mask=mask), expected)


def test_the_module_has_the_eps_of_its_config_in_both_forms_and_weighs_its_own_block_1() -> None:
    module = CausalMHLA(MHLAConfig(blocks=3, eps=0.3), heads=2, head_dim=4, block_size=4)
    assert module.weights()[0] == 1
    q, k, v = torch.randn(3, 1, 2, 9, 4)
    expected = mhla_causal(q, k, v, causal_mixing(module.weights(), 3), 4, eps=0.3)
    expected = expected.transpose(1, 2).flatten(2)
    torch.testing.assert_close(module(q, k, v), expected)
    torch.testing.assert_close(module(q, k, v, state=module.state()), expected)
