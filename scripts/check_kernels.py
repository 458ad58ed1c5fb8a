"""Compile the GPU kernels as they would be launched, for GPUs that are not here, and count what that costs.

python scripts/check_kernels.py              # every target, dtype and width: about half an hour
python scripts/check_kernels.py --few        # what the tests check: under a minute

Launches are recorded on meta tensors and compiled with the specialisation of the launcher. What is checked:
each compiles, fits the shared memory of the GPU, spills nothing (exact float32 next to nothing), reads no 2
bytes at a time where rows are aligned, and takes no more instructions in its loop for each token than its
budget. And bytes that forward and backward move, operations of torch among them, are within their limits at
the shapes of models.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mhla_diffusion.ops import BlockLayout, Norms
from mhla_diffusion.ops.features import FEATURE_MAPS, Features
from mhla_diffusion.ops.gpu import kernels, mhla, window
from mhla_diffusion.ops.gpu import launch as launching

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
# Shared memory that a program may have, in bytes.
SHARED = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376, "gfx": 65_536}
TARGETS: tuple[int | str, ...] = (80, 86, 90, 100, 120, "gfx942")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
POINTERS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32",
    torch.bool: "*i1",
}  # fmt: skip


class Case(NamedTuple):
    """A launch of all kernels: forward and backward of q, k and v as projections leave them.

    With ``margin`` those of softmax windows, beside a rest; without it those of the operator. With ``sums``
    those of that rest: in float32, and with gradients of the denominators. With ``norms`` those of a forward
    alone, with norms of q, k and the output and a gate.
    """

    name: str
    d: int
    heads: int
    grid: tuple[int, ...]
    blocks: tuple[int, ...]
    rotary: bool = False
    dtype: str = "bf16"
    feature_map: str = "relu"
    mask: bool = False
    normalized: bool = True
    margin: int | None = None
    sums: bool = False
    norms: bool = False


SHAPES = [
    Case("DiT-XL 16k", 72, 16, (128, 128), (8, 8)),
    Case("Wan 31.5k", 128, 12, (21, 30, 50), (3, 5, 10), rotary=True),
    Case("SANA-V 31.5k", 112, 20, (21, 30, 50), (3, 5, 8), rotary=True),
    Case("1M", 64, 1, (1024, 1024), (16, 16)),
]

DIT, WAN, _, MILLION = SHAPES
WIDE, EXACT, SMALL = (
    Case(f"d {d}, {t}", d, 8, (64, 64), (4, 4), True, t)
    for d, t in ((256, "bf16"), (128, "fp32"), (64, "fp32"))
)
BESIDE_WINDOW, LONG_BESIDE_WINDOW = (
    case._replace(name=f"{case.name}, beside a window", sums=True) for case in (DIT, WAN)
)
GATED, LONG_GATED = (case._replace(name=f"{case.name}, norms and gate", norms=True) for case in (DIT, WAN))
WINDOW, SHORT = DIT._replace(name="DiT-XL 16k, window", margin=1), DIT._replace(d=64, margin=0, mask=True)
LOOPS = ("centre", "outer", "inner", "queries", "keys", "outer of quotients")
ALL = (*LOOPS, "weights", "weights_grad")
BACKWARD = LOOPS[3:]
WINDOWS = ("window", "window_queries", "window_keys", "window_sum")
# What the tests compile, a second each: the largest kernels for all targets, all kernels for one.
FEW: list[tuple[Case, int | str, tuple[str, ...]]] = [
    (DIT, 90, ALL),
    (WAN, 90, LOOPS[1:]),
    (MILLION, 90, BACKWARD),
    (SMALL, 90, ("outer", "queries")),
    (WAN, 80, ("inner", "keys", "outer of quotients")),
    (EXACT, 86, ("outer", "keys")),
    (WIDE, 120, ("inner", "keys")),
    (DIT, 100, ("inner", "keys")),
    (DIT, "gfx942", ("keys", "outer of quotients")),
    (BESIDE_WINDOW, 90, ("queries",)),
    (LONG_BESIDE_WINDOW, 90, ("inner", "queries", "outer of quotients")),
    (WINDOW, 90, WINDOWS),
    (GATED, 90, ("outer", "inner")),
    (LONG_GATED, 90, ("outer", "inner")),
    (LONG_GATED, 80, ("inner",)),
    (GATED, "gfx942", ("inner",)),
    (SHORT, 120, ("window_keys",)),
    (WINDOW, "gfx942", ("window_keys",)),
]
# Instructions that warps may issue in the loop for each token and head, at compute capability 9.0; None where
# no such kernel is launched.
BUDGET = {
    (case.name, name): budget
    for case, budgets in (
        (DIT, (65, 25, 30, 70, 45, 50)),
        (WAN, (None, 55, 75, 160, 100, None)),
        (MILLION, (10, 18, 25, 75, 32, None)),
        (LONG_BESIDE_WINDOW, (None, None, None, None, None, 90)),
        (GATED, (None, 40, 85, None, None, None)),
        (LONG_GATED, (None, 80, 165, None, None, None)),
    )
    for name, budget in zip(LOOPS, budgets, strict=True)
    if budget is not None
}
# Bytes that forward and backward may move, over the least.
MOST_MOVED = {
    "DiT-XL 16k": (1.35, 1.7), "Wan 31.5k": (1.75, 1.9), "SANA-V 31.5k": (1.5, 1.65), "1M": (1.1, 1.1),
    "DiT-XL 16k, window": (1.05, 1.75), "DiT-XL 16k, beside a window": (1.3, 1.8),
    "Wan 31.5k, beside a window": (1.65, 2.25), "DiT-XL 16k, norms and gate": (1.3,),
    "Wan 31.5k, norms and gate": (1.6,),
}  # fmt: skip
# Bytes a thread, of exact products of float32 and of rows of float32 beside a window; others spill nothing.
MOST_SPILLED = 32


class Launch(NamedTuple):
    """A kernel with the arguments that it was launched with."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


