"""The GPU kernels against the reference in Triton's interpreter, and compiled for GPUs that are not here."""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mhla_diffusion.ops import BlockLayout, dispatch, mhla, mhla_reference, recommended_layout, tiled
from tests.ops.tensors import amid_nan

ROOT = Path(__file__).parents[2]

CASES: dict[str, dict[str, Any]] = {
    "plain": {"grid": (4, 6), "blocks": (2, 2), "batch": 2},
    "ragged": {"grid": (5, 7), "blocks": (2, 3), "d": 24, "d_v": 10, "per_head": True, "batch": 2},
    "a matrix for each sample": {"grid": (5, 7), "blocks": (2, 3), "per_sample": True, "batch": 2},
    "video, positions, mask": {
        "grid": (3, 5, 4), "blocks": (2, 2, 1), "rotary": True, "mask": True, "batch": 2,
    },
    "positions of each head": {
        "grid": (4, 6), "blocks": (2, 2), "rotary": True, "rotary_each": (3,), "batch": 2, "heads": 3,
    },
    "positions of each sample and head": {
        "grid": (4, 6), "blocks": (2, 2), "rotary": True, "rotary_each": (2, 3), "batch": 2, "heads": 3,
    },
    "no denominator": {
        "grid": (3, 5, 4), "blocks": (2, 2, 1), "rotary": True, "normalizer": "none", "feature_map": "elu",
    },
    "bfloat16": {"grid": (60,), "blocks": (2,), "feature_map": "softmax", "mask": True, "dtype": "bfloat16"},
    "bfloat16, ragged, positions": {
        "grid": (5, 7), "blocks": (2, 3), "d": 24, "d_v": 10, "rotary": True, "dtype": "bfloat16", "batch": 2,
    },
    "bfloat16, no denominator": {
        "grid": (5, 7), "blocks": (2, 3), "normalizer": "none", "mask": True, "dtype": "bfloat16", "batch": 2,
    },
    "bfloat16, official": {
        "grid": (4, 4), "blocks": (2, 2), "normalizer": "official", "rotary": True, "dtype": "bfloat16",
    },
    "float16": {"grid": (5, 7), "blocks": (2, 3), "feature_map": "elu", "rotary": True, "dtype": "float16"},
    "cross-attention": {"grid": (5, 7), "blocks": (2, 3), "keys": (11, 3), "mask": True},
    "bfloat16, cross-attention": {
        "grid": (5, 7), "blocks": (2, 3), "keys": (11, 3), "mask": True, "dtype": "bfloat16", "batch": 2,
    },
    "official": {"grid": (4, 4), "blocks": (2, 2), "normalizer": "official"},
    "several tiles of channels": {"grid": (4, 2), "blocks": (2, 1), "d": 20, "d_v": 70},
    "bfloat16, several tiles of channels": {
        "grid": (4, 2), "blocks": (2, 1), "d": 20, "d_v": 140, "dtype": "bfloat16",
    },
    "bfloat16, sums of features alone": {
        "grid": (5, 7), "blocks": (2, 3), "d": 24, "d_v": 1, "normalizer": "none", "dtype": "bfloat16",
    },
    "bfloat16, features wider than values": {
        "grid": (5, 7), "blocks": (2, 3), "d": 144, "d_v": 72, "dtype": "bfloat16",
    },
    "bfloat16, a width between": {
        "grid": (5, 7), "blocks": (2, 3), "d": 72, "d_v": 72, "mask": True, "dtype": "bfloat16", "batch": 2,
    },
    "bfloat16, a width between, positions": {
        "grid": (5, 7), "blocks": (2, 3), "d": 72, "d_v": 72, "rotary": True, "dtype": "bfloat16",
    },
    "bfloat16, a width between, no denominator": {
        "grid": (5, 7), "blocks": (2, 3), "d": 88, "d_v": 88, "feature_map": "elu", "normalizer": "none",
        "dtype": "bfloat16",
    },
    "wide heads": {"grid": (4, 2), "blocks": (2, 1), "d": 160, "d_v": 160, "rotary": True},
    "heads side by side": {"grid": (4, 6), "blocks": (2, 2), "heads_inside": True, "batch": 2},
    "channels apart": {"grid": (4, 6), "blocks": (2, 2), "channels_apart": True, "batch": 2},
    "one token a block": {"grid": (4, 2), "blocks": (4, 2)},
    "one block, shared by programs": {"grid": (20, 40), "blocks": (1, 1), "heads": 1},
    "bfloat16, blocks shared by programs": {
        "grid": (20, 39), "blocks": (1, 3), "mask": True, "dtype": "bfloat16", "heads": 1,
    },
    "extra tokens": {
        "grid": (5, 7), "blocks": (2, 3), "extra": (2, 20), "rotary": True, "mask": True, "batch": 2,
    },
    "extra tokens, shared by programs": {"grid": (4, 4), "blocks": (2, 2), "extra": (300, 0)},
    "bfloat16, extra tokens": {"grid": (5, 7), "blocks": (2, 3), "extra": (1, 9), "dtype": "bfloat16"},
    "extra tokens beside 64 blocks": {"grid": (8, 8), "blocks": (8, 8), "extra": (1, 3), "heads": 1},
    "no extra tokens this time": {"grid": (4, 4), "blocks": (2, 2), "extra": (0, 0)},
    "nothing seen": {"grid": (4, 6), "blocks": (2, 2), "nothing": True},
    "nothing seen, bfloat16": {"grid": (4, 6), "blocks": (2, 2), "nothing": True, "dtype": "bfloat16"},
}  # fmt: skip
LIMIT = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1e-2}


