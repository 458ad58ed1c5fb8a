"""Steps of a whole model with MHLA, plain linear and its stock attention."""

from __future__ import annotations

import inspect
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from tqdm import tqdm

from ..backbones import backbone_of_config
from ..backbones.layer_plan import attentions_of
from ..config import MHLAConfig
from ..devices import resolve_device
from ..files.text import markdown_table
from ..files.writing import require_room, write_file
from ..ops import recommended_layout
from ..optional import require
from ..planning import grid_of_pixels, load_model_config
from ..timing import interleaved, spread
from .shared import (
    check_at_least,
    check_choices,
    check_different,
    check_seconds,
    clock_of,
    machine,
    plot,
)

# Sides of square images or frames in pixels, where those of others say nothing of a model.
_SIZES = {
    "PixArt-Sigma-XL/2": (512, 1024, 2048),
    "Sana-0.6B": (1024, 2048, 4096),
    "Sana-1.6B": (1024, 2048, 4096),
}
_STEPS = ("denoising", "training")
_IMAGE_SIZES, _VIDEO_SIZES, _FRAMES = (256, 512, 1024, 2048), (512, 768), 121


def model(
    sizes: Sequence[int] | None = None,
    attentions: Sequence[str] | None = None,
    backbone: str = "DiT-S/2",
    layers: int | None = None,
    heads: int | None = None,
    head_dim: int | None = None,
    frames: int | None = None,
    batch_size: int = 1,
    dtype: str = "float32",
    repeats: int = 5,
    seconds: float = 120,
    out: Path | None = None,
    device: str | None = None,
    training: bool = True,
    processor_time: bool = False,
    mhla: dict[str, Any] | None = None,
) -> str:
    """Time a denoising step and a training step of a model with MHLA and with other attention.

    Random weights. MHLA has the blocks that are recommended for the size.

    Args:
        sizes: of the square images or frames, in pixels; by default 512, 1024, 2048 for PixArt-Sigma-XL/2,
            1024, 2048, 4096 for Sana, 256 to 2048 for other images, and 512, 768 for videos.
        attentions: of mhla, linear and softmax; by default all that the model can have. Of a model whose own
            attention is linear, such as Sana, linear is its own.
        backbone: a preset of `mhla plan`, such as DiT-S/2, PixArt-Sigma-XL/2, Sana-0.6B or LTX-Video-2B, or a
            folder, config.json or hub id, of which only the config is read.
        layers: of the model, to fit a machine; by default its own.
        heads, head_dim: of the model, by default its own.
        frames: of videos, 121 by default.
        batch_size: images or videos in a step.
        dtype: float32, or bfloat16 for autocast.
        repeats: interleaved runs, of which the median counts.
        seconds: one attention at one size takes no more runs than fit into this, and one at least.
        out: folder for model.json, model.md and model.png, written after each size.
        device: cpu or cuda; a GPU where there is one.
        training: whether a training step is timed beside the denoising step.
        processor_time: count the seconds of all threads on the processor and not those of the clock, which
            other work on the machine lengthens; on a CPU.
        mhla: settings of MHLAConfig for mhla beside its blocks, such as {local: auto}, the window of new
            models; by default the paper's form.

    Returns:
        A table in Markdown.

    Raises:
        ValueError: for a choice that does not exist, a number that is too small, a size that does not divide
            into tokens, settings that MHLAConfig refuses, or where results lie in ``out`` already.
        ImportError: for a drawing without matplotlib.
    """
    widths = {"num_attention_heads": heads, "attention_head_dim": head_dim}
    given = {name: number for name, number in widths.items() if number is not None}
    check_at_least(1, layers=1 if layers is None else layers, batch_size=batch_size, repeats=repeats, **given)
    subject = _subject(backbone, frames, layers, given)
    possible = attentions_of(subject.stock.stock_attention)
    attentions = possible if attentions is None else attentions
    check_choices(attentions=(attentions, possible), dtype=((dtype,), ("float32", "bfloat16")))
    settings = dict(mhla or {})
    if "blocks" in settings:
        raise ValueError(
            f"blocks are those recommended for each size, got blocks={settings['blocks']} in mhla: leave "
            "them out"
        )
    if settings and "mhla" not in attentions:
        raise ValueError(f"settings of mhla are given, which is not among the attentions {list(attentions)}")
    MHLAConfig.from_dict(settings)  # refuses what it does not know, before any work
    if sizes is None:
        sizes = _SIZES.get(backbone, _VIDEO_SIZES if subject.frames else _IMAGE_SIZES)
    check_at_least(1, **{"the number of sizes": len(sizes)})
    check_at_least(16, **{f"sizes[{i}]": size for i, size in enumerate(sizes)})
    check_different(sizes=sizes)
    check_seconds(seconds)
    grids = [subject.grid(size) for size in sizes]
    if out is not None:
        require("matplotlib")
        require_room(out, [f"model.{kind}" for kind in ("json", "md", "png")])
    device = resolve_device(device)
    clock = clock_of(device, processor_time=processor_time)
    kinds = _STEPS if training else _STEPS[:1]
    counted = f"{', processor time' * processor_time}, medians of up to {repeats} runs"
    title = subject.title + (f", mhla with {settings}" if settings else "")
    records = []
    for size, grid in tqdm(list(zip(sizes, grids, strict=True)), desc="sizes", disable=None):
        steps: list[Callable[[], Any]] = []
        for attention in attentions:
            made = subject.make(grid, attention, settings if attention == "mhla" else {})
            inputs = send_to_device(made.example_inputs(grid, batch_size=batch_size), device)
            steps += _model_steps(made.to(device), inputs, getattr(torch, dtype), device)[: len(kinds)]
        times = iter(interleaved(steps, device, repeats, seconds, clock=clock))
        records += [
            _record(size, grid, attention, {kind: next(times) for kind in kinds}) for attention in attentions
        ]
        text = f"{title}; {machine(device)}, {dtype}{counted}\n\n{_model_table(records, attentions)}"
        if out is not None:
            _write(out, text, records, attentions, machine=machine(device), dtype=dtype, model=title)
    return text


