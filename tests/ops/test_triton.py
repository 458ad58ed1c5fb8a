"""The GPU kernels against the reference in Triton's interpreter, and compiled for GPUs that are not here."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch

from mhla_diffusion.ops import BlockLayout, dispatch, mhla, mhla_reference, tiled

CASES: dict[str, dict[str, Any]] = {
    "plain": {"grid": (4, 6), "blocks": (2, 2)},
    "ragged": {"grid": (5, 7), "blocks": (2, 3), "d": 24, "d_v": 10, "per_head": True},
    "video, positions, mask": {"grid": (3, 5, 4), "blocks": (2, 2, 1), "rotary": True, "mask": True},
    "no denominator": {
        "grid": (3, 5, 4), "blocks": (2, 2, 1), "rotary": True, "normalizer": "none", "feature_map": "elu",
    },
    "bfloat16": {"grid": (60,), "blocks": (2,), "feature_map": "softmax", "mask": True, "dtype": "bfloat16"},
    "cross-attention": {"grid": (5, 7), "blocks": (2, 3), "keys": (11, 3), "mask": True},
    "official": {"grid": (4, 4), "blocks": (2, 2), "normalizer": "official"},
    "several tiles of channels": {"grid": (4, 2), "blocks": (2, 1), "d": 20, "d_v": 70},
    "heads side by side": {"grid": (4, 6), "blocks": (2, 2), "heads_inside": True},
    "nothing seen": {"grid": (4, 6), "blocks": (2, 2), "nothing": True},
}  # fmt: skip


def compare(
    grid: tuple[int, ...],
    blocks: tuple[int, ...],
    *,
    keys: tuple[int, int] | None = None,
    d: int = 8,
    d_v: int = 8,
    dtype: str = "float32",
    per_head: bool = False,
    rotary: bool = False,
    mask: bool = False,
    heads_inside: bool = False,
    nothing: bool = False,
    **options: Any,
) -> list[float]:
    """Relative errors of the output and of the gradients of q, k, v and mixing."""
    torch.manual_seed(0)
    layout = BlockLayout(grid, blocks)
    key_layout = None if keys is None else BlockLayout(keys[:1], keys[1:])
    tokens, key_tokens = layout.num_tokens, (key_layout or layout).num_tokens
    q, k = torch.randn(2, 2, tokens, d), torch.randn(2, 2, key_tokens, d)
    v = torch.randn(2, 2, key_tokens, d_v)
    if heads_inside:
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    size = layout.num_blocks, (key_layout or layout).num_blocks
    mixing = torch.rand(*([2] if per_head else []), *size)
    if rotary:
        angles = torch.rand(tokens, d // 2) * 6
        options["rotary_emb"] = (angles.cos(), angles.sin())
    if mask or nothing:
        options["key_mask"] = torch.rand(2, key_tokens) > (1 if nothing else 0.3)
    inputs = [*(x.to(getattr(torch, dtype)).requires_grad_() for x in (q, k, v)), mixing.requires_grad_()]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out = mhla(*inputs, layout, key_layout=key_layout, **options)
    expected = mhla_reference(*exact, layout, key_layout=key_layout, **options)
    cotangent = torch.randn_like(expected).to(out.dtype)
    gradients = torch.autograd.grad(out, inputs, cotangent)
    references = torch.autograd.grad(expected, exact, cotangent.double())
    pairs = zip((out, *gradients), (expected, *references), strict=True)
    return [((a.double() - b).norm() / b.norm().clamp_min(1e-12)).item() for a, b in pairs]


if __name__ == "__main__":
    # In a process of its own: Triton decides on import whether it interprets.
    sys.stdout.write(json.dumps({name: compare(**case) for name, case in CASES.items()}))


@pytest.fixture(scope="module")
def errors() -> Any:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "MHLA_KERNELS": "triton"}
    command = [sys.executable, __file__]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_the_reference(errors: Any, case: str) -> None:
    assert max(errors[case]) < (1e-2 if CASES[case].get("dtype") == "bfloat16" else 2e-6)


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_gpus(capability: int) -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mhla_diffusion.ops import triton_mhla
    from mhla_diffusion.ops.features import Features

    x, layout = torch.empty(1, 1, 4, 128, dtype=torch.bfloat16), BlockLayout((4,), (2,))
    features = Features("relu", 1e-6, normalized=True, rotary=torch.empty(4, 128))
    for kernel, channels in (("outer", 32), ("inner", 64), ("rows", 32)):
        function = getattr(triton_mhla, f"_{kernel}_kernel")
        _, options = triton_mhla._common(x, 128, layout, features, most_channels=channels)
        options = {**options, "QUOTIENT": True}
        launch = {name: options.pop(name) for name in ("num_warps", "num_stages")}
        kinds = {"summaries": "*fp32", "den": "*fp32", "den_grad": "*fp32", "rotary": "*fp32", "mask": "*i1",
                 "eps": "fp32", "x": "*bf16", "v": "*bf16", "out": "*bf16", "grad": "*bf16"}  # fmt: skip
        names = function.arg_names
        signature = {n: "constexpr" if n in options else kinds.get(n, "i32") for n in names}
        constants = {(names.index(name),): value for name, value in options.items()}
        source = ASTSource(fn=function, signature=signature, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch)
        assert compiled.metadata.shared <= 100 * 1024, "two programs fit a multiprocessor"


def test_torch_runs_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MHLA_KERNELS", raising=False)
    assert dispatch.implementation_for(torch.ones(1)) is tiled


def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("MHLA_KERNELS", "triton")
    with pytest.raises(ValueError, match=r"MHLA_KERNELS=triton, but .*(on cpu|not installed)"):
        dispatch.implementation_for(torch.ones(1))
    monkeypatch.setenv("MHLA_KERNELS", "cuda")
    with pytest.raises(ValueError, match="MHLA_KERNELS must be of auto, torch, triton, got 'cuda'"):
        dispatch.implementation_for(torch.ones(1))


class OnGpu:
    """What implementation_for looks at in a tensor on a GPU."""

    device = torch.device("cuda")

    def __init__(self, dtype: torch.dtype = torch.float32, width: int = 64) -> None:
        self.dtype, self.shape = dtype, (1, 1, 1, width)


@pytest.mark.parametrize(
    ("tensor", "capability", "reason"),
    [
        (OnGpu(), (7, 5), r"Tesla has compute capability \(7, 5\), below \(8, 0\)"),
        (OnGpu(torch.float64), (9, 0), r"torch.float64 is none of float32, bfloat16, float16"),
        (OnGpu(width=512), (9, 0), "heads of 512 channels are wider than 256"),
    ],
)
def test_a_gpu_falls_back_and_says_why_once(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tensor: Any,
    capability: tuple[int, int],
    reason: str,
) -> None:
    monkeypatch.delenv("MHLA_KERNELS", raising=False)
    monkeypatch.setattr(dispatch, "_is_installed", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla")
    dispatch._log_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert dispatch.implementation_for(tensor) is tiled
        assert dispatch.implementation_for(tensor) is tiled
    assert len(caplog.records) == 1
    assert re.search(reason, caplog.text)
