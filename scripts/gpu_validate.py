"""Learn all that one visit to a GPU can tell of the GPU kernels, in under nine minutes; prints one table.

PYTHONPATH=. python scripts/gpu_validate.py --out runs/gpu

Needs torch, triton and the operator with its module alone; what else is installed (flash-linear-attention,
diffusers) is compared with. Each stage is a process with a limit of its own, so that an illegal access or a
hang ends that stage and no other. Times are by CUDA events with a cold cache; scripts/gpu_checks.py and, for
the forms beside the paper's, scripts/gpu_forms.py look at results first. With ``--device cpu`` everything
runs on tiny shapes: that shows that the script works, and no more.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_checks import (
    SHAPES,
    TOLERANCE,
    Check,
    Machine,
    Shape,
    correct_checks,
    peers,
    runtime_checks,
)
from gpu_forms import LIMIT, form_checks, form_time_checks
from torch import Tensor

from mhla_diffusion.ops import BlockLayout, Norms, locality_mixing, mhla, recommended_layout

# Seconds that each stage may take, as long as all together do not take more than MOST.
LIMITS = {
    "machine": 40, "correct": 110, "forms": 90, "runtime": 70, "speed": 180, "form_times": 60, "models": 130,
}  # fmt: skip
MOST = 530
# What is compared with float64, within which errors. Compiling takes longest: several processes share it.
COMPARED = {"correct": TOLERANCE, "forms": LIMIT}

TINY = {"tiny": Shape(16, 2, (8, 8), (2, 2), True)}


# Machine: what the rates are that times are measured by.


def machine_checks(at: Machine) -> Iterator[tuple[str, Check]]:
    yield "versions", lambda: (_versions(at), True)
    yield "rates", lambda: (_rates(at), True)


def _versions(at: Machine) -> str:
    import triton

    text = f"torch {torch.__version__}, triton {triton.__version__}"
    if at.tiny:
        return text
    card = torch.cuda.get_device_properties(0)
    return (
        f"{card.name}, {card.major}.{card.minor}, {card.multi_processor_count} multiprocessors, "
        f"{card.total_memory / 2**30:.0f} GiB, {torch.cuda.device_count()} device(s), {text}"
    )


def copy_rate(at: Machine) -> float:
    """Bytes that a copy reads and writes in a second."""
    x = at.randn(2**10 if at.tiny else 2**29, dtype="bfloat16")
    y = torch.empty_like(x)
    return 2 * x.nbytes / at.seconds(lambda: y.copy_(x))


def _rates(at: Machine) -> str:
    size = 64 if at.tiny else 8192
    products = []
    for dtype in ("bfloat16", "float32"):
        a = at.randn(size, size, dtype=dtype)
        products.append(2 * size**3 / at.seconds(functools.partial(torch.matmul, a, a), 5) / 1e12)
    narrow, wide = products
    return f"copy {copy_rate(at) / 1e12:.2f} TB/s, products {narrow:.0f} (bf16), {wide:.0f} (fp32) TFLOP/s"


# Speed: beside the bytes that have to be moved, and what else there is.


def speed_checks(at: Machine) -> Iterator[tuple[str, Check]]:
    rate = copy_rate(at)
    for name, shape in (TINY if at.tiny else SHAPES).items():
        for batch in (1, 2):
            yield f"{name}, batch {batch}", functools.partial(_speed, at, shape, batch, rate)
    yield "flash-linear-attention", functools.partial(_fla, at)


def _fla(at: Machine) -> tuple[str, bool]:
    """Chunked linear attention of flash-linear-attention: causal, so half the work, the nearest it has."""
    try:
        from fla.ops.linear_attn import chunk_linear_attn
    except ImportError:
        return "is not installed: not checked", True
    shape = SHAPES["DiT-XL/2, 2048 px"]
    layout = BlockLayout(shape.grid, shape.blocks)
    q, k, v = (at.heads_inside(1, layout.num_tokens, shape.heads, shape.d) for _ in range(3))
    tokens = [x.transpose(1, 2) for x in (F.relu(q), F.relu(k), v)]
    mixing = locality_mixing(layout).to(at.device)
    with torch.no_grad():
        chunk_linear_attn(*tokens)  # it tunes itself at the first call, which takes most of a minute
        theirs = at.seconds(lambda: chunk_linear_attn(*tokens), graph=True)
        ours = at.seconds(lambda: mhla(q, k, v, mixing, layout), graph=True)
    return f"forward at DiT-XL/2, 2048 px: {theirs * 1e6:.0f} us, {theirs / ours:.2f} x MHLA", True


def _speed(at: Machine, shape: Shape, batch: int, rate: float) -> tuple[str, bool]:
    layout = BlockLayout(shape.grid, shape.blocks)
    q, k, v, cotangent = (at.heads_inside(batch, layout.num_tokens, shape.heads, shape.d) for _ in range(4))
    leaves = [x.detach().requires_grad_() for x in (q, k, v, locality_mixing(layout).to(at.device))]
    rotary = at.angles(layout.num_tokens, shape.d) if shape.rotary else None

    def call(norms: Norms | None = None) -> Tensor:
        q, k, v, mixing = leaves
        return mhla(q, k, v, mixing, layout, rotary_emb=rotary, norms=norms)

    with torch.no_grad():
        forward = at.seconds(call, graph=True)
        ratios = {name: at.seconds(peer, 5, graph=True) / forward for name, peer in peers(q, k, v).items()}
        host = _host_seconds(at, call)
        norms = Norms(out=torch.ones(shape.d, device=at.device, dtype=q.dtype), gate=cotangent)
        inside = at.seconds(functools.partial(call, norms), graph=True)
        apart = at.seconds(lambda: norms.behind(call(), q.dtype), graph=True)
    both = at.seconds(lambda: torch.autograd.grad(call(), leaves, cotangent), graph=True)
    floor = 4 * q.nbytes / rate
    text = (
        f"forward {forward * 1e6:.0f} us, {forward / floor:.1f} x floor; backward "
        f"{(both - forward) * 1e6:.0f} us, {(both - forward) / floor / 2:.1f} x; host {host * 1e6:.0f} us; "
        f"forward with output norm and gate {inside * 1e6:.0f} us, these apart {apart * 1e6:.0f} us; "
        "slower than MHLA: " + ", ".join(f"{name} {ratio:.2f} x" for name, ratio in ratios.items())
    )
    return text, at.tiny or ratios["linear"] > 1


def _host_seconds(at: Machine, call: Callable[[], object]) -> float:
    """What a call takes the processor, which only queues it."""
    at.synchronize()
    start = time.perf_counter()
    for _ in range(20):
        call()
    seconds = (time.perf_counter() - start) / 20
    at.synchronize()
    return seconds


# Models: whole steps with random weights.


def model_checks(at: Machine) -> Iterator[tuple[str, Check]]:
    try:
        import diffusers
    except ImportError:
        yield "diffusers", lambda: ("is not installed: not checked", True)
        return
    yield "diffusers", lambda: (diffusers.__version__, True)
    for pixels in (64,) if at.tiny else (512, 1024, 2048, 4096):
        yield f"DiT-XL/2, {pixels} px", functools.partial(_steps, at, functools.partial(_dit, at, pixels))
    yield "Wan2.1-1.3B, 31,500 tokens", functools.partial(_steps, at, functools.partial(_wan, at))


def _attention(kind: str, grid: tuple[int, ...]) -> dict[str, Any]:
    """Arguments of a model: softmax, MHLA as in the paper, or with the window of new models."""
    from mhla_diffusion import MHLAConfig

    if kind == "softmax":
        return {"attention": "softmax"}
    blocks = recommended_layout(grid).blocks
    return {"mhla_config": MHLAConfig.paper() if kind == "mhla" else MHLAConfig(blocks=blocks)}


def _dit(at: Machine, pixels: int, kind: str) -> tuple[Any, dict[str, Any]]:
    from mhla_diffusion import MHLADiTTransformer2DModel

    side = pixels // 8
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1} if at.tiny else {
        "num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28,
    }  # fmt: skip
    model = MHLADiTTransformer2DModel(
        **sizes,
        in_channels=4,
        out_channels=8,
        sample_size=side,
        num_embeds_ada_norm=1000,
        **_attention(kind, (side // 2, side // 2)),
    )
    inputs = {
        "hidden_states": at.randn(1, 4, side, side, dtype="bfloat16"),
        "timestep": torch.tensor([500], device=at.device),
        "class_labels": torch.tensor([1], device=at.device),
    }
    return model, inputs


def _wan(at: Machine, kind: str) -> tuple[Any, dict[str, Any]]:
    from mhla_diffusion import MHLAWanTransformer3DModel

    heads, d, layers, ffn, text = (2, 16, 1, 64, 32) if at.tiny else (12, 128, 30, 8960, 4096)
    grid = (2, 8, 8) if at.tiny else (21, 60, 100)
    tokens = (grid[0], grid[1] // 2, grid[2] // 2)
    model = MHLAWanTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=d, num_layers=layers, ffn_dim=ffn, text_dim=text,
        sample_grid=tokens, **_attention(kind, tokens),
    )  # fmt: skip
    inputs = {
        "hidden_states": at.randn(1, 16, *grid, dtype="bfloat16"),
        "timestep": torch.tensor([500], device=at.device),
        "encoder_hidden_states": at.randn(1, 16 if at.tiny else 512, text, dtype="bfloat16"),
    }
    return model, inputs


def _steps(at: Machine, build: Callable[[str], tuple[Any, dict[str, Any]]]) -> tuple[str, bool]:
    """Times of a forward, also in a CUDA graph, and of a training step: MHLA, others over it."""
    times: dict[str, list[float]] = {}
    for kind in ("mhla", "window", "softmax"):
        with torch.device(at.device):
            model, inputs = build(kind)
        model = model.to(torch.bfloat16)
        with torch.no_grad():
            forward = functools.partial(model, **inputs)
            times[kind] = [at.seconds(forward, 3), at.seconds(forward, 3, graph=True)]
        model.enable_gradient_checkpointing()

        def train(model: Any = model, inputs: dict[str, Any] = inputs) -> None:
            model(**inputs).sample.float().square().mean().backward()
            model.zero_grad(set_to_none=True)

        times[kind].append(at.seconds(train, 2))
        del model, forward
    names = "forward", "forward in a CUDA graph", "training"
    return "; ".join(
        f"{name} {ours * 1e3:.1f} ms, window {window / ours:.2f} x, softmax {softmax / ours:.2f} x"
        for name, ours, window, softmax in zip(names, *times.values(), strict=True)
    ), True


STAGES: dict[str, Callable[[Machine], Iterator[tuple[str, Check]]]] = {
    "machine": machine_checks,
    "correct": correct_checks,
    "forms": form_checks,
    "runtime": runtime_checks,
    "speed": speed_checks,
    "form_times": form_time_checks,
    "models": model_checks,
}


def run_stage(stage: str, device: str, share: int, shares: int) -> None:
    """Run one share of the checks of a stage; print each as a line of JSON."""
    at = Machine(device)
    if not at.tiny:
        os.environ["MHLA_KERNELS"] = "triton"  # fail rather than fall back
    os.environ.setdefault("MHLA_KERNELS", "auto")
    torch.use_deterministic_algorithms(stage in COMPARED, warn_only=True)  # new memory holds NaN
    for number, (name, check) in enumerate(STAGES[stage](at)):
        if number % shares != share:
            continue
        start = time.perf_counter()
        try:
            result, good = check()
        except Exception as error:  # a failure of one check is its result
            result, good = f"{type(error).__name__}: {str(error).strip()[:200]}".replace("\n", " "), False
        row = {"stage": stage, "check": name, "ok": bool(good), "result": result}
        print("ROW " + json.dumps({**row, "seconds": round(time.perf_counter() - start, 2)}), flush=True)


def run_in_processes(stage: str, device: str, left: float = MOST) -> list[dict[str, Any]]:
    """Rows of a stage, whatever becomes of its processes, in so many seconds at most."""
    limit = min(LIMITS[stage], left)
    end = time.monotonic() + limit
    shares = max(1, min(12, (os.cpu_count() or 2) - 2)) if stage in COMPARED and device != "cpu" else 1
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    command = [sys.executable, "-u", __file__, "--device", device, "--stage", stage, "--share"]
    processes = [
        subprocess.Popen(
            [*command, str(share), str(shares)], env=environment, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for share in range(shares)
    ]  # fmt: skip
    rows: list[dict[str, Any]] = []
    for process in processes:
        trouble = ""
        try:
            out, errors = process.communicate(timeout=max(1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            out, errors = process.communicate()
            trouble = f"stopped at the limit of {max(0, limit):.0f} s"
        rows += [json.loads(line[4:]) for line in out.splitlines() if line.startswith("ROW ")]
        if process.returncode and not trouble:
            trouble = f"exit {process.returncode}: {' '.join(errors.strip().splitlines()[-1:])[:200]}"
        if trouble:
            rows.append({"stage": stage, "check": "process", "ok": False, "result": trouble, "seconds": 0})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """All rows; of comparisons those that fail, and one line for the others."""
    lines = ["| stage | check | ok | result | s |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        if not (row["ok"] and row["stage"] in COMPARED):
            values = row["stage"], row["check"], "yes" if row["ok"] else "NO", row["result"], row["seconds"]
            lines.append("| " + " | ".join(map(str, values)) + " |")
    for stage, tolerance in COMPARED.items():
        limits = ", ".join(f"{limit:.0e} in {dtype}" for dtype, limit in tolerance.items())
        if passed := sum(row["ok"] and row["stage"] == stage for row in rows):
            lines.append(f"| {stage} | {passed} others | yes | errors below {limits} | |")
    return "\n".join(lines)


def main() -> int:
    """Return 1 if any check failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="new folder for gpu_validate.json and gpu_validate.md")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--share", type=int, nargs=2, default=(0, 1), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        run_stage(arguments.stage, arguments.device, *arguments.share)
        return 0
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: no GPU is there; --device cpu shows whether the script works")
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=False)
    rows: list[dict[str, Any]] = []
    end = time.monotonic() + MOST
    for stage in arguments.stages:
        start = time.monotonic()
        rows += run_in_processes(stage, arguments.device, end - start)
        print(f"{stage}: {time.monotonic() - start:.0f} s", flush=True)
        if arguments.out:  # after each stage, so that nothing is lost with what comes later
            (arguments.out / "gpu_validate.json").write_text(json.dumps(rows, indent=1))
            (arguments.out / "gpu_validate.md").write_text(table(rows) + "\n")
    print(f"\n{table(rows)}\n\n{sum(not row['ok'] for row in rows)} of {len(rows)} checks failed")
    return int(any(not row["ok"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