def compare(
    grid: tuple[int, ...],
    blocks: tuple[int, ...],
    *,
    extra: tuple[int, int] | None = None,
    keys: tuple[int, int] | None = None,
    batch: int = 1,
    heads: int = 2,
    d: int = 8,
    d_v: int = 8,
    dtype: str = "float32",
    per_head: bool = False,
    per_sample: bool = False,
    rotary: bool = False,
    rotary_each: tuple[int, ...] = (),
    mask: bool = False,
    heads_inside: bool = False,
    channels_apart: bool = False,
    nothing: bool = False,
    **options: Any,
) -> list[float]:
    """Relative errors of the output and of the gradients of q, k, v and mixing.

    Tensors lie amid NaN, and so does what is new.
    """
    torch.manual_seed(0)
    layout = BlockLayout(grid, blocks, extra)
    key_layout = None if keys is None else BlockLayout(keys[:1], keys[1:])
    tokens, key_tokens = layout.num_tokens, (key_layout or layout).num_tokens

    def make(tokens: int, channels: int) -> torch.Tensor:
        order = {"heads_inside": heads_inside, "channels_apart": channels_apart}
        return amid_nan(batch, heads, tokens, channels, dtype, **order).requires_grad_()

    inputs = [make(tokens, d), make(key_tokens, d), make(key_tokens, d_v)]
    size = layout.num_blocks, (key_layout or layout).num_blocks
    each = [batch, heads] if per_sample else [heads] if per_head else []
    mixing = torch.rand(*each, *size)
    if rotary:
        angles = torch.rand(*rotary_each, tokens, d // 2) * 6
        options["rotary_emb"] = (angles.cos(), angles.sin())
    if mask or nothing:
        options["key_mask"] = torch.rand(batch, key_tokens) > (1 if nothing else 0.3)
    inputs.append(mixing.requires_grad_())
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out = mhla(*inputs, layout, key_layout=key_layout, **options)
    expected = mhla_reference(*exact, layout, key_layout=key_layout, **options)
    cotangent = torch.randn_like(expected).to(out.dtype)
    gradients = torch.autograd.grad(out, inputs, cotangent)
    references = torch.autograd.grad(expected, exact, cotangent.double())
    found, wanted = [out, *gradients], [expected, *references]
    if layout.num_blocks == 1:  # the output does not depend on the one weight
        assert found.pop().abs().max() < 1e-2
        wanted.pop()
    errors = [(a.double() - b).norm() / b.norm().clamp_min(1e-12) for a, b in zip(found, wanted, strict=True)]
    return [error.item() if error.isfinite() else 1e9 for error in errors]


if __name__ == "__main__":
    # In a process of its own: Triton decides on import whether it interprets.
    sys.path.insert(0, str(Path(__file__).parent))
    __import__("conftest")
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    sys.stdout.write(json.dumps({name: compare(**case) for name, case in CASES.items()}))


INTERPRETED = {"TRITON_INTERPRET": "1", "MHLA_KERNELS": "triton", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def errors() -> Any:
    pytest.importorskip("triton")
    command = [sys.executable, __file__]
    result = subprocess.run(
        command, env={**os.environ, **INTERPRETED}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_the_reference(errors: Any, case: str) -> None:
    assert max(errors[case]) < LIMIT[CASES[case].get("dtype", "float32")], errors[case]


def test_kernels_pass_the_tests_of_precision_and_operators() -> None:
    """Values with a mean, exact ones, NaN, tiny weights, float16 sums, opcheck, wide strides: interpreted."""
    pytest.importorskip("triton")
    folder = Path(__file__).parent
    some = (
        "(mean and (16-0-paper- or 16-1-paper- or 16-3-paper- or 16-3-none-rotary or 16-1-paper-rotary) "
        "and not (16-1-paper-rotary and float16)) or 32-3-paper- or wide_heads or exactly_one or nan_in "
        "or stays_finite or all_zero_row or operators"
    )
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", some,
         folder / "test_precision.py", folder / "test_operators.py"],
        env={**os.environ, **INTERPRETED}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:]
    assert int(re.findall(r"(\d+) passed", result.stdout)[0]) >= 15


@pytest.mark.parametrize(
    ("file", "least"),
    [
        ("interpreted_windows.py", 20),  # dense attention, opcheck, compilers, gradients of gradients, NaN
        ("interpreted_norms.py", 25),  # the reference, opcheck, compilers, FLOPs, modules with hooks
    ],
)
def test_kernels_pass_their_tests_interpreted(file: str, least: int) -> None:
    pytest.importorskip("triton")
    path = Path(__file__).with_name(file)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", path],
        env={**os.environ, **INTERPRETED}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:]
    assert int(re.findall(r"(\d+) passed", result.stdout)[0]) >= least


