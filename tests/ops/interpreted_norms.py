"""Norms and a gate inside the GPU kernels, in Triton's interpreter, against the reference in float64.

test_triton.py runs this file in a process of its own, as Triton decides on import whether it interprets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from mhla_diffusion import MHLA, MHLAConfig
from mhla_diffusion.ops import BlockLayout, Norms, mhla, mhla_reference
from mhla_diffusion.ops.gpu import mhla as kernels
from tests.ops.tensors import amid_nan

PARTS = ("q", "k", "out", "gate")
CASES: dict[str, dict[str, Any]] = {
    "plain": {"batch": 2},
    "q and k alone": {"parts": ("q", "k"), "feature_map": "softmax"},
    "output alone": {"parts": ("out",), "heads_inside": False},
    "gate alone": {"parts": ("gate",), "d": 20, "d_v": 70},
    "positions, mask": {"rotary": True, "mask": True, "batch": 2},
    "no denominator": {"normalizer": "none", "feature_map": "elu", "rotary": True},
    "several tiles of channels": {"d": 20, "d_v": 70},
    "wide heads": {"d": 160, "d_v": 160},
    "channels apart": {"channels_apart": True},
    "shared by programs": {"grid": (20, 40), "blocks": (1, 1)},
    "extra tokens": {"extra": (2, 20), "mask": True},
    "bfloat16": {"dtype": "bfloat16", "d": 24, "d_v": 10, "mask": True},
    "bfloat16, weights in bfloat16": {"dtype": "bfloat16", "weights": "bfloat16", "d": 64, "d_v": 64},
    "bfloat16, gate alone, several tiles": {"parts": ("gate",), "dtype": "bfloat16", "d": 20, "d_v": 140},
    "bfloat16, several tiles": {"dtype": "bfloat16", "d": 20, "d_v": 140},
    "bfloat16, positions": {"dtype": "bfloat16", "d": 128, "d_v": 128, "rotary": True},
    "bfloat16, no denominator": {"dtype": "bfloat16", "normalizer": "none", "d": 72, "d_v": 72},
    "bfloat16, two tiles": {"dtype": "bfloat16", "d": 72, "d_v": 72, "batch": 2},
    "bfloat16, two tiles, elu": {"dtype": "bfloat16", "d": 88, "d_v": 88, "feature_map": "elu"},
    "float16": {"dtype": "float16", "d": 64, "d_v": 64},
    "float16, sums beyond its range": {
        "dtype": "float16", "normalizer": "none", "large": True, "d": 16, "d_v": 16,
    },
    "float16, sums beyond its range, several tiles": {
        "dtype": "float16", "normalizer": "none", "large": True, "d": 16, "d_v": 72,
    },
}  # fmt: skip
LIMIT = {"float32": 2e-6, "bfloat16": 6e-3, "float16": 1e-3}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What of norms and gate the kernels got."""
    found: list[dict[str, Any]] = []
    launch = kernels.launch

    def note(name: str, *args: Any, **options: Any) -> None:
        found.append({"name": name} | {x: options.get(x) is not None for x in ("norm", "out_norm", "gate")})
        launch(name, *args, **options)

    monkeypatch.setattr(kernels, "launch", note)
    return found


def make(
    layout: BlockLayout,
    *,
    batch: int = 1,
    heads: int = 2,
    d: int = 8,
    d_v: int = 8,
    dtype: str = "float32",
    weights: str = "float32",
    heads_inside: bool = True,
    channels_apart: bool = False,
    large: bool = False,
) -> tuple[list[Tensor], Norms]:
    """q, k, v, W, and norms with a gate; rows amid NaN."""

    def amid(channels: int) -> Tensor:
        order = {"heads_inside": heads_inside and not channels_apart, "channels_apart": channels_apart}
        return amid_nan(batch, heads, layout.num_tokens, channels, dtype, **order)

    kind = getattr(torch, weights)
    norms = Norms(*((torch.rand(n) + 0.5).to(kind) for n in (d, d, d_v)), amid(d_v), eps=1e-3)
    q, k, v = amid(d), amid(d), amid(d_v).add_(1).mul_(1e4 if large else 1)
    return [q, k, v, torch.rand(layout.num_blocks, layout.num_blocks)], norms


