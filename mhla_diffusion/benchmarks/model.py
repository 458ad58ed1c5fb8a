"""Steps of a whole DiT with MHLA, plain linear and softmax attention."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..backbones import MHLADiTTransformer2DModel
from ..files.writing import write_file
from ..ops import recommended_layout
from .timing import (
    check_at_least,
    check_choices,
    default_device,
    interleaved,
    machine,
    markdown_table,
    plot,
    require_plots,
    spread,
)

ATTENTIONS = ("mhla", "linear", "softmax")


def model(
    sizes: Sequence[int] = (256, 512, 1024, 2048),
    attentions: Sequence[str] = ATTENTIONS,
    layers: int = 12,
    heads: int = 6,
    head_dim: int = 64,
    batch_size: int = 1,
    dtype: str = "float32",
    repeats: int = 5,
    seconds: float = 120,
    out: Path | None = None,
    device: str | None = None,
) -> str:
    """Time a denoising step and a training step of a DiT with MHLA, plain linear and softmax attention.

    DiT-S/2 by default, random weights. MHLA has the blocks that are recommended for the size.

    Args:
        sizes: of the square images, in pixels; latents have an eighth of that, tokens a sixteenth.
        attentions: of mhla, linear, softmax.
        layers, heads, head_dim: of the model; DiT-XL/2 has 28, 16, 72.
        batch_size: images in a step.
        dtype: float32, or bfloat16 for autocast.
        repeats: interleaved runs, of which the median counts.
        seconds: one attention at one size takes no more runs than fit into this, and one at least.
        out: folder for model.json, model.md and model.png.
        device: cpu or cuda; a GPU where there is one.

    Returns:
        A table in Markdown.

    Raises:
        ValueError: for a choice that does not exist, or a number that is too small.
        ModuleNotFoundError: for a drawing without matplotlib.
    """
    check_choices(attentions=(attentions, ATTENTIONS), dtype=((dtype,), ("float32", "bfloat16")))
    check_at_least(16, **{f"sizes[{i}]": size for i, size in enumerate(sizes)})
    check_at_least(1, layers=layers, heads=heads, head_dim=head_dim, batch_size=batch_size, repeats=repeats)
    if out is not None:
        require_plots()
    device = device or default_device()
    records = []
    for size in tqdm(sizes, desc="sizes", disable=None):
        grid = (size // 16, size // 16)
        steps: list[Callable[[], Any]] = []
        for attention in attentions:
            dit = MHLADiTTransformer2DModel(
                num_layers=layers, num_attention_heads=heads, attention_head_dim=head_dim,
                sample_size=size // 8, attention=attention, out_channels=8,
                mhla_config={"blocks": recommended_layout(grid).blocks},
            ).to(device)  # fmt: skip
            steps += _model_steps(dit, size // 8, batch_size, getattr(torch, dtype), device)
        times = interleaved(steps, device, repeats, seconds)
        for i, attention in enumerate(attentions):
            denoising, training = times[2 * i : 2 * i + 2]
            records.append(
                {
                    "size": size, "tokens": math.prod(grid), "attention": attention,
                    "blocks": recommended_layout(grid).num_blocks if attention == "mhla" else None,
                    "denoising": statistics.median(denoising), "training": statistics.median(training),
                    "spread": {"denoising": spread(denoising), "training": spread(training)},
                }
            )  # fmt: skip
    text = f"{machine(device)}, {dtype}\n\n{_model_table(records, attentions)}"
    if out is not None:
        write_file(out / "model.md", text)
        record = {"machine": machine(device), "dtype": dtype, "measurements": records}
        write_file(out / "model.json", json.dumps(record, indent=2))
        lines = {
            f"{attention}, {step}": [(r["size"], r[step]) for r in records if r["attention"] == attention]
            for attention in attentions
            for step in ("denoising", "training")
        }
        write_file(out / "model.png", plot(lines, "image size, pixels", "seconds a step"))
    return text


def _model_steps(
    dit: nn.Module, side: int, batch_size: int, dtype: torch.dtype, device: str
) -> list[Callable[[], Any]]:
    """A denoising step, and a training step with AdamW."""
    latents = torch.randn(batch_size, 4, side, side, device=device)
    arguments = {
        "timestep": torch.full((batch_size,), 500, device=device),
        "class_labels": torch.zeros(batch_size, dtype=torch.long, device=device),
    }
    optimizer = torch.optim.AdamW(dit.parameters(), lr=0.0)

    def forward() -> Tensor:
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            return dit(latents, **arguments).sample

    def train() -> None:
        forward().float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return [torch.no_grad()(forward), train]


def _model_table(records: Sequence[dict[str, Any]], attentions: Sequence[str]) -> str:
    """Markdown: milliseconds of each attention at each size, in a denoising and a training step."""
    lines = [["size", "tokens", "M", "step", *(f"{a}, ms" for a in attentions)]]
    by_size: dict[int, list[dict[str, Any]]] = {}
    for record in records:
        by_size.setdefault(record["size"], []).append(record)
    for size, group in by_size.items():
        blocks = next((str(r["blocks"]) for r in group if r["blocks"]), "-")
        for step in ("denoising", "training"):
            cells = [f"{1e3 * r[step]:,.0f}" for r in group]
            lines.append([f"{size}", f"{group[0]['tokens']:,}", blocks, step, *cells])
    return markdown_table(lines)
