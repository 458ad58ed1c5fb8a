"""The operators as torch sees them: schema, fake tensors, autograd, and tensors of more than 2^31 numbers."""

from __future__ import annotations

import os
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from mhla_diffusion.ops import BlockLayout, mhla, mhla_causal, operators
from mhla_diffusion.ops.features import Features, apply_rotary_emb
from mhla_diffusion.ops.mhla import attend
from mhla_diffusion.ops.rotary import rotary_table

SYMBOLIC = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13), reason="torch 2.12 fails at symbolic grids"
)

LAYOUT = BlockLayout((4, 4), (2, 2))
# All that programs of torch.export have stored since the first version: what came later has a default.
SETTINGS = (None, None, [4, 4], [2, 2], None, "relu", 1e-6, True, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads_inside", [False, True])
def test_operators_are_what_they_say(dtype: torch.dtype, heads_inside: bool) -> None:
    """Opcheck on all four, with a transposed W: fake and real shapes, strides and dtypes are equal."""

    def make(*shape: int) -> Tensor:
        if heads_inside:
            return torch.randn(shape[0], shape[2], shape[1], shape[3]).to(dtype).transpose(1, 2)
        return torch.randn(shape).to(dtype)

    q, k, v, grad = (make(1, 2, 16, 8) for _ in range(4))
    mixing = torch.rand(4, 4).T
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    ops = torch.ops.mhla
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    opcheck(ops.summarize.default, (*leaves[1:], *SETTINGS), test_utils=tests)
    summaries, sums, centre = ops.summarize(k, v, *SETTINGS)
    out, den = ops.read(q, summaries, sums, centre, mixing, *SETTINGS, dtype)
    leaves = [x.detach().requires_grad_() for x in (q, summaries, sums)]
    opcheck(ops.read.default, (*leaves, centre, mixing.requires_grad_(), *SETTINGS, dtype), test_utils=tests)
    tests = ("test_schema", "test_faketensor")
    opcheck(
        ops.read_backward.default,
        (grad, out, den, q, summaries, sums, mixing.detach(), *SETTINGS),
        test_utils=tests,
    )
    opcheck(ops.summarize_backward.default, (summaries, sums, k, v, centre, *SETTINGS), test_utils=tests)


@pytest.mark.parametrize("rotary", [False, True], ids=["", "rotary"])
@pytest.mark.parametrize(
    ("dtype", "width"),
    [
        (torch.float32, 16),
        (torch.float16, 32),
        (torch.bfloat16, 64),
        (torch.bfloat16, 80),
        (torch.bfloat16, 128),
    ],
    ids=str,
)
def test_operators_give_denominators_with_gradients_of_their_own(
    dtype: torch.dtype, width: int, rotary: bool
) -> None:
    """Of W as it is, in which a row sees nothing, and some keys are masked; against float64."""
    inputs = [x.to(dtype) for x in torch.randn(3, 1, 2, 16, width)]
    mixing = torch.rand(4, 4) * torch.tensor([[3.0], [0], [0.2], [1]])
    angles = torch.rand(16, width // 2) * 6
    mask = torch.rand(1, 16) > 0.3
    # Where nothing is seen, the output has no derivative.
    weights = torch.randn(1, 2, 16, width) * (LAYOUT.block_index() != 1)[:, None], torch.randn(1, 2, 16, 1)
    table = rotary_table((angles.cos(), angles.sin())) if rotary else None
    features = Features("relu", 1e-6, normalized=True, rotary=table, scaled=False)
    block, turned = LAYOUT.block_index(), partial(apply_rotary_emb, rotary_emb=(angles.cos(), angles.sin()))

    def exact(q: Tensor, k: Tensor, v: Tensor, mixing: Tensor) -> tuple[Tensor, Tensor]:
        q, k = (x.relu() + 1e-6 for x in (q, k))
        q_turned, k_turned = (turned(x) if rotary else x for x in (q, k))
        seen = mixing[block][:, block] * mask
        sums = (q @ k.mT * seen).sum(-1, keepdim=True)
        return (q_turned @ k_turned.mT * seen) @ v / torch.where(sums == 0, 1, sums), sums

    def results(function: Any, cast: Any) -> list[Tensor]:
        leaves = [cast(x).requires_grad_() for x in (*inputs, mixing)]
        found = function(*leaves)
        loss = sum((weight.to(x.dtype) * x).double().sum() for weight, x in zip(weights, found, strict=True))
        return [*found, *torch.autograd.grad(loss, leaves)]

    def operators(q: Tensor, k: Tensor, v: Tensor, mixing: Tensor) -> tuple[Tensor, Tensor]:
        return attend(q, k, v, mixing, LAYOUT, LAYOUT, features, mask, torch.float32)

    limit = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    pairs = zip(results(operators, torch.clone), results(exact, Tensor.double), strict=True)
    for name, (a, b) in zip(("out", "den", "q", "k", "v", "mixing"), pairs, strict=True):
        assert (a.double() - b).norm() < limit * b.norm(), name
    assert (operators(*inputs, mixing)[1] == 0).sum() == 8, "the queries of a row of zeros, in two heads"


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels take no float64")
def test_operators_give_denominators_that_are_differentiable_twice() -> None:
    inputs = [x.double().requires_grad_() for x in torch.randn(3, 1, 1, 16, 4)]
    mixing = torch.rand(4, 4, dtype=torch.float64, requires_grad=True)
    features = Features("elu", 1e-6, normalized=True, scaled=False)

    def both(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return attend(*tensors, LAYOUT, LAYOUT, features, None, torch.float64)

    assert torch.autograd.gradcheck(both, (*inputs, mixing))
    assert torch.autograd.gradgradcheck(both, (*inputs, mixing))


class Seen(TorchDispatchMode):
    """Notes the operators of MHLA."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names += [function._opname] if function.namespace == "mhla" else []
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operators_are_seen_and_give_what_they_give_unseen(dtype: torch.dtype) -> None:
    """Calls that nothing looks on do not pass through torch; they are the same to the last bit."""
    leaves = [x.to(dtype).requires_grad_() for x in torch.randn(3, 1, 2, 16, 8)]
    mixing = torch.rand(4, 4).requires_grad_()

    def results() -> list[Tensor]:
        out = mhla(*leaves, mixing, LAYOUT)
        return [out, *torch.autograd.grad(out.square().sum(), [*leaves, mixing])]

    expected = results()
    with Seen() as seen:
        found = results()
    assert seen.names == ["summarize", "read", "read_backward", "summarize_backward"]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with torch.no_grad():
        assert torch.equal(mhla(*leaves, mixing, LAYOUT), expected[0])


class OnSecondGpu:
    """What an operator looks at in a tensor before it runs."""

    device = torch.device("cuda", 1)


@pytest.mark.filterwarnings("ignore:User provided device_type")
def test_operators_run_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device, which need not be theirs."""
    events: list[Any] = []

    class Guard:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            events.append(self.device)

        def __exit__(self, *_: object) -> None:
            events.append("left")

    implementation = SimpleNamespace(summarize=lambda *_: events.append("ran"))
    monkeypatch.setattr(torch.cuda, "device", Guard)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(operators, "implementation_for", lambda *_: implementation)
    operators._summarize.run(OnSecondGpu(), OnSecondGpu(), *SETTINGS)
    assert events == [torch.device("cuda", 1), "ran", "left"]


def test_operators_take_the_expanded_gradient_of_a_sum() -> None:
    q, k, v = torch.randn(3, 1, 2, 16, 8).unbind()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = mhla(*leaves, torch.rand(4, 4), LAYOUT)
    expected = torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True)
    for a, b in zip(torch.autograd.grad(out.sum(), leaves), expected, strict=True):
        assert torch.equal(a, b)


def test_operators_take_no_samples() -> None:
    x = torch.empty(0, 2, 16, 8, dtype=torch.bfloat16, requires_grad=True)
    out = mhla(x, x, x, torch.rand(4, 4, requires_grad=True), LAYOUT)
    assert out.shape == torch.autograd.grad(out.sum(), x)[0].shape == x.shape


def test_operators_reach_tokens_more_than_2_to_the_31_numbers_apart() -> None:
    # Memory that is never touched costs nothing.
    far = torch.empty(2**33, dtype=torch.bfloat16).as_strided((1, 1, 4, 16), (2**33, 2**33, 2**31 + 16, 1))
    near = torch.randn(1, 1, 4, 16).bfloat16()
    far.copy_(near)
    layout, mixing = BlockLayout((4,), (2,)), torch.rand(2, 2)
    assert torch.equal(mhla(far, far, far, mixing, layout), mhla(near, near, near, mixing, layout))


def test_operators_are_differentiable_twice_in_narrow_dtypes() -> None:
    """Through the composite form, with the centre and the sums of the kernels."""
    q, k, v = (torch.randn(1, 1, 16, 8) + 1 for _ in range(3))
    mixing = torch.rand(4, 4)

    def second(*inputs: Tensor, kernels: str) -> Tensor:
        os.environ["MHLA_KERNELS"] = kernels
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = mhla(*leaves, mixing, LAYOUT)
        gradients = torch.autograd.grad(out.double().square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(x.double().square().sum() for x in gradients), leaves[0])[0].double()

    kernels = os.environ.get("MHLA_KERNELS", "auto")
    try:
        inputs = [x.bfloat16() for x in (q, k, v)]
        found = second(*inputs, kernels=kernels)
        expected = second(*(x.double() for x in inputs), kernels="torch")
    finally:
        os.environ["MHLA_KERNELS"] = kernels
    assert (found - expected).norm() / expected.norm() < 0.1


@pytest.mark.parametrize("tracing_mode", ["fake", pytest.param("symbolic", marks=SYMBOLIC)])
def test_outputs_without_numbers_lie_in_memory_as_those_with(tracing_mode: str) -> None:
    """A compiler reads the output where its strides said that it would be."""
    mixing = torch.rand(4, 4)

    def attend(q: Tensor, k: Tensor, v: Tensor, mixing: Tensor) -> Tensor:
        return mhla(q, k, v, mixing, BlockLayout((4, 6), (2, 2)))

    side_by_side = [torch.randn(3, 24, 2, 8).transpose(1, 2) for _ in range(3)]
    for inputs in (side_by_side, [x.contiguous() for x in side_by_side]):
        nodes = make_fx(attend, tracing_mode=tracing_mode)(*inputs, mixing).graph.nodes
        (out, _), *others = (node.meta["val"] for node in nodes if str(node.target) == "mhla.read.default")
        assert not others
        assert tuple(map(int, out.stride())) == attend(*inputs, mixing).stride()


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing of the kernels is traced")
@pytest.mark.parametrize("causal", [pytest.param(False, marks=SYMBOLIC), True], ids=["", "causal"])
def test_one_graph_serves_grids_of_any_size(causal: bool) -> None:
    """Fullgraph and dynamic: no message of an error that does not happen may break the graph."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mixing: Tensor, height: int) -> Tensor:
        if causal:
            return mhla_causal(q, k, v, mixing, 16)
        return mhla(q, k, v, mixing, BlockLayout((height, q.shape[2] // height), (2, 2)))

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    mixing = torch.rand(4, 4)
    for height, width in ((4, 6), (5, 7)):
        inputs = [torch.randn(1, 2, height * width, 8).requires_grad_() for _ in range(3)]
        results = []
        for function in (compiled, attend):
            out = function(*inputs, mixing, height)
            results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
