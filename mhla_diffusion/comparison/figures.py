"""Pictures of a page: curves of the loss, mixing matrices, and samples of the same seeds below each other."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw
from torch import Tensor

from ..files.pages import written
from ..optional import require

# Width of the names beside samples, and how much larger than a pixel these are drawn.
_NAMES, _SCALE = 220, 2


def draw_curves(curves: Mapping[str, Sequence[Sequence[tuple[int, float]]]]) -> bytes:
    """Draw a PNG of the training loss over steps, for each variant the mean of its seeds.

    Args:
        curves: of each seed of each variant, points of step and loss.

    Raises:
        ImportError: when matplotlib is not installed.
    """
    figure = require("matplotlib.figure").Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for number, (name, seeds) in enumerate(curves.items()):
        points = [
            (same[0][0], sum(loss for _, loss in same) / len(same)) for same in zip(*seeds, strict=False)
        ]
        axes.loglog(*zip(*points, strict=True), label=name, linestyle=("-", "--", ":")[number // 10 % 3])
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    return written(figure.savefig, format="png", dpi=120)


def draw_mixing(matrices: Mapping[str, Mapping[str, Tensor]]) -> bytes:
    """Draw a PNG of mixing matrices, a row for each variant, in colours from 0 to the largest weight of all.

    Args:
        matrices: ``[M, M]`` of each layer of each variant. Colours start below 0 where weights do.

    Raises:
        ImportError: when matplotlib is not installed.
    """
    columns = max(map(len, matrices.values()))
    size = 1.6 * columns + 1, 1.7 * len(matrices) + 0.3
    figure = require("matplotlib.figure").Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(matrices), columns, squeeze=False)
    found = [matrix for layers in matrices.values() for matrix in layers.values()]
    low, high = min(0.0, *(float(x.min()) for x in found)), max(float(x.max()) for x in found)
    for row, (name, layers) in zip(grid, matrices.items(), strict=True):
        for axes in row[len(layers) :]:
            axes.set_axis_off()
        for axes, (layer, matrix) in zip(row, layers.items(), strict=False):
            image = axes.imshow(matrix.numpy(), vmin=low, vmax=high)
            axes.set_title(layer, fontsize="small")
            axes.set(xticks=[], yticks=[])
        row[0].set_ylabel(textwrap.fill(name, 20), fontsize="small")
    figure.colorbar(image, ax=grid, label="weight")
    return written(figure.savefig, format="png", dpi=100)


def draw_samples(sheets: Mapping[str, Path]) -> bytes:
    """Draw a PNG of the sheets of variants below each other, each beside its name."""
    pictures = {name: Image.open(path).convert("RGB") for name, path in sheets.items()}
    width = max(picture.width for picture in pictures.values()) * _SCALE
    height = sum(picture.height * _SCALE + 4 for picture in pictures.values())
    canvas = Image.new("RGB", (_NAMES + width, height), "white")
    draw, y = ImageDraw.Draw(canvas), 0
    for name, picture in pictures.items():
        size = picture.width * _SCALE, picture.height * _SCALE
        canvas.paste(picture.resize(size, Image.Resampling.NEAREST), (_NAMES, y))
        draw.text((6, y + size[1] // 2 - 6), name, fill="black")
        y += size[1] + 4
    return written(canvas.save, "png")
