"""How the tokens of a grid are divided into blocks."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Tokens around a block, integers, or floats for shares of its side; one along each axis, or for all of them.
Margin = int | float | tuple[int | float, ...]


@dataclass(frozen=True)
class BlockLayout:
    """Token grid cut into boxes, as even as they can be.

    An axis of ``n`` tokens in ``b`` blocks: the first ``n mod b`` blocks hold ``ceil(n / b)`` tokens, the
    others ``floor(n / b)``. Blocks are boxes of the grid, never runs of the flattened sequence. Blocks, and
    the tokens inside one, are numbered in the order of the grid (last axis fastest).

    Tokens that lie on no grid (a class token, registers, text in joint attention) are one more block, the
    last one.

    Args:
        grid: tokens along each axis, ``(H, W)`` or ``(F, H, W)``.
        blocks: number of blocks along each axis, between 1 and the tokens there.
        extra: how many such tokens stand before and after those of the grid; ``(0, 0)`` is a block without
            tokens, None no block.

    Raises:
        ValueError: for a grid, blocks or extra tokens that cannot be.
    """

    grid: tuple[int, ...]
    blocks: tuple[int, ...]
    extra: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name in ("grid", "blocks"):
            object.__setattr__(self, name, _counts(name, getattr(self, name)))
        if not self.grid or len(self.grid) != len(self.blocks):
            raise ValueError(
                f"grid {self.grid} and blocks {self.blocks} must have the same number of axes, at least one: "
                "(H, W) for images, (F, H, W) for video"
            )
        for axis, (tokens, count) in enumerate(zip(self.grid, self.blocks, strict=True)):
            if not 1 <= count <= tokens:
                raise ValueError(
                    f"axis {axis} of grid {self.grid} has {tokens} tokens and cannot hold {count} blocks: "
                    f"blocks {self.blocks} must lie between 1 and {self.grid}; take fewer blocks or a larger "
                    "grid"
                )
        if self.extra is not None:
            pair = isinstance(self.extra, (tuple, list)) and len(self.extra) == 2
            if not pair or any(isinstance(n, str) or n < 0 for n in self.extra):
                raise ValueError(
                    "extra must be (before, after), numbers of tokens before and after those of the grid, "
                    f"each 0 or more, got {self.extra!r}"
                )
            object.__setattr__(self, "extra", tuple(operator.index(int(n)) for n in self.extra))

    @classmethod
    def with_num_blocks(cls, grid: tuple[int, ...], num_blocks: int) -> BlockLayout:
        """Layout with ``num_blocks`` blocks in all whose block shape is closest to a cube.

        Raises:
            ValueError: when no such layout exists on this grid; the message names the nearest that do.
        """
        grid = _counts("grid", grid)
        candidates = [blocks for blocks in _factorizations(num_blocks, len(grid)) if _fits(grid, blocks)]
        if not candidates:
            nearby = sorted(range(1, math.prod(grid) + 1), key=lambda m: abs(m - num_blocks))
            nearest = list(itertools.islice((m for m in nearby if _has_layout(grid, m)), 3))
            raise ValueError(
                f"{num_blocks} blocks do not divide over the grid {grid}; the nearest numbers that do are "
                f"{sorted(nearest)}, or give the blocks along each axis"
            )

        return cls(grid, min(candidates, key=lambda blocks: (_elongation(grid, blocks), blocks)))

    @property
    def num_tokens(self) -> int:
        """N, with the extra ones."""
        return math.prod(self.grid) + sum(self.extra or ())

    @property
    def num_blocks(self) -> int:
        """M, with the extra one."""
        return math.prod(self.blocks) + (self.extra is not None)

    @property
    def block_shape(self) -> tuple[int, ...]:
        """Tokens along each axis of the largest block."""
        return tuple(-(-tokens // count) for tokens, count in zip(self.grid, self.blocks, strict=True))

    @property
    def block_size(self) -> int:
        """Tokens in the largest block."""
        return max(math.prod(self.block_shape), sum(self.extra or ()))

    @property
    def grid_tokens(self) -> slice:
        """Tokens of the grid among all."""
        before, after = self.extra or (0, 0)
        return slice(before, self.num_tokens - after)

    @property
    def is_even(self) -> bool:
        """Return True when all blocks have the same shape, which an extra one has not."""
        whole = all(tokens % count == 0 for tokens, count in zip(self.grid, self.blocks, strict=True))
        return whole and self.extra is None

    def block_index(self, device: torch.device | str | None = None) -> Tensor:
        """Block of each token, ``[N]``, int64, those of the grid in its order."""
        index = torch.zeros((), dtype=torch.int64, device=device)
        for tokens, count in zip(self.grid, self.blocks, strict=True):
            index = index[..., None] * count + _axis_positions(tokens, count, device)[0]
        return F.pad(index.flatten(), self.extra or (0, 0), value=math.prod(self.blocks))

    def reach(self, margin: Margin, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Find the tokens of each block and of a margin around it, as far as the grid goes.

        Args:
            margin: tokens beyond the block on each side, along each axis or for all of them; a float is a
                share of the side of the largest block.

        Returns:
            Which tokens, int64 ``[M, m]``, m those of the largest block with its margin, and which of these
            places hold one, bool ``[M, m]``. For grids without extra tokens.
        """
        assert self.extra is None, "extra tokens lie beside no others"
        token = torch.zeros(1, 1, dtype=torch.int64, device=device)
        there = torch.ones(1, 1, dtype=torch.bool, device=device)
        for tokens, count, size, beyond in zip(
            self.grid, self.blocks, self.block_shape, self.margins(margin), strict=True
        ):
            place = torch.arange(count, device=device)
            first = place * (tokens // count) + place.clamp_max(tokens % count)
            end = first + tokens // count + (place < tokens % count)
            beyond = min(beyond, tokens)
            width = min(size + 2 * beyond, tokens)
            at = (first - beyond).clamp_min(0)[:, None] + torch.arange(width, device=device)
            inside = at < (end + beyond).clamp_max(tokens)[:, None]
            # Blocks of this axis behind those of the axes before, and the same for the places in one.
            token = token[:, None, :, None] * tokens + at.clamp_max(tokens - 1)[None, :, None, :]
            there = there[:, None, :, None] & inside[None, :, None, :]
            token, there = token.flatten(2).flatten(0, 1), there.flatten(2).flatten(0, 1)
        return token, there

    def reach_size(self, margin: Margin) -> int:
        """m of :meth:`reach`: places of the largest block with its margin, no more than the grid has."""
        sides = zip(self.grid, self.block_shape, self.margins(margin), strict=True)
        return math.prod(min(size + 2 * beyond, tokens) for tokens, size, beyond in sides)

    def margins(self, margin: Margin) -> tuple[int, ...]:
        """Return a margin along each axis in tokens, of one that may be in sides of the largest block.

        Raises:
            ValueError: for a margin below 0, or of another number of axes.
        """
        each = margin if isinstance(margin, tuple) else (margin,) * len(self.grid)
        fits = all(0 <= x < 1 if isinstance(x, float) else hasattr(x, "__index__") and x >= 0 for x in each)
        if len(each) != len(self.grid) or not fits:
            raise ValueError(
                "margin must be an integer >= 0 (tokens) or a number below 1 (of the side of a block), for "
                f"all axes or each of {len(self.grid)}, got {margin!r}"
            )
        sides = zip(each, self.block_shape, strict=True)
        # To the nearest token, half a token up: a quarter of 2 is 1, and of a single frame none.
        return tuple(
            math.floor(x * side + 0.5) if isinstance(x, float) else operator.index(x) for x, side in sides
        )

    def pack(self, x: Tensor) -> Tensor:
        """Grid order to blocks.

        Args:
            x: ``[..., N, d]``.

        Returns:
            ``[..., M, n, d]``, n being the size of the largest block. The missing tokens of smaller blocks
            are zero.

        Raises:
            ValueError: when x does not hold N tokens.
        """
        self._require_tokens(x)
        lead, d = x.shape[:-2], x.shape[-1]
        if self.is_even:
            axes = [size for pair in zip(self.blocks, self.block_shape, strict=True) for size in pair]
            x = x.reshape(*lead, *axes, d).permute(*self._interleave(len(lead), split=True))
            return x.reshape(*lead, self.num_blocks, self.block_size, d)
        packed = x.new_zeros(*lead, self.num_blocks * self.block_size, d)
        packed = packed.index_copy(-2, self._slots(x.device), x)
        return packed.reshape(*lead, self.num_blocks, self.block_size, d)

    def block_sums(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Sum over the tokens of each block, in a dtype: ``[..., N, d]`` to ``[..., M, d]``.

        Raises:
            ValueError: when x does not hold N tokens.
        """
        self._require_tokens(x)
        if not self.is_even:
            return self.pack(x.to(dtype)).sum(-2)
        pairs = [size for pair in zip(self.blocks, self.block_shape, strict=True) for size in pair]
        x = x.unflatten(-2, pairs)
        for axis in range(len(self.grid)):  # the last first, and no copy in the order of blocks
            x = x.sum(-2 - axis, dtype=dtype)
        return x.flatten(-1 - len(self.grid), -2)

    def unpack(self, x: Tensor) -> Tensor:
        """Blocks to grid order: ``[..., M, n, d]`` to ``[..., N, d]``, the inverse of :meth:`pack`."""
        lead, d = x.shape[:-3], x.shape[-1]
        if self.is_even:
            x = x.reshape(*lead, *self.blocks, *self.block_shape, d)
            return x.permute(*self._interleave(len(lead), split=False)).reshape(*lead, self.num_tokens, d)
        return x.flatten(-3, -2).index_select(-2, self._slots(x.device))

    def _require_tokens(self, x: Tensor) -> None:
        if x.shape[-2] != self.num_tokens:
            raise ValueError(
                f"expected {self.num_tokens} tokens, {self.counted_tokens()}, got {x.shape[-2]} "
                f"(shape {tuple(x.shape)})"
            )

    def counted_tokens(self) -> str:
        """Say for messages how many tokens there are."""
        extra = "" if self.extra is None else f" and {sum(self.extra)} extra tokens"
        return f"the grid {self.grid} has {math.prod(self.grid)}{extra}"

    def _interleave(self, lead: int, *, split: bool) -> list[int]:
        """The permutation between (block, inside) pairs per axis and all blocks before all insides."""
        axes = len(self.grid)
        if split:
            inner = [lead + 2 * i for i in range(axes)] + [lead + 2 * i + 1 for i in range(axes)]
        else:
            inner = [lead + half * axes + i for i in range(axes) for half in (0, 1)]
        return [*range(lead), *inner, lead + 2 * axes]

    def _slots(self, device: torch.device) -> Tensor:
        """Where each token goes among M * n slots, n being the size of the largest block, ``[N]``."""
        block = inside = torch.zeros((), dtype=torch.int64, device=device)
        for tokens, count, size in zip(self.grid, self.blocks, self.block_shape, strict=True):
            axis_block, axis_inside = _axis_positions(tokens, count, device)
            block = block[..., None] * count + axis_block
            inside = inside[..., None] * size + axis_inside
        slots = (block * self.block_size + inside).flatten()
        if self.extra is None:
            return slots
        first = math.prod(self.blocks) * self.block_size
        before, after = torch.arange(first, first + sum(self.extra), device=device).split(self.extra)
        return torch.cat((before, slots, after))


def recommended_layout(grid: tuple[int, ...]) -> BlockLayout:
    """Recommend blocks to start from: as many as keep mixing cheap, compact, and equal where they can be.

    - Cheap: M <= sqrt(N / 2), so that M^2 <= N and mixing is at most 20 % of the operator's H d^2 (4 N +
      2 M^2) FLOPs.
    - Compact: an axis is cut into pieces of no less than a third of the block's longest side. A short axis
      may stay whole.
    - Of those layouts the one with the most blocks, then closest to a cube; if equal blocks come to more
      than half as many, the most equal blocks, which all operators and normalizers take.

    Raises:
        ValueError: for a grid that cannot be.
    """
    whole = BlockLayout(grid, (1,) * len(grid))
    most = max(1, math.isqrt(whole.num_tokens // 2))
    layouts = [BlockLayout(grid, b) for b in _block_counts(whole.grid, most) if _is_compact(whole.grid, b)]

    def rank(layout: BlockLayout) -> tuple[int, float, tuple[int, ...]]:
        return -layout.num_blocks, _elongation(layout.grid, layout.blocks), layout.blocks

    best = min(layouts, key=rank)
    even = min((layout for layout in layouts if layout.is_even), key=rank)
    return even if 2 * even.num_blocks > best.num_blocks else best


def _counts(name: str, value: Any) -> tuple[int, ...]:
    """A tuple of integers, of what may be those of NumPy or torch."""
    try:
        # Graphs are compiled for one grid: of a size that is a symbol to torch.compile, index is the number.
        counts = tuple(operator.index(int(n)) for n in value)
        whole = not isinstance(value, str) and all(n == count for n, count in zip(value, counts, strict=True))
    except (TypeError, ValueError):
        whole = False
    if not whole:
        raise ValueError(f"{name} must be one integer for each axis, such as (H, W), got {value!r}")
    return counts


def _block_counts(grid: tuple[int, ...], most: int) -> Iterator[tuple[int, ...]]:
    """All numbers of blocks along each axis whose product is at most ``most``."""
    if not grid:
        yield ()
        return
    for count in range(1, min(grid[0], most) + 1):
        for rest in _block_counts(grid[1:], most // count):
            yield count, *rest


def _is_compact(grid: tuple[int, ...], blocks: tuple[int, ...]) -> bool:
    sides = [tokens / count for tokens, count in zip(grid, blocks, strict=True)]
    return all(count == 1 or 3 * side >= max(sides) for side, count in zip(sides, blocks, strict=True))


def _elongation(grid: tuple[int, ...], blocks: tuple[int, ...]) -> float:
    """Longest side of a block over its shortest, as a logarithm."""
    sides = [math.log(tokens / count) for tokens, count in zip(grid, blocks, strict=True)]
    return round(max(sides) - min(sides), 9)


def _axis_positions(tokens: int, count: int, device: torch.device | str | None) -> tuple[Tensor, Tensor]:
    """For each token along an axis: its block, and its place inside that block."""
    position = torch.arange(tokens, device=device)
    small, longer = tokens // count, tokens % count
    # The first `longer` blocks hold one token more than the others.
    boundary = longer * (small + 1)
    late = position - boundary
    block = torch.where(late < 0, position // (small + 1), longer + late // small)
    inside = torch.where(late < 0, position % (small + 1), late % small)
    return block, inside


def _factorizations(number: int, parts: int) -> list[tuple[int, ...]]:
    """All ways to write a number as an ordered product."""
    if parts == 1:
        return [(number,)]
    divisors = [a for a in range(1, number + 1) if number % a == 0]
    return [(a, *rest) for a in divisors for rest in _factorizations(number // a, parts - 1)]


def _fits(grid: tuple[int, ...], blocks: tuple[int, ...]) -> bool:
    return all(1 <= count <= tokens for tokens, count in zip(grid, blocks, strict=True))


def _has_layout(grid: tuple[int, ...], num_blocks: int) -> bool:
    return any(_fits(grid, blocks) for blocks in _factorizations(num_blocks, len(grid)))