@contextmanager
def recorded(target: int | str = 90) -> Iterator[list[Launch]]:
    """Launches are noted instead of made, as they would be on such a GPU."""
    launches: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel, self.arg_names = kernel, kernel.arg_names

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *arguments, **options: launches.append(
                Launch(self.kernel, grid, arguments, options)
            )

    names = [name for name in dir(kernels) if name.endswith("_kernel")]
    recorders: dict[str, Any] = {name: Recorder(getattr(kernels, name)) for name in names}
    major = 0 if isinstance(target, str) else target // 10
    with (
        mock.patch.multiple(kernels, **recorders),
        mock.patch.object(launching, "_major", return_value=major),
    ):
        yield launches


class Moved(TorchDispatchMode):
    """Counts the bytes that operations of torch read and write, each tensor once."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if not (function.is_view or "view" in function.name() or "empty" in function.name()):
            self.bytes += bytes_of((args, out))
        return out


def bytes_of(arguments: object) -> int:
    """Bytes of all tensors among the arguments, of which none is counted twice for being expanded."""
    tensors = (x for x in tree_leaves(arguments) if isinstance(x, torch.Tensor))
    return sum(
        x.itemsize * math.prod(size for size, stride in zip(x.shape, x.stride(), strict=True) if stride)
        for x in tensors
    )


def bytes_moved(launch: Launch) -> int:
    """Bytes that a kernel has to read and write; ``centre`` reads a sample, which is left out."""
    return 0 if name_of(launch) == "centre" else bytes_of((launch.arguments, launch.options))


def passes_of(case: Case, target: int | str = 90, *, batch: int = 1) -> Iterator[tuple[list[Launch], int]]:
    """What a forward and what a backward launches, and the bytes that each of them moves."""
    if case.margin is not None:
        yield from window_passes_of(case, target, batch=batch)
        return
    layout, dtype = BlockLayout(case.grid, case.blocks), DTYPES[case.dtype]
    shape = batch, layout.num_tokens, case.heads, case.d
    q, k, v = (torch.empty(shape, dtype=dtype, device="meta").transpose(1, 2) for _ in range(3))
    kind = torch.float32 if case.sums else dtype
    grad = torch.empty(shape, dtype=kind, device="meta").transpose(1, 2)
    rotary = torch.empty(shape[1], case.d, device="meta") if case.rotary else None
    features = Features(case.feature_map, 1e-6, case.normalized, rotary, scaled=not case.sums)
    mask = torch.empty(batch, shape[1], dtype=torch.bool, device="meta") if case.mask else None
    keys = dataclasses.replace(features, mask=mask)
    mixing = torch.empty(layout.num_blocks, layout.num_blocks, device="meta")
    weights, gate = torch.empty(case.d, device="meta"), torch.empty_like(q)
    norms = Norms(weights, weights, weights, gate) if case.norms else Norms()
    with recorded(target) as launches, Moved() as moved:
        summaries, sums, centre = mhla.summarize(k, v, layout, keys, norms)
        out, den = mhla.read(q, summaries, sums, centre, mixing, layout, features, kind, norms)
    yield launches, moved.bytes + sum(map(bytes_moved, launches))
    if case.norms:  # it has no backward
        return
    with recorded(target) as launches, Moved() as moved:
        its = den if case.sums else None, out, den, q, summaries, sums, mixing, layout, features
        mhla.read_backward(grad, *its)
        mhla.summarize_backward(summaries, sums, k, v, centre, layout, keys)
    yield launches, moved.bytes + sum(map(bytes_moved, launches))


def window_passes_of(case: Case, target: int | str, *, batch: int) -> Iterator[tuple[list[Launch], int]]:
    """The same of a softmax window."""
    layout, dtype = BlockLayout(case.grid, case.blocks), DTYPES[case.dtype]
    shape, margin = (batch, layout.num_tokens, case.heads, case.d), layout.margins(case.margin or 0)
    q, k, v = (torch.empty(shape, dtype=dtype, device="meta").transpose(1, 2) for _ in range(3))
    far, grad = (torch.empty(shape, device="meta").transpose(1, 2) for _ in range(2))
    rest = far, torch.empty(q.shape[:3], device="meta")
    mask = torch.empty(batch, shape[1], dtype=torch.bool, device="meta") if case.mask else None
    with recorded(target) as launches, Moved() as moved:
        out, log_den = window.forward(q, k, v, rest, mask, layout, margin)
    yield launches, moved.bytes + sum(map(bytes_moved, launches))
    with recorded(target) as launches, Moved() as moved:
        window.backward(grad, out, log_den, q, k, v, rest, mask, layout, margin)
    yield launches, moved.bytes + sum(map(bytes_moved, launches))


def launches_of(case: Case, target: int | str = 90, *, batch: int = 1) -> list[Launch]:
    """What a forward and a backward launch."""
    return [launch for launches, _ in passes_of(case, target, batch=batch) for launch in launches]


def traffic_of(case: Case) -> list[float]:
    """Bytes that forward and backward move, over the least.

    That is q, k, v and the output, and, as no output is read, q, k, v and four gradients. Of a window the
    rest and the output, which is read, are twice as wide, and so are their gradients; so is the output of
    what stands beside it. A gate is one more that is read, in a forward alone.
    Whatever one kernel writes and another reads is counted twice, as if no cache kept it; what one kernel
    reads is counted once.
    """
    launches_of(case)  # makes the order of the tokens, which is kept
    tokens = case.heads * case.d * math.prod(case.grid) * DTYPES[case.dtype].itemsize
    leasts = (5,) if case.norms else (7, 14) if case.margin is not None else (5, 8) if case.sums else (4, 7)
    return [moved / (least * tokens) for least, (_, moved) in zip(leasts, passes_of(case), strict=True)]


def source_of(launch: Launch) -> tuple[ASTSource, dict[str, int]]:
    """What the launcher would compile: ones and None are constants, multiples of 16 known as such."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    stages = {
        name: value
        for name, value in launch.options.items()
        if name in ("num_warps", "num_stages", "maxnreg")
    }
    values = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False)) | launch.options
    for i, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, values[parameter.name]
        specialised = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialised and type(value) is int and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(i,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i64" if abs(value) >= 2**31 else "i32"
            if specialised and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes), stages


