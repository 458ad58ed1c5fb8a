"""A layer of Wan with MHLA beside the same with softmax."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones import MHLAWanTransformer3DModel
from ..config import MHLAConfig
from ..devices import resolve_device
from ..files.text import markdown_table, sizes_text
from ..files.writing import require_room, write_file
from ..timing import interleaved, peak_bytes, spread
from .shared import PASSES, check_at_least, check_choices, check_seconds, machine, percent

ATTENTIONS = ("mhla", "softmax")
# What the released Wan-MHLA checkpoint has.
_MHLA = MHLAConfig(normalizer="none", output_norm=True, gate=True)
_TEXT_TOKENS = 512


def layer(
    grid: tuple[int, int, int] = (21, 30, 50),
    blocks: tuple[int, int, int] = (3, 5, 10),
    heads: int = 12,
    head_dim: int = 128,
    ffn_dim: int = 8960,
    passes: Sequence[str] = PASSES,
    repeats: int = 3,
    seconds: float = 120,
    out: Path | None = None,
    device: str | None = None,
) -> str:
    """Time a layer of Wan with MHLA against the same with softmax: attention, cross-attention, feed-forward.

    Wan2.1-1.3B at 81 frames of 480 x 800 pixels by default, random weights, float32.

    Args:
        grid: tokens along frames, height and width.
        blocks: of MHLA, along the same axes.
        heads, head_dim, ffn_dim: of the layer.
        passes: of ``forward``, ``forward + backward``.
        repeats: interleaved runs, of which the median counts.
        seconds: one attention takes no more runs than fit into this, and one at least.
        out: folder for layer.json (written after each pass) and layer.md.
        device: cpu or cuda; a GPU where there is one.

    Returns:
        A table in Markdown. Its spread is the distance between the quartiles of the runs, of the median; with
        fewer than three there is none.

    Raises:
        ValueError: for a choice that does not exist, an odd ``head_dim``, blocks that do not fit the grid, or
            where results lie in ``out`` already.
    """
    check_choices(passes=(passes, PASSES))
    check_at_least(1, heads=heads, head_dim=head_dim, ffn_dim=ffn_dim, repeats=repeats)
    check_seconds(seconds)
    if out is not None:
        require_room(out, ["layer.json", "layer.md"])
    if head_dim % 2:
        raise ValueError(f"head_dim must be even, as positions turn pairs of channels, got {head_dim}")
    device = resolve_device(device)
    steps = {name: _layer_steps(name, grid, blocks, heads, head_dim, ffn_dim, device) for name in ATTENTIONS}
    records: list[dict[str, Any]] = []
    for name in passes:
        calls = [steps[attention][PASSES.index(name)] for attention in ATTENTIONS]
        for attention, times, call in zip(
            ATTENTIONS, interleaved(calls, device, repeats, seconds), calls, strict=True
        ):
            records.append(
                {
                    "pass": name, "attention": attention, "seconds": statistics.median(times),
                    "runs": len(times), "spread": spread(times), "peak_bytes": peak_bytes(call, device),
                }
            )  # fmt: skip
        if out is not None:
            record = {"machine": machine(device), "grid": grid, "blocks": blocks, "measurements": records}
            write_file(out / "layer.json", json.dumps(record, indent=2))
    title = (
        f"a layer of Wan on {sizes_text(grid)} tokens, MHLA in {sizes_text(blocks)} blocks, {heads} heads of "
        f"{head_dim}, feed-forward {ffn_dim}, float32, medians of up to {repeats} runs"
    )
    text = f"{title}; {machine(device)}\n\n{_layer_table(records)}"
    if out is not None:
        write_file(out / "layer.md", text)
    return text


def _layer_steps(
    attention: str,
    grid: tuple[int, int, int],
    blocks: tuple[int, int, int],
    heads: int,
    head_dim: int,
    ffn_dim: int,
    device: str,
) -> list[Callable[[], Any]]:
    """Forward, and forward and backward with all gradients, of one layer."""
    torch.manual_seed(0)
    width = heads * head_dim
    model = MHLAWanTransformer3DModel(
        num_layers=1, num_attention_heads=heads, attention_head_dim=head_dim, ffn_dim=ffn_dim,
        attention=attention, mhla_config=replace(_MHLA, blocks=blocks), sample_grid=grid,
    ).to(device)  # fmt: skip
    block: nn.Module = model.blocks[0]
    frames, height, width_tokens = grid
    rotary_emb = model.rope(torch.empty(1, 16, frames, 2 * height, 2 * width_tokens, device=device))
    tokens = frames * height * width_tokens
    hidden_states = torch.randn(1, tokens, width, device=device, requires_grad=True)
    text = torch.randn(1, _TEXT_TOKENS, width, device=device)
    modulation = torch.randn(1, 6, width, device=device)
    gradient = torch.randn(1, tokens, width, device=device)
    wanted = [hidden_states, *block.parameters()]

    def forward() -> Tensor:
        return block(hidden_states, text, modulation, rotary_emb)

    return [torch.no_grad()(forward), lambda: torch.autograd.grad(forward(), wanted, gradient)]


def _layer_table(records: Sequence[dict[str, Any]]) -> str:
    head = ["pass", "MHLA s", "spread", "softmax s", "spread", "softmax / MHLA"]
    lines = [[*head, "MB beyond in- and outputs, MHLA / softmax"]]
    for ours, softmax in zip(records[::2], records[1::2], strict=True):
        lines.append(
            [
                ours["pass"], f"{ours['seconds']:.3g}", percent(ours["spread"]),
                f"{softmax['seconds']:.3g}", percent(softmax["spread"]),
                f"{softmax['seconds'] / ours['seconds']:.2f} x",
                f"{ours['peak_bytes'] / 1e6:,.0f} / {softmax['peak_bytes'] / 1e6:,.0f}",
            ]
        )  # fmt: skip
    return markdown_table(lines)