@functools.cache
def check_kernels() -> Any:
    """scripts/check_kernels.py as a module."""
    pytest.importorskip("triton")
    path = ROOT / "scripts" / "check_kernels.py"
    spec = importlib.util.spec_from_file_location("check_kernels", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_kernels"] = module
    spec.loader.exec_module(module)
    return module


def test_kernels_compile_as_launched_within_their_budgets(capfd: pytest.CaptureFixture[str]) -> None:
    """What scripts/check_kernels.py checks, for some of its targets: memory, spills, loads, instructions."""
    module = check_kernels()
    assert module.check(module.FEW) == 0, capfd.readouterr().out
    budgeted = {name for name, _ in module.BUDGET}
    assert budgeted <= {case.name for case, target, _ in module.FEW if target == 90}


def test_budgets_that_nothing_was_held_to_are_faults(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    module = check_kernels()
    small = module.DIT._replace(name="small", d=16, heads=1)
    monkeypatch.setitem(module.BUDGET, ("small", "outer of sums"), 10)
    monkeypatch.setitem(module.BUDGET, ("small", "centre"), 1000)
    monkeypatch.setattr(module, "longest_loop", lambda assembly: 0)
    assert module.check([(small, 90, ("centre", "outer of sums"))]) == 2
    told = capfd.readouterr().out
    assert "| small | 90 | outer of sums | | | | | budgeted, not launched |" in told
    assert "0 instructions a token, budget 1000" in told


def test_no_more_bytes_are_moved_than_is_allowed(capfd: pytest.CaptureFixture[str]) -> None:
    module = check_kernels()
    assert module.check_traffic() == 0, capfd.readouterr().out
    whole = module.bytes_of(torch.empty(2, 3, device="meta").expand(5, 2, 3))
    assert whole == 24, "what is expanded lies in memory once"


@pytest.mark.parametrize("batch", [1, 8192])
def test_launches_are_within_the_limits_of_a_grid_and_fill_a_gpu(batch: int) -> None:
    """On one axis, 2^31 programs are allowed; on the others 65,535."""
    module = check_kernels()
    grids = {
        "frames as a batch": ((16,), (4,), 8),
        "one block": ((64, 64), (1, 1), 16),
        "one block and head": ((1024, 1024), (1, 1), 1),
        "DiT-S": ((32, 32), recommended_layout((32, 32)).blocks, 6),
        "Wan": ((21, 30, 50), recommended_layout((21, 30, 50)).blocks, 12),
    }
    for name, (grid, blocks, heads) in grids.items():
        launches = module.launches_of(module.Case(name, 64, heads, grid, blocks), batch=batch)
        assert len(launches) >= 5
        for launch in launches:
            assert len(launch.grid) == 1
            assert launch.grid[0] < 2**31
            # Two for each multiprocessor of an H100, where there is work for as many.
            small = batch * heads * math.prod(grid) < 264 * 64
            loops = module.name_of(launch) in module.LOOPS[1:]
            assert small or launch.grid[0] >= 264 or not loops, (name, launch.grid)


def test_vectors_are_no_longer_than_what_all_rows_start_at_multiples_of() -> None:
    launching = check_kernels().launching
    heads_apart = launching.Meta(torch.Size((2, 2, 4, 8)), (36, 18, 8, 1), torch.float32)
    assert launching.vector_of(heads_apart) == 2


def test_places_in_windows_that_are_beyond_31_bits_take_64() -> None:
    """Windows with a margin hold more tokens in all than there are."""
    module, layout = check_kernels(), BlockLayout((2**14,), (4,))
    row, cpu = 2**16 + 16, torch.device("cpu")
    assert layout.num_tokens * row < 2**31 < layout.num_blocks * layout.reach_size((2**13,)) * row
    x = module.launching.Meta(torch.Size((1, 1, 2**14, 16)), (2**31, 2**31, row, 1), torch.float32)
    rows = tuple((name, x) for name in ("q", "k", "v", "grad", "dk", "dv"))
    target = module.launching.Target(9, False)
    plan = module.window._plan("window_keys", layout, (2**13,), None, target, cpu, rows)
    assert plan.launcher._arguments["PLACE"] == module.triton.language.int64


@pytest.mark.parametrize(
    ("dtype", "setting", "operand", "precision"),
    [
        ("fp32", "ieee", "fp32", "ieee"),
        ("fp32", "tf32", "fp32", "tf32"),
        ("fp16", "ieee", "fp32", "tf32"),
        ("bf16", "ieee", "bf16", "ieee"),
    ],
)
def test_products_are_as_precise_as_the_setting_says(
    dtype: str, setting: str, operand: str, precision: str
) -> None:
    """By torch's setting of now: reading the older allow_tf32 raises once this one was made."""
    module = check_kernels()
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = setting
    try:
        launches = module.launches_of(module.Case("any", 16, 2, (4, 4), (2, 2), dtype=dtype))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    options = [launch.options for launch in launches if "OPERAND" in launch.options]
    assert len(options) >= 4
    assert {(str(o["OPERAND"]), o["PRECISION"]) for o in options} == {(operand, precision)}


class Gpu:
    """What Triton asks of a driver. It notes what is launched; tensors stay on the CPU."""

    def __init__(self) -> None:
        self.stream, self.launched, self.utils = 0, [], self

    def get_current_device(self) -> int:
        return 7

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def get_current_target(self) -> Any:
        return check_kernels().GPUTarget("cuda", 90, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448}

    def load_binary(self, name: str, *_: Any) -> tuple[str, str, int, int, int]:
        return name, name, 32, 0, 1024

    def unload_module(self, module: str) -> None:
        """Nothing was loaded."""

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def launch(x: int, y: int, z: int, stream: int, function: str, *rest: Any) -> None:
            arguments = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in rest[4:]]  # behind hooks
            self.launched.append((stream, metadata.hash, (x, y, z), *arguments))

        return launch


def test_a_kernel_is_launched_again_as_triton_launched_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same kernel on the same arguments and the stream of now; Triton is asked where it may compile."""
    module, asked = check_kernels(), []
    gpu, kernels, jit = Gpu(), module.kernels, module.triton.runtime.jit.JITFunction
    run = jit.run
    monkeypatch.setattr(module.triton.runtime.driver, "_active", gpu)
    monkeypatch.setattr(jit, "run", lambda self, *a, **b: asked.append(self) or run(self, *a, **b))
    values = torch.ones(600, dtype=torch.bfloat16)
    features = module.Features("relu", 1e-6, True)
    summaries = torch.ones(1, 1, 4, 16, 16, dtype=torch.bfloat16)
    centre, sums = torch.ones(1, 1, 16), torch.ones(1, 1, 4, 16)

    def launch(start: int) -> tuple[list[Any], list[Any]]:
        asked.clear(), gpu.launched.clear()
        x = values[start : start + 256].view(1, 1, 16, 16)
        module.mhla._centre(x, None, out=centre)
        module.mhla._outer(x, x, summaries, sums, BlockLayout((4, 4), (2, 2)), features, centre=centre)
        return [*asked], [*gpu.launched]

    try:
        first, expected = launch(8)
        assert first == [kernels.centre_kernel, kernels.outer_kernel]
        assert launch(8) == ([], expected)
        asked_again, elsewhere = launch(16)
        assert not asked_again
        assert [x[:3] for x in elsewhere] == [x[:3] for x in expected]
        assert elsewhere != expected
        assert launch(9)[0] == first, "not at a multiple of 16 bytes"
        gpu.stream = 5
        assert launch(8) == ([], [(5, *x[1:]) for x in expected])
    finally:
        module.launching._plan.cache_clear()
        module.mhla._centre_launcher.cache_clear()


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
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla")
    dispatch._log_once.cache_clear()
    dispatch._obstacle_of.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert dispatch.implementation_for(tensor) is tiled
        assert dispatch.implementation_for(tensor) is tiled
    assert len(caplog.records) == 1
    assert re.search(reason, caplog.text)
    dispatch._obstacle_of.cache_clear()  # there is no such GPU