@dataclass(frozen=True)
class _Subject:
    """What is timed.

    Args:
        title: what the table calls it.
        stock: the model with its own attention, on the meta device.
        arguments: of our class.
        frames: of videos.
    """

    title: str
    stock: Any
    arguments: dict[str, Any]
    frames: int | None

    def grid(self, size: int) -> tuple[int, ...]:
        """Return the tokens of a square image or video of this side in pixels."""
        patch, strides = self.stock.latents_per_token, self.stock.vae_stride
        return grid_of_pixels(patch, size, size, self.frames, vae_stride=strides[-1], frame_stride=strides[0])

    def make(self, grid: tuple[int, ...], attention: str, settings: Mapping[str, Any]) -> Any:
        """Make the model for a grid, with settings of MHLAConfig beside its blocks."""
        latents = [tokens * patch for tokens, patch in zip(grid, self.stock.latents_per_token, strict=True)]
        sizes = {
            "sample_grid": grid, "sample_size": latents[-1],
            **dict(zip(("sample_width", "sample_height", "sample_frames"), reversed(latents), strict=False)),
        }  # fmt: skip
        known = inspect.signature(type(self.stock).__init__).parameters
        # SanaVideo has a size beside its grid, which says nothing.
        names = ["sample_grid"] if "sample_grid" in known else [name for name in sizes if name in known]
        arguments = {**self.arguments, **{name: sizes[name] for name in names}}
        config = {**settings, "blocks": recommended_layout(grid).blocks}
        return type(self.stock)(**arguments, attention=attention, mhla_config=config)


def _subject(backbone: str, frames: int | None, layers: int | None, widths: Mapping[str, int]) -> _Subject:
    """Read what is to be timed, cut in depth and width as asked for."""
    stored = load_model_config(backbone)
    ours = backbone_of_config(stored)
    assert ours is not None
    known = inspect.signature(ours.__init__).parameters
    own = {"attention", "mhla_config"}
    arguments = {name: value for name, value in stored.items() if name in known and name not in own}
    if unknown := [name for name in widths if name not in known]:
        raise ValueError(f"{backbone} has no {unknown[0]} of its own: leave heads and head_dim out")
    arguments |= widths
    if layers is not None:
        arguments = ours.with_depth(arguments, layers)
    with torch.device("meta"):
        stock = ours(**arguments, attention=ours.stock_attention)
    if len(stock.latents_per_token) == 2 and frames is not None:
        raise ValueError(f"{backbone} makes images, which have no frames, got frames={frames}; leave it out")
    if len(stock.latents_per_token) == 3 and frames is None:
        frames = _FRAMES
    depth = len(stock.layer_attention)
    title = f"{backbone}, {depth} layer{'s' * (depth > 1)}" + (f", {frames} frames" if frames else "")
    return _Subject(title, stock, arguments, frames)


def _model_steps(
    model: nn.Module, inputs: Mapping[str, Any], dtype: torch.dtype, device: str
) -> list[Callable[[], Any]]:
    """A denoising step, and a training step with AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)

    def forward() -> Tensor:
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            return model(**inputs).sample

    def train() -> None:
        forward().float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return [torch.no_grad()(forward), train]


def _record(
    size: int, grid: tuple[int, ...], attention: str, times: Mapping[str, list[float]]
) -> dict[str, Any]:
    """Seconds of the steps of one attention at one size."""
    return {
        "size": size, "tokens": math.prod(grid), "attention": attention,
        "blocks": recommended_layout(grid).num_blocks if attention == "mhla" else None,
        **{step: statistics.median(its) for step, its in times.items()},
        "spread": {step: spread(its) for step, its in times.items()},
    }  # fmt: skip


def _write(
    out: Path, text: str, records: Sequence[dict[str, Any]], attentions: Sequence[str], **facts: Any
) -> None:
    """Write the table, the measurements and a drawing of them."""
    write_file(out / "model.md", text)
    write_file(out / "model.json", json.dumps({**facts, "measurements": records}, indent=2))
    lines = {
        f"{attention}, {step}": [(r["size"], r[step]) for r in records if r["attention"] == attention]
        for attention in attentions
        for step in _STEPS
        if step in records[0]
    }
    write_file(out / "model.png", plot(lines, "side of the image, pixels", "seconds a step"))


def _model_table(records: Sequence[dict[str, Any]], attentions: Sequence[str]) -> str:
    """Markdown: milliseconds of each attention at each size, in a denoising and a training step."""
    lines = [["size", "tokens", "M", "step", *(f"{a}, ms" for a in attentions)]]
    by_size: dict[int, list[dict[str, Any]]] = {}
    for record in records:
        by_size.setdefault(record["size"], []).append(record)
    for size, group in by_size.items():
        blocks = next((str(r["blocks"]) for r in group if r["blocks"]), "-")
        for step in (step for step in _STEPS if step in group[0]):
            cells = [f"{1e3 * r[step]:,.0f}" for r in group]
            lines.append([f"{size}", f"{group[0]['tokens']:,}", blocks, step, *cells])
    return markdown_table(lines)