@pytest.mark.parametrize("case", CASES)
def test_kernels_with_norms_equal_the_reference(case: str, launched: list[dict[str, Any]]) -> None:
    torch.manual_seed(0)
    options = dict(CASES[case])
    layout = BlockLayout(
        options.pop("grid", (5, 7)), options.pop("blocks", (2, 3)), options.pop("extra", None)
    )
    parts, rotary, mask = (options.pop(x, y) for x, y in (("parts", PARTS), ("rotary", 0), ("mask", 0)))
    flags = {x: options.pop(x) for x in ("normalizer", "feature_map") if x in options}
    inputs, norms = make(layout, **options)
    norms = Norms(**{name: getattr(norms, name) for name in parts}, eps=norms.eps)
    if rotary:
        angles = torch.rand(layout.num_tokens, inputs[0].shape[-1] // 2) * 6
        flags["rotary_emb"] = angles.cos(), angles.sin()
    if mask:
        flags["key_mask"] = torch.rand(len(inputs[0]), layout.num_tokens) > 0.3
    with torch.no_grad():
        out = mhla(*inputs, layout, norms=norms, **flags)
    expected = mhla_reference(*inputs, layout, norms=norms, **flags)
    assert out.dtype == inputs[2].dtype
    error = ((out.double() - expected).norm() / expected.norm()).item()
    assert error < LIMIT[options.get("dtype", "float32")]
    torch.testing.assert_close(out.double(), expected, atol=0.05, rtol=0.05)  # no row is far off, either
    whole = "out" not in parts or not ("wide" in case or "several" in case)
    assert launched == [
        {"name": "outer", "norm": "k" in parts, "out_norm": False, "gate": False},
        {
            "name": "inner", "norm": "q" in parts, "out_norm": "out" in parts and whole,
            "gate": "gate" in parts and whole,
        },
    ]  # fmt: skip


def test_weights_and_gates_lie_as_they_may(launched: list[dict[str, Any]]) -> None:
    """Expanded over channels, one of each head or token, channels apart."""
    layout = BlockLayout((4, 4), (2, 2))
    inputs, norms = make(layout, heads=3)
    assert norms.gate is not None
    weights = [torch.full((1,), x).expand(8) for x in (0.5, 2.0)] + [torch.rand(8, 2)[:, 0]]
    gates = (
        torch.randn(1, 1, 1, 1).expand(1, 3, 16, 8), torch.randn(1, 3, 1, 8).expand(1, 3, 16, 8),
        torch.randn(1, 1, 16, 8).expand(1, 3, 16, 8), torch.randn(1, 3, 8, 16).mT, norms.gate.double(),
    )  # fmt: skip
    for gate in gates:
        norms = Norms(*weights, gate)
        with torch.no_grad():
            out = mhla(*inputs, layout, norms=norms)
        torch.testing.assert_close(
            out, mhla_reference(*inputs, layout, norms=norms).float(), atol=1e-4, rtol=1e-4
        )
    assert all(x["gate"] for x in launched[1::2])


def test_rows_that_do_not_count_are_none_without_an_eps() -> None:
    """One over the root of 0, times 0, is NaN."""
    layout = BlockLayout((5, 7), (2, 3))
    inputs, norms = make(layout)
    mask = torch.rand(1, 35) > 0.3
    with torch.no_grad():
        out = mhla(*inputs, layout, norms=norms._replace(eps=0.0), key_mask=mask)
    expected = mhla_reference(*inputs, layout, norms=norms._replace(eps=0.0), key_mask=mask)
    torch.testing.assert_close(out, expected.float())


@pytest.mark.parametrize("opened", [20.0, -6.0])
def test_sums_beyond_float16_are_narrowed_behind_the_gate(opened: float) -> None:
    layout = BlockLayout((4, 4), (2, 2))
    inputs, _ = make(layout, dtype="float16", large=True)
    arguments: dict[str, Any] = {
        "norms": Norms(gate=torch.full_like(inputs[0], opened)),
        "normalizer": "none",
    }
    expected = mhla_reference(*inputs, layout, **arguments).clamp(-65504, 65504)
    for enabled in (False, True):
        with torch.set_grad_enabled(enabled):
            out = mhla(*inputs, layout, **arguments).double()
        assert (out - expected).norm() < 1e-2 * expected.norm(), enabled


def test_nan_stays_nan_and_masked_rows_do_not_matter() -> None:
    layout = BlockLayout((4, 4), (2, 2))
    inputs, norms = make(layout)
    mask = torch.ones(1, 16, dtype=torch.bool)
    mask[:, 3] = False
    with torch.no_grad():
        expected = mhla(*inputs, layout, norms=norms, key_mask=mask)
        for x in inputs[1:3]:
            x[:, :, 3] = torch.nan
        torch.testing.assert_close(mhla(*inputs, layout, norms=norms, key_mask=mask), expected)
        inputs[0][0, 1, 5, 2] = torch.nan
        found = mhla(*inputs, layout, norms=norms, key_mask=mask)
    assert found[0, 1, 5].isnan().all()
    assert found.isnan().sum() == found.shape[-1]


@pytest.mark.parametrize(
    ("dtype", "width", "heads_inside"),
    [("float32", 8, False), ("float32", 8, True), ("bfloat16", 16, False), ("bfloat16", 140, True)],
)
def test_the_operator_is_what_it_says(dtype: str, width: int, heads_inside: bool) -> None:
    """Opcheck: fake and real shapes, strides and dtypes are equal; and FLOPs are those of the two halves."""
    layout = BlockLayout((4, 4), (2, 2))
    inputs, norms = make(layout, d=width, d_v=width, dtype=dtype, heads_inside=heads_inside)
    settings = (None, None, [4, 4], [2, 2], None, "relu", 1e-6, True, False)
    with torch.no_grad():
        opcheck(
            torch.ops.mhla.fused.default, (*inputs, *settings, getattr(torch, dtype), *norms),
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip
        counts = []
        for given in (norms, None):
            with FlopCounterMode(display=False) as counter:
                mhla(*inputs, layout, norms=given)
            counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_gradients_are_those_of_separate_operations(launched: list[dict[str, Any]]) -> None:
    layout = BlockLayout((4, 4), (2, 2))
    inputs, norms = make(layout)
    leaves = [x.detach().clone().requires_grad_() for x in (*inputs, *norms[:4])]  # type: ignore[union-attr]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    out = mhla(*leaves[:4], layout, norms=Norms(*leaves[4:], norms.eps))
    expected = mhla_reference(*exact[:4], layout, norms=Norms(*exact[4:], norms.eps))
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    wanted = torch.autograd.grad(expected, exact, torch.ones_like(expected))
    for found, right in zip(grads, wanted, strict=True):
        assert (found - right).norm() < 1e-5 * right.norm()
    assert not any(x["norm"] or x["out_norm"] or x["gate"] for x in launched)


def module_of(**settings: Any) -> tuple[MHLA, Callable[[], Tensor]]:
    """An MHLA with weights that matter, and a call of it."""
    torch.manual_seed(0)
    config = MHLAConfig(**({"blocks": (2, 2), "local": None} | settings))
    module = MHLA(config, heads=2, head_dim=8, grid=(4, 6))
    for parameter in module.parameters():
        torch.nn.init.uniform_(parameter, 0.1, 1)
    q, k, v = (torch.randn(2, 24, 2, 8).transpose(1, 2) for _ in range(3))
    x, extra = torch.randn(2, 24, 16), (0, 0) if config.extra_block else None
    return module, lambda: module(q, k, v, grid=(4, 6), hidden_states=x, extra=extra)


@pytest.mark.parametrize(
    ("settings", "of_keys", "of_queries"),
    [
        ({"gate": True, "output_norm": True}, (), ("out_norm", "gate")),
        ({"gate": True}, (), ("gate",)),
        ({"qk_norm": True, "output_norm": True, "cpe": "identity"}, ("norm",), ("norm", "out_norm")),
        ({"qk_norm": True, "qk_conv": True}, ("norm",), ("norm",)),
        (
            {"qk_norm": True, "normalizer": "none", "output_norm": True, "extra_block": True},
            ("norm",), ("norm", "out_norm"),
        ),
        ({"qk_norm": True, "gate": True, "feature_map": "hedgehog"}, (), ("gate",)),
        ({"qk_norm": True, "gate": True, "mixing_content": True}, (), ("gate",)),
        ({"qk_norm": True, "gate": True, "center_keys": True}, (), ("gate",)),
        ({"qk_norm": True, "gate": True, "output_norm": True, "local": "shared"}, (), ()),
        ({}, (), ()),
    ],
    ids=str,
)  # fmt: skip
def test_modules_leave_norms_and_gate_to_the_kernels_where_they_can(
    settings: dict[str, Any], of_keys: Any, of_queries: Any, launched: list[dict[str, Any]]
) -> None:
    _, call = module_of(**settings)
    expected = call()
    assert not any(x["norm"] or x["out_norm"] or x["gate"] for x in launched)
    launched.clear()
    with torch.no_grad():
        torch.testing.assert_close(call(), expected)
    found = {x["name"]: {part for part in ("norm", "out_norm", "gate") if x[part]} for x in launched}
    assert found == {"outer": set(of_keys), "inner": set(of_queries)}


def test_modules_keep_the_eps_of_their_norms() -> None:
    module, call = module_of(output_norm=True, qk_norm=True)
    assert module.norm is not None
    before = call()
    module.norm.eps = 0.5
    expected = call()
    with torch.no_grad():
        torch.testing.assert_close(call(), expected)
    assert not torch.allclose(before, expected, rtol=1e-2)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "settings", [{"gate": True}, {"output_norm": True, "qk_norm": True, "gate": True}], ids=str
)
def test_outputs_have_the_dtype_of_values_with_gradients_and_without(
    settings: dict[str, Any], narrow: torch.dtype
) -> None:
    """Whatever that of the weights of norms and gate."""
    module, _ = module_of(**settings)
    q, k, v = (torch.randn(2, 24, 2, 8).transpose(1, 2).to(narrow) for _ in range(3))
    x = torch.randn(2, 24, 16)
    for enabled in (False, True):
        with torch.set_grad_enabled(enabled):
            assert module(q, k, v, grid=(4, 6), hidden_states=x).dtype == narrow


def test_modules_call_norms_with_hooks(launched: list[dict[str, Any]]) -> None:
    module, call = module_of(output_norm=True, qk_norm=True)
    assert module.norm is not None
    module.norm.register_forward_hook(lambda module, args, out: 2 * out)
    expected = call()
    with torch.no_grad():
        torch.testing.assert_close(call(), expected)
    assert len(launched) == 4
    assert not any(x["norm"] or x["out_norm"] for x in launched)


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_compiler_sees_one_operator(dynamic: bool | None) -> None:
    _, call = module_of(output_norm=True, qk_norm=True, gate=True)
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, example: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes if str(node.target).startswith("mhla."))
        return graph

    torch._dynamo.reset()
    with torch.no_grad():
        expected = call()
        compiled = torch.compile(call, backend=backend, fullgraph=True, dynamic=dynamic)
        torch.testing.assert_close(compiled(), expected)
    assert seen == ["mhla.fused.default"]
