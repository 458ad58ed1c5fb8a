"""Draw the idea of MHLA, ``docs/idea.svg``: blocks of tokens, their summaries, and the mixing of them.

python docs/drawing.py docs/idea.svg
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from mhla_diffusion.ops import BlockLayout, locality_mixing

LAYOUT = BlockLayout(grid=(8, 8), blocks=(2, 2))
COLORS = ("#3b82f6", "#f59e0b", "#10b981", "#ec4899")
WIDTH, HEIGHT, TOP, TOKEN, ROW = 880, 236, 40, 18, 42

# A grey that is read on white and on black alike: a picture does not know which it is on.
STYLE = """
text { font: 14px system-ui, sans-serif; fill: #737b85; text-anchor: middle }
.title { font-weight: 600 }
.arrow, .frame { stroke: #737b85; stroke-width: 1.3; fill: none }
"""


def rect(x: float, y: float, w: float, h: float, color: str, opacity: float = 1.0) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" fill="{color}" '
        f'fill-opacity="{opacity:.2f}"/>'
    )


def frame(x: float, y: float, w: float, h: float) -> str:
    return f'<rect class="frame" x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}"/>'


def text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}"{kind and f" class={kind!r}"}>{words}</text>'.replace("'", '"')


def arrow(x: float, y: float, length: float = 26) -> str:
    return f'<path class="arrow" d="M{x:.1f} {y:.1f}h{length}m-6 -5l6 5l-6 5"/>'


def tokens(x: float, weights: list[list[float]]) -> Iterator[str]:
    """Draw the grid of tokens, each in the colours that its block has by a row of ``weights``."""
    rows, columns = LAYOUT.grid
    for n, block in enumerate(LAYOUT.block_index().tolist()):
        i, j = divmod(n, columns)
        yield from stripes(x + j * TOKEN + 1, TOP + i * TOKEN + 1, TOKEN - 2, weights[block])
    h, w = rows * TOKEN / 2, columns * TOKEN / 2
    for block in range(LAYOUT.num_blocks):
        yield frame(x + block % 2 * w, TOP + block // 2 * h, w, h)


def stripes(x: float, y: float, size: float, weights: list[float]) -> Iterator[str]:
    """Draw a square in the colours of all blocks, each as wide as it weighs."""
    for color, weight in zip(COLORS, weights, strict=True):
        width = size * weight / sum(weights)
        if width:
            yield rect(x, y, width, size, color, 0.85)
        x += width


def summaries(x: float) -> Iterator[str]:
    """Draw a d x d matrix for each block."""
    for block, color in enumerate(COLORS):
        y = TOP + block * ROW - 4
        yield rect(x, y, 30, 30, color, 0.85)
        yield frame(x, y, 30, 30)


def mixing(x: float, weights: list[list[float]]) -> Iterator[str]:
    """Draw the rows of a mixing matrix, and what they mix for each block of queries."""
    for block, row in enumerate(weights):
        y = TOP + block * ROW - 4
        for key, weight in enumerate(row):
            if weight:
                yield rect(x + key * 32, y, 30, 30, COLORS[key], min(1, 1.5 * weight))
            yield frame(x + key * 32, y, 30, 30)
        yield arrow(x + 136, y + 15)
        yield from stripes(x + 172, y, 30, row)
        yield frame(x + 172, y, 30, 30)


def draw() -> str:
    """Return the drawing as SVG, of the locality start."""
    middle, below = TOP + 4 * TOKEN, TOP + 4 * ROW + 10
    own = [[float(i == j) for j in range(4)] for i in range(4)]
    mixed = locality_mixing(LAYOUT).tolist()
    parts = [
        text(82, 20, "tokens in M blocks", "title"), *tokens(10, own), text(82, below, "N tokens on a grid"),
        arrow(172, middle),
        text(270, 20, "a summary of each", "title"), *summaries(255),
        text(270, below, "S = Σ φ(k) vᵀ, d × d"),
        arrow(344, middle),
        text(501, 20, "mixed for each query block", "title"), *mixing(400, mixed),
        text(463, below, "W, M × M, learned"), text(587, below, "Σ W S"),
        arrow(640, middle),
        text(776, 20, "read by its queries", "title"), *tokens(704, mixed),
        text(776, below, "φ(q) Σ W S, normalized"),
    ]  # fmt: skip
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" role="img">\n<style>{STYLE}</style>\n{body}\n</svg>\n'
    )


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(draw(), encoding="utf-8")
