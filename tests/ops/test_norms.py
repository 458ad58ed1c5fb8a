"""Norms of queries, keys and outputs, and a gate, as arguments of the operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mhla_diffusion import MHLA, MHLAConfig
from mhla_diffusion.ops import BlockLayout, Norms, mhla, mhla_reference
from mhla_diffusion.ops.norms import is_plain

LAYOUT = BlockLayout((4, 6), (2, 3))


def make(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Norms]:
    q, k, v, gate = (torch.randn(2, 24, 3, d).to(dtype).transpose(1, 2) for d in (8, 8, 6, 6))
    weights = [torch.rand(d, dtype=torch.float64) + 0.5 for d in (8, 8, 6)]
    return [q, k, v + 1, torch.rand(6, 6, dtype=torch.float64)], Norms(*weights, gate)


def by_hand(inputs: list[Tensor], norms: Norms, **options: Any) -> Tensor:
    q, k, v, mixing = inputs

    def normed(x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return x
        return x / (x.square().mean(-1, keepdim=True) + norms.eps).sqrt() * weight

    out = normed(
        mhla_reference(normed(q, norms.q), normed(k, norms.k), v, mixing, LAYOUT, **options), norms.out
    )
    return out if norms.gate is None else out * norms.gate * norms.gate.sigmoid()


@pytest.mark.parametrize(
    "parts", [("q", "k"), ("out",), ("gate",), ("k", "out", "gate"), ("q", "k", "out", "gate")]
)
@pytest.mark.parametrize("normalizer", ["paper", "official", "none"])
def test_norms_and_gate_by_hand_with_gradients(parts: tuple[str, ...], normalizer: str) -> None:
    inputs, norms = make()
    norms = Norms(**{name: getattr(norms, name) for name in parts}, eps=1e-3)
    leaves = [x.requires_grad_() for x in (*inputs, *norms) if isinstance(x, Tensor)]
    expected = by_hand(inputs, norms, normalizer=normalizer)
    cotangent = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, leaves, cotangent)
    for attend in (mhla, mhla_reference):
        out = attend(*inputs, LAYOUT, normalizer=normalizer, norms=norms)
        found = torch.autograd.grad(out, leaves, cotangent)
        torch.testing.assert_close([out, *found], [expected, *wanted])
    with torch.no_grad():
        torch.testing.assert_close(mhla(*inputs, LAYOUT, normalizer=normalizer, norms=norms), expected)
    assert not torch.allclose(mhla(*inputs, LAYOUT, normalizer=normalizer), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_norms_in_another_dtype_leave_that_of_the_output(dtype: torch.dtype) -> None:
    """Without a denominator sums are beyond float16 here, and behind the norm they are not."""
    inputs, norms = make(dtype)
    inputs[2] = inputs[2] * (1e4 if dtype == torch.float16 else 1)
    out = mhla(*inputs, LAYOUT, normalizer="none", norms=norms)
    expected = mhla_reference(*inputs, LAYOUT, normalizer="none", norms=norms)
    assert out.dtype == dtype
    assert (out.double() - expected).norm() < 1e-2 * expected.norm()


def test_norms_in_cross_attention() -> None:
    (q, k, v, _), norms = make()
    keys = BlockLayout((11,), (2,))
    arguments = q, k[:, :, :11], v[:, :, :11], torch.rand(6, 2, dtype=torch.float64), LAYOUT
    found = mhla(*arguments, key_layout=keys, norms=norms)
    torch.testing.assert_close(found, mhla_reference(*arguments, key_layout=keys, norms=norms))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"q": torch.ones(6)}, r"q of the norms must be a floating-point tensor \[8\] .*got .*\(6,\)"),
        ({"out": torch.ones(8)}, r"out of the norms must be a floating-point tensor \[6\]"),
        ({"gate": torch.ones(2, 24, 18)}, r"gate of the norms must be .*\[2, 3, 24, 6\].*\(2, 24, 18\)"),
        ({"k": torch.ones(8, dtype=torch.int64)}, r"k of the norms must be a floating-point .*torch.int64"),
        ({"out": 1.0}, "out of the norms must be .* got 1.0"),
        ({"q": torch.ones(8, device="meta")}, "q of the norms is on meta and q on cpu: move it there"),
        ({"eps": -1.0}, "eps of the norms must be a number from 0 to less than 1, got -1.0"),
    ],
)  # fmt: skip
def test_norms_that_do_not_fit_are_refused(wrong: dict[str, Any], message: str) -> None:
    inputs, norms = make()
    with pytest.raises(ValueError, match=message):
        mhla(*inputs, LAYOUT, norms=norms._replace(**wrong))


def test_norms_with_hooks_or_elsewhere_are_more_than_their_weights() -> None:
    cpu, eps = torch.device("cpu"), 1e-6
    hooked, replaced = nn.RMSNorm(4, eps), nn.RMSNorm(4, eps)
    assert is_plain(hooked, cpu, eps)
    hooked.register_forward_pre_hook(lambda module, args: args)
    replaced.forward = lambda x: x  # type: ignore[method-assign]
    others = (
        hooked, replaced, nn.RMSNorm(4, eps, device="meta"), nn.LayerNorm(4, eps), nn.RMSNorm(4, 1e-3),
        nn.RMSNorm(4), nn.RMSNorm(4, eps, elementwise_affine=False),
    )  # fmt: skip
    assert not any(is_plain(norm, cpu, eps) for norm in others)
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
    assert not is_plain(nn.RMSNorm(4, eps), cpu, eps)
    handle.remove()
    assert is_plain(nn.RMSNorm(4, eps), cpu, eps)


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("settings", [{}, {"qk_norm": True, "output_norm": True, "gate": True}], ids=str)
def test_sizes_may_be_symbols_to_a_compiler(settings: dict[str, Any], enabled: bool) -> None:
    module = MHLA(MHLAConfig(blocks=(2, 2), local=None, **settings), heads=2, head_dim=8, grid=(4, 6))

    def call(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return module(q, k, v, grid=(4, 6), hidden_states=x)

    compiled = torch.compile(call, dynamic=True, fullgraph=True, backend="aot_eager")
    for batch in (2, 3):
        inputs = (*torch.randn(3, batch, 2, 24, 8), torch.randn(batch, 24, 16))
        with torch.set_grad_enabled(enabled):
            torch.testing.assert_close(compiled(*inputs), call(*inputs))
