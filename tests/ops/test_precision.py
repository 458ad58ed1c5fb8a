"""Statistics that hurt: values with a mean, tiny weights and features, NaN, and the range of float16."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mhla_diffusion.ops import (
    FEATURE_MAPS,
    BlockLayout,
    locality_mixing,
    mhla,
    mhla_causal,
    mhla_causal_reference,
    mhla_reference,
)
from mhla_diffusion.ops.features import phi

LIMIT = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}
# Triton's interpreter is slow: as many blocks as show how they are mixed.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LAYOUT = BlockLayout((16, 16), (2, 2)) if INTERPRETED else BlockLayout((64, 64), (4, 4))
NAMES = ("out", "q", "k", "v", "mixing")


def relative_errors(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> dict[str, float]:
    pairs = zip(NAMES, found, expected, strict=True)
    return {name: ((a.double() - b).norm() / b.norm()).item() for name, a, b in pairs}


def with_gradients(
    operator: Callable[..., Tensor], inputs: list[Tensor], cotangent: Tensor, *arguments: Any, **options: Any
) -> tuple[Tensor, ...]:
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = operator(*inputs, *arguments, **options)
    return out, *torch.autograd.grad(out, inputs, cotangent.to(out.dtype))


def errors_of(
    monkeypatch: pytest.MonkeyPatch,
    inputs: list[Tensor],
    cotangent: Tensor,
    layout: BlockLayout,
    **options: Any,
) -> dict[str, float]:
    """Relative errors of the output and of each gradient, against float64 on the same numbers."""
    found = with_gradients(mhla, inputs, cotangent, layout, **options)
    exact = [x.double() for x in inputs]
    with monkeypatch.context() as patch:
        patch.setenv("MHLA_KERNELS", "torch")
        expected = with_gradients(mhla, exact, cotangent.double(), layout, **options)
    return relative_errors(found, expected)


@functools.cache
def inputs_with_mean(dtype: torch.dtype, mean: float) -> tuple[Tensor, ...]:
    """q, k, v and a cotangent ``[1, 1, N, 64]``; each channel of v has a mean, as a bias gives it."""
    torch.manual_seed(1)
    q, k, v, cotangent = torch.randn(4, 1, 1, LAYOUT.num_tokens, 64)
    return tuple(x.to(dtype) for x in (q, k, v + mean * torch.randn(64), cotangent))


@pytest.mark.parametrize("rotary", [False, True], ids=["", "rotary"])
@pytest.mark.parametrize("normalizer", ["paper", "none"])
@pytest.mark.parametrize("mean", [0, 0.3, 1, 3])
@pytest.mark.parametrize("dtype", LIMIT, ids=str)
def test_gradients_are_exact_where_values_have_a_mean(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, mean: float, normalizer: str, rotary: bool
) -> None:
    *tensors, cotangent = inputs_with_mean(dtype, mean)
    if normalizer == "none":  # sums over 4,096 tokens, in the range of float16
        tensors[0] = tensors[0] / 64
    mixing = locality_mixing(LAYOUT)
    angles = torch.arange(LAYOUT.num_tokens * 32).reshape(-1, 32) % 97 / 16
    options: dict[str, Any] = {
        "normalizer": normalizer,
        "rotary_emb": (angles.cos(), angles.sin()) if rotary else None,
    }
    errors = errors_of(monkeypatch, [*tensors, mixing], cotangent, LAYOUT, **options)
    assert max(errors.values()) < LIMIT[dtype], errors


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
def test_gradients_of_wide_heads_are_exact_where_values_have_a_mean(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    layout = BlockLayout((16, 16), (2, 2))
    torch.manual_seed(1)
    q, k, v, cotangent = torch.randn(4, 1, 1, 256, 80)
    tensors = [x.to(dtype) for x in (q, k, v + 3 * torch.randn(80))]
    errors = errors_of(monkeypatch, [*tensors, locality_mixing(layout)], cotangent.to(dtype), layout)
    assert max(errors.values()) < LIMIT[dtype], errors


@pytest.mark.parametrize("width", [64, 72])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_of_one_give_exactly_one(dtype: torch.dtype, width: int) -> None:
    q, k = (F.pad(x, (0, width - 64)) for x in inputs_with_mean(dtype, 0)[:2])
    out = mhla(q, k, torch.ones_like(k), locality_mixing(LAYOUT), LAYOUT)
    assert torch.equal(out, torch.ones_like(out))


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_features_are_positive_wherever_float32_is(feature_map: str) -> None:
    # elu(x) + 1 is 0 below -17.
    x = torch.tensor([[-80.0, -40, -20, -3, 0, 3]], requires_grad=True)
    exact = x.detach().double().requires_grad_()
    y, expected = phi(x, feature_map, eps=1e-6), phi(exact, feature_map, eps=1e-6)
    torch.testing.assert_close(y, expected.float(), rtol=1e-5, atol=0)
    weights = torch.rand(x.shape)
    gradients = (torch.autograd.grad((a * weights).sum(), b)[0] for a, b in ((y, x), (expected, exact)))
    torch.testing.assert_close(next(gradients), next(gradients).float(), rtol=1e-4, atol=1e-30)


def test_elu_of_very_negative_rows_equals_the_reference(assert_close: Callable[..., None]) -> None:
    layout = BlockLayout((4, 4), (2, 2))
    q, k, v = torch.randn(3, 1, 1, 16, 8).unbind()
    inputs = [q - 30, k - 30, v, torch.rand(4, 4)]
    cotangent = torch.randn(1, 1, 16, 8)
    found = with_gradients(mhla, inputs, cotangent, layout, feature_map="elu")
    expected = with_gradients(
        mhla_reference, [x.double() for x in inputs], cotangent.double(), layout, feature_map="elu"
    )
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, torch.float32)


@pytest.mark.parametrize("scale", [1e-30, 1e-35, 1e30])
def test_weights_of_any_size_give_the_same(scale: float) -> None:
    q, k, v, cotangent = (x[:, :, :256] for x in inputs_with_mean(torch.float32, 1))
    q, k = q - 8, k - 8  # features of about 1e-3: elu
    layout = BlockLayout((16, 16), (2, 2))
    mixing = torch.rand(4, 4) + 0.1
    # Rows of different size, whose powers of two change no bit.
    power = 2.0 ** torch.tensor(scale).log2().round() * torch.tensor([[1.0], [4], [0.5], [1]])
    found = with_gradients(mhla, [q, k, v, mixing * power], cotangent, layout, feature_map="elu")
    expected = with_gradients(mhla, [q, k, v, mixing], cotangent, layout, feature_map="elu")
    for name, a, b in zip(NAMES[:4], found, expected, strict=False):
        assert torch.equal(a, b), name
    torch.testing.assert_close(found[4] * power, expected[4])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rotary", [False, True])
def test_the_gradient_of_an_all_zero_row_of_w_is_that_of_numerators(rotary: bool, dtype: torch.dtype) -> None:
    """As in the reference. Values have no mean, which GPU kernels take from them."""
    if INTERPRETED and dtype == torch.float64:
        pytest.skip("no kernel takes float64")
    layout = BlockLayout((4, 4), (2, 2))
    q, k, half, cotangent = torch.randn(4, 1, 2, 16, 16)
    v = torch.cat((half[:, :, :8], -half[:, :, :8]), 2)
    mixing = torch.rand(4, 4)
    mixing[1] = 0
    inputs = [x.to(dtype) for x in (q, k, v, mixing)]
    exact = [x.double() for x in inputs]
    options: dict[str, Any] = {}
    if rotary:
        angles = torch.rand(16, 8) * 6
        options["rotary_emb"] = (angles.cos(), angles.sin())
    expected = with_gradients(mhla_reference, exact, cotangent.double(), layout, **options)
    limit = LIMIT.get(dtype, 1e-9)
    found = with_gradients(mhla, inputs, cotangent, layout, **options)
    assert max(relative_errors(found, expected).values()) < limit
    assert ((found[4] - expected[4])[1].norm() / expected[4][1].norm()).item() < limit
    if dtype.itemsize > 2:  # what takes the place of the operators in the transforms of torch.func
        given = cotangent.to(dtype)
        in_transform = torch.func.grad(lambda w: (mhla(*inputs[:3], w, layout, **options) * given).sum())
        torch.testing.assert_close(in_transform(inputs[3]).double(), expected[4], rtol=limit, atol=limit)


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("rotary", [False, True], ids=["", "rotary"])
def test_what_masked_tokens_hold_does_not_matter(feature_map: str, rotary: bool) -> None:
    layout = BlockLayout((4, 6), (2, 3))
    q, k, v = torch.randn(3, 2, 3, 24, 8).unbind()
    mask, mixing, cotangent = torch.rand(2, 24) > 0.3, torch.rand(6, 6), torch.randn(2, 3, 24, 8)
    angles = torch.rand(24, 4) * 6
    options = {"feature_map": feature_map, "rotary_emb": (angles.cos(), angles.sin()) if rotary else None}
    hidden = ~mask[:, None, :, None]
    broken = [q, k.masked_fill(hidden, torch.nan), v.masked_fill(hidden, torch.inf), mixing]
    for operator in (mhla, mhla_reference):
        found = with_gradients(operator, broken, cotangent, layout, key_mask=mask, **options)
        expected = with_gradients(operator, [q, k, v, mixing], cotangent, layout, key_mask=mask, **options)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)
    for operator in (mhla_causal, mhla_causal_reference):
        assert torch.equal(
            operator(*broken[:3], torch.rand(6, 6), 4, key_mask=mask, **options).isnan(),
            torch.zeros(2, 3, 24, 8, dtype=torch.bool),
        )


def test_nan_in_queries_and_keys_is_seen() -> None:
    layout = BlockLayout((4, 4), (2, 2))
    for which in range(2):
        inputs = [torch.randn(1, 1, 16, 8) for _ in range(3)]
        inputs[which][0, 0, 3, 2] = torch.nan
        assert mhla(*inputs, torch.ones(4, 4), layout).isnan().any()


def test_float16_without_a_denominator_stays_finite(
    assert_close: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = ((torch.randn(3, 1, 1, LAYOUT.num_tokens, 64) * 4 + 1).half()).unbind()
    mixing = torch.ones(LAYOUT.num_blocks, LAYOUT.num_blocks)
    assert mhla(q, k, v, mixing, LAYOUT, normalizer="none").isfinite().all()
    # To be normed before it is narrowed.
    out = mhla(q, k, v, mixing, LAYOUT, normalizer="none", dtype=torch.float32)
    assert out.abs().max() > torch.finfo(torch.float16).max
    monkeypatch.setenv("MHLA_KERNELS", "torch")
    exact = mhla(*(x.double() for x in (q, k, v, mixing)), LAYOUT, normalizer="none")
    assert_close(F.rms_norm(out, (64,)).half(), F.rms_norm(exact, (64,)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_it_does_for_softmax_attention(dtype: torch.dtype) -> None:
    layout = BlockLayout((4, 4), (2, 2))
    q, k, v = torch.randn(3, 1, 1, 16, 8).unbind()
    with torch.autocast("cpu", dtype=dtype):
        out = mhla(q, k, v.to(dtype), torch.ones(4, 4), layout)
        assert out.dtype == F.scaled_dot_product_attention(q, k, v.to(dtype)).dtype == dtype
    assert torch.equal(out, mhla(q.to(dtype), k.to(dtype), v.to(dtype), torch.ones(4, 4), layout))