class Cost(NamedTuple):
    """Cost of a compiled kernel: shared memory in bytes, registers and spilled bytes of a thread, loads of 2
    bytes, and instructions that warps issue in the loop for each token (0 where they cannot be counted)."""

    shared: int
    registers: int
    spilled: int
    narrow_loads: int
    instructions: float


def cost_of(launch: Launch, target: int | str) -> Cost:
    """Compile for a compute capability or an AMD architecture."""
    source, stages = source_of(launch)
    if isinstance(target, str):
        compiled = triton.compile(source, target=GPUTarget("hip", target, 64), options=stages)
        counts = (
            re.findall(rf"\.{n}:\s+(\d+)", compiled.asm["amdgcn"]) for n in ("vgpr_count", "vgpr_spill_count")
        )
        registers, spilled = (int(count[-1]) for count in counts)
        return Cost(compiled.metadata.shared, registers, 4 * spilled, 0, 0)
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=stages)
    ptx = compiled.asm["ptx"]
    architecture = re.findall(r"\.target\s+(sm_\w+)", ptx)[0]
    tool = "ptxas-blackwell" if target >= 100 else "ptxas"
    report = run_tool(tool, ptx.encode(), "-v", f"--gpu-name={architecture}", "-o", os.devnull)
    instructions = 0.0
    if target < 100:
        loop = longest_loop(run_tool("nvdisasm", compiled.asm["cubin"], "-c"))
        instructions = loop * stages["num_warps"] / launch.options.get("ROWS", 1)
    return Cost(
        shared=compiled.metadata.shared,
        registers=int(re.findall(r"Used (\d+) registers", report)[-1]),
        spilled=sum(int(size) for size in re.findall(r"(\d+) bytes spill", report)),
        narrow_loads=len(re.findall(r"ld\.global\S*\.b16 |cp\.async\S*[^;]*, 0x2;", ptx)),
        instructions=instructions,
    )


