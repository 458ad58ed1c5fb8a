"""Tokens as tiles: blocks of some heads of some samples, few enough to stay in the processor's cache.

A grid of 5 x 7 tokens in 2 x 3 blocks, numbered 0 to 5. Blocks of one shape are a box (A to D); a box is cut
into tiles, each of as many whole blocks as it can hold::

      3   2   2   tokens     box   blocks   shape of each   tiles of at most 8 tokens
    +---+---+---+
    | 0 | 1 | 2 |  3         A     0        3 x 3           2: a slab of two rows, a slab of one
    |   |   |   |            B     1, 2     3 x 2           2: a block each
    +---+---+---+            C     3        2 x 3           1
    | 3 | 4 | 5 |  2         D     4, 5     2 x 2           1: both blocks
    +---+---+---+

A block that is larger than a tile is cut into slabs along its first axis; the first one writes the block's
summary, the others add to it. Extra tokens are slabs of a block with one axis: those before the grid, and
those after it. A tile is never copied token by token: all its blocks have one shape and lie at equal
distances, so that it is one strided view ``[b, h, *counts, *shape, d]`` of ``[B, H, N, d]``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .layout import BlockLayout

# Numbers in a tile of one tensor, for each CPU thread. Smaller tiles fit a faster cache, but calling torch
# for each of them costs more than that gains (docs/performance.md).
_TILE_SIZE = 2**18
# A tile reads so many neighbouring numbers at least, or memory would be read in crumbs.
_MIN_RUN = 256


class Part(NamedTuple):
    """Range of samples and heads; an index of ``[B, H, ...]``."""

    batch: slice
    heads: slice

    @property
    def size(self) -> tuple[int, int]:
        """Number of samples and heads."""
        return self.batch.stop - self.batch.start, self.heads.stop - self.heads.start

    def of_heads(self, mixing: Tensor) -> Tensor:
        """Select what concerns this part of ``[M, M]``, ``[H, M, M]`` or ``[B, H, M, M]``."""
        return mixing[(self.batch, self.heads)[4 - mixing.ndim :]] if mixing.ndim > 2 else mixing


@dataclass(frozen=True)
class Tile:
    """Box of blocks of equal shape, or a slab of one block that is too large for a tile.

    Args:
        block: the number of the first block.
        block_steps: how far apart in block numbers neighbouring blocks are along each axis.
        counts: blocks along each axis.
        shape: tokens of a block, or slab of it, along each axis.
        start: the number of the first token.
        steps: how far apart in token numbers neighbouring blocks are along each axis, then tokens.
        first: false for further slabs of a block.
    """

    block: int
    block_steps: tuple[int, ...]
    counts: tuple[int, ...]
    shape: tuple[int, ...]
    start: int
    steps: tuple[int, ...]
    first: bool

    @property
    def num_blocks(self) -> int:
        return math.prod(self.counts)

    @property
    def block_size(self) -> int:
        """Tokens in each block, or slab of it."""
        return math.prod(self.shape)

    def tokens_of(self, x: Tensor, part: Part) -> Tensor:
        """View ``[b, h, *counts, *shape, d]`` of ``x [B, H, N, d]``, whatever its strides."""
        batch, head, token, channel = x.stride()
        start = part.batch.start * batch + part.heads.start * head + self.start * token
        return x.as_strided(
            (*part.size, *self.counts, *self.shape, x.shape[-1]),
            (batch, head, *[step * token for step in self.steps], channel),
            x.storage_offset() + start,
        )

    def blocks_of(self, x: Tensor) -> Tensor:
        """View ``[B, H, *counts, ...]`` of ``x [B, H, M, ...]``."""
        batch, head, block, *inner = x.stride()
        return x.as_strided(
            (*x.shape[:2], *self.counts, *x.shape[3:]),
            (batch, head, *[step * block for step in self.block_steps], *inner),
            x.storage_offset() + self.block * block,
        )


def tile_groups(x: Tensor, layout: BlockLayout) -> Iterator[tuple[Part, tuple[Tile, ...]]]:
    """Samples and heads of ``x [B, H, N, d]`` in parts, each with the tiles that cover all its tokens."""
    if x.numel() == 0:
        return
    batch, heads, tokens, d = x.shape
    size = _TILE_SIZE * torch.get_num_threads() if x.device.type == "cpu" else x.numel()
    # With heads side by side in memory, as projections leave them, one head alone is a short run.
    fewest = -(-_MIN_RUN // d) if x.stride(1) < x.stride(2) else 1
    heads_each = _even_part(heads, max(size // (tokens * d), fewest))
    batch_each = _even_part(batch, size // (heads * tokens * d)) if heads_each >= heads else 1
    tiles = _tiles(layout, size // (batch_each * heads_each * d))
    for b, h in itertools.product(_slices(batch, batch_each), _slices(heads, heads_each)):
        yield Part(b, h), tiles


@lru_cache(maxsize=256)
def _tiles(layout: BlockLayout, most: int) -> tuple[Tile, ...]:
    """Tiles of at most so many tokens, if one row of a block is not more already."""
    axes = [_equal_blocks(n, b) for n, b in zip(layout.grid, layout.blocks, strict=True)]
    boxes = (_box_tiles(box, layout, most) for box in itertools.product(*axes))
    return *itertools.chain.from_iterable(boxes), *_extra_tiles(layout, most)


class _Run(NamedTuple):
    """Equal blocks along an axis: the first block and token, the number of blocks, the tokens in each."""

    first_block: int
    first_token: int
    blocks: int
    tokens: int


def _equal_blocks(tokens: int, count: int) -> list[_Run]:
    size, longer = divmod(tokens, count)
    runs = [_Run(0, 0, longer, size + 1), _Run(longer, longer * (size + 1), count - longer, size)]
    return [run for run in runs if run.blocks]


def _box_tiles(box: tuple[_Run, ...], layout: BlockLayout, most: int) -> Iterator[Tile]:
    """Tiles of the blocks of one shape."""
    shape, strides, block_steps = (
        tuple(run.tokens for run in box),
        _strides(layout.grid),
        _strides(layout.blocks),
    )
    steps = (*[stride * size for stride, size in zip(strides, shape, strict=True)], *strides)
    room = most // math.prod(shape)
    parts: list[list[slice]] = []
    for run in reversed(box):
        each = _even_part(run.blocks, room)
        parts.insert(0, _slices(run.blocks, each))
        room //= each
    rows = min(shape[0], max(1, most // math.prod(shape[1:])))
    for part in itertools.product(*parts):
        token = layout.grid_tokens.start + sum(
            (run.first_token + s.start * run.tokens) * stride
            for run, s, stride in zip(box, part, strides, strict=True)
        )
        block = sum(
            (run.first_block + s.start) * step for run, s, step in zip(box, part, block_steps, strict=True)
        )
        for slab in _slices(shape[0], rows):
            yield Tile(
                block=block,
                block_steps=block_steps,
                counts=tuple(s.stop - s.start for s in part),
                shape=(slab.stop - slab.start, *shape[1:]),
                start=token + slab.start * strides[0],
                steps=steps,
                first=slab.start == 0,
            )


def _extra_tiles(layout: BlockLayout, most: int) -> Iterator[Tile]:
    """Slabs of the block of extra tokens; an empty one where there are none."""
    if layout.extra is None:
        return
    slabs = [
        (start + slab.start, start + slab.stop)
        for start, size in zip((0, layout.grid_tokens.stop), layout.extra, strict=True)
        for slab in _slices(size, _even_part(size, most))
    ]
    for i, (start, stop) in enumerate(slabs or [(0, 0)]):
        yield Tile(
            block=math.prod(layout.blocks), block_steps=(1,), counts=(1,), shape=(stop - start,),
            start=start, steps=(1, 1), first=i == 0,
        )  # fmt: skip


def _strides(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """How far apart in numbers neighbours along each axis are."""
    return tuple(math.prod(sizes[i + 1 :]) for i in range(len(sizes)))


def _even_part(total: int, most: int) -> int:
    """The size of parts of at most ``most`` (or one), as equal as they can be."""
    parts = -(-total // max(1, most))
    return -(-total // max(1, parts))


def _slices(total: int, each: int) -> list[slice]:
    return [slice(start, min(start + each, total)) for start in range(0, total, max(1, each))]