def run_tool(name: str, code: bytes, *options: str) -> str:
    """What one of the tools that come with Triton says of a file."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(code)
        file.flush()
        command = [str(TOOLS / name), *options, file.name]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    return result.stdout + result.stderr


def longest_loop(assembly: str) -> int:
    """Instructions in the longest loop, from a label to the branch back to it."""
    labels: dict[str, int] = {}
    position = longest = 0
    for line in assembly.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label.group(1)] = position
        if instruction := re.search(r"/\*[0-9a-f]{4,5}\*/\s+(.*?);", line):
            position += 1
            branch = re.search(r"BRA.*`\((\.L_x_\d+)\)", instruction.group(1))
            if branch and branch.group(1) in labels:
                longest = max(longest, position - labels[branch.group(1)])
    return longest


def faults_of(cost: Cost, launch: Launch, target: int | str, budget: float | None) -> list[str]:
    """What is wrong with a compiled kernel."""
    limit = SHARED["gfx" if isinstance(target, str) else target]
    exact = launch.options.get("OPERAND") == tl.float32 and launch.options["PRECISION"] == "ieee"
    rows = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False)).get("v")
    wide = isinstance(rows, torch.Tensor) and rows.dtype == torch.float32
    aligned = 8 in (launch.options.get("VEC"), min(launch.options.get(f"{x}_VEC", 1) for x in "XV"))
    checks = {
        f"{cost.shared} bytes of shared memory, of {limit}": cost.shared > limit,
        f"{cost.spilled} bytes spilled": cost.spilled > (MOST_SPILLED if exact or wide else 0),
        f"{cost.narrow_loads} loads of 2 bytes": aligned and cost.narrow_loads > 0,
        f"{cost.instructions:.0f} instructions a token, budget {budget}": budget is not None
        and target == 90
        and not 0 < cost.instructions <= budget,
    }
    return [text for text, wrong in checks.items() if wrong]


def name_of(launch: Launch) -> str:
    """The kernel, and whether it works for queries of the backward."""
    name = launch.kernel.fn.__name__.removesuffix("_kernel")
    return f"{name} of quotients" if launch.options.get("QUOTIENT") else name


def matrix() -> Iterator[tuple[Case, int | str, tuple[str, ...]]]:
    """All that is compiled."""
    yield from itertools.product(SHAPES, TARGETS, (ALL,))
    for d, dtype, target in itertools.product((16, 64, 72, 112, 128, 160, 256), DTYPES, TARGETS):
        yield Case(f"d {d}, {dtype}", d, 8, (64, 64), (4, 4), rotary=d % 16 == 0, dtype=dtype), target, ALL
    for d, dtype, target in itertools.product((64, 72, 128), DTYPES, TARGETS):
        case = Case(f"d {d}, {dtype}, beside a window", d, 8, (64, 64), (4, 4), dtype=dtype, sums=True)
        yield case, target, ("inner", "queries", "outer of quotients")
    for d, dtype, target in itertools.product((64, 72, 128, 256), DTYPES, TARGETS):
        case = Case(f"d {d}, {dtype}, norms and gate", d, 8, (64, 64), (4, 4), d % 16 == 0, dtype, norms=True)
        yield case, target, ("outer", "inner")
    for d, dtype, margin in itertools.product((40, 64, 72, 96, 128), DTYPES, (0, 1)):
        name = f"window, d {d}, {dtype}"
        case = Case(name, d, 8, (64, 64), (4, 4), dtype=dtype, mask=bool(margin), margin=margin)
        yield from itertools.product((case,), TARGETS, (WINDOWS,))
    for name, target in itertools.product(FEATURE_MAPS, TARGETS):
        for mask, normalized in itertools.product((False, True), repeat=2):
            yield Case(name, 64, 8, (64, 64), (4, 4), False, "bf16", name, mask, normalized), target, ALL
    for grid, blocks in (((1,), (1,)), ((16, 1), (1, 1)), ((1024, 1024), (1, 1))):
        yield Case(f"{grid} in {blocks}", 64, 1, grid, blocks), 90, ALL


def check(cases: Iterable[tuple[Case, int | str, tuple[str, ...]]]) -> int:
    """Compile, print a table and return the number of kernels at fault."""
    print("| case | target | kernel | shared | registers | spilled | instructions a token | fault |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    faults, seen = 0, set()
    for case, target, names in cases:
        launches = launches_of(case, target)
        budgeted = {name for of, name in BUDGET if target == 90 and of == case.name and name in names}
        if absent := budgeted - {name_of(launch) for launch in launches}:
            faults += 1
            print(
                f"| {case.name} | {target} | {', '.join(sorted(absent))} | | | | | budgeted, not launched |"
            )
        for launch in launches:
            key = target, name_of(launch), str(source_of(launch)[0].hash()), str(launch.options)
            if key in seen or name_of(launch) not in names:
                continue
            seen.add(key)
            try:
                cost = cost_of(launch, target)
            except Exception as error:  # whatever the compiler raises is the finding
                wrong, numbers = [f"{type(error).__name__}: {str(error).strip()[-200:]}"], "| | |"
            else:
                wrong = faults_of(cost, launch, target, BUDGET.get((case.name, name_of(launch))))
                numbers = f"{cost.shared} | {cost.registers} | {cost.spilled} | {cost.instructions:.0f}"
            faults += bool(wrong)
            print(
                f"| {case.name} | {target} | {name_of(launch)} | {numbers} | {'; '.join(wrong)} |", flush=True
            )
    print(f"\n{faults} of {len(seen)} kernels at fault")
    return faults


def check_traffic() -> int:
    """Print bytes moved over the least, and return the number of shapes that exceed what is allowed."""
    print("\n| shape | forward, of the least bytes | backward, of the least |\n| --- | --- | --- |")
    faults = 0
    for case in (*SHAPES, WINDOW, BESIDE_WINDOW, LONG_BESIDE_WINDOW, GATED, LONG_GATED):
        found = traffic_of(case)
        wrong = any(ratio > most for ratio, most in zip(found, MOST_MOVED[case.name], strict=True))
        faults += wrong
        ratios = " | ".join(f"{ratio:.2f} x" for ratio in found)
        print(f"| {case.name} | {ratios} |{' |' * (2 - len(found))}{' too many' if wrong else ''}")
    return faults


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--few", action="store_true", help="a choice of targets, as in the tests")
    at_fault = check(FEW if parser.parse_args().few else matrix()) + check_traffic()
    sys.exit(min(1, at_fault))
