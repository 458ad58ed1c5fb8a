"""Ranks that hold tokens of all heads become ranks that hold heads of all tokens, and back.

All of a sequence is then in one place, for a share of the heads (DeepSpeed-Ulysses, arXiv 2309.14509): what
looks at the tokens of other ranks runs as in one process. Each exchange sends (R - 1) / R of a tensor, so the
bytes grow with the tokens, where :func:`.parallel.mhla_parallel` has summaries alone to send.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Exchange between the ranks of a group that hold one sequence.

    Args:
        group: the ranks, R of them.
        counts: tokens of each.
        masked: whether any has a mask of its tokens.
    """

    group: dist.ProcessGroup
    counts: tuple[int, ...]
    masked: bool = False

    @classmethod
    def of(cls, group: dist.ProcessGroup, tokens: int, device: torch.device, *, masked: bool) -> Exchange:
        """Ask all ranks how many tokens they hold, and whether they have a mask.

        Args:
            group: the ranks.
            tokens: of this one.
            device: that the group sends from.
            masked: whether this one has a mask.
        """
        own = torch.tensor([tokens, masked], device=device)
        found = own.new_zeros(2 * dist.get_world_size(group))
        dist.all_gather_into_tensor(found, own, group=group)
        counts, masks = found.view(-1, 2).unbind(1)
        return cls(group, tuple(counts.tolist()), masked=bool(masks.any()))

    def heads(self, count: int) -> slice:
        """Heads of this rank, of ``count``.

        Raises:
            ValueError: when the ranks do not divide them.
        """
        ranks = len(self.counts)
        if count % ranks:
            raise ValueError(
                f"{count} heads over {ranks} ranks: what looks at the tokens of other ranks (windows, "
                "convolutions, mixing_content, center_keys, normalizer official) needs a number of ranks "
                "that divides them"
            )
        first = dist.get_rank(self.group) * (count // ranks)
        return slice(first, first + count // ranks)

    def to_heads(self, x: Tensor) -> Tensor:
        """Exchange ``[B, H, n, d]``, of this rank's tokens, for ``[B, H / R, N, d]``, of its heads."""
        return _Exchanged.apply(x, self, True)

    def to_tokens(self, x: Tensor) -> Tensor:
        """Invert :meth:`to_heads`."""
        return _Exchanged.apply(x, self, False)

    def grid_first(self, extra: tuple[int, int] | None, device: torch.device) -> tuple[Tensor, int]:
        """Find the order of all tokens in which those of the grid come first, and extra ones last.

        Args:
            extra: tokens of this rank before and after those of the grid; None where no rank has any.
            device: of the tokens.

        Returns:
            Their places, int64 ``[N]``, and how many are extra.
        """
        places = torch.arange(sum(self.counts), device=device)
        if extra is None:
            return places, 0
        own = torch.zeros(self.counts[dist.get_rank(self.group)], dtype=torch.uint8, device=device)
        own[: extra[0]] = own[len(own) - extra[1] :] = 1
        is_extra = self.all_tokens(own, 0).bool()
        return torch.cat((places[~is_extra], places[is_extra])), int(is_extra.sum())

    def all_tokens(self, x: Tensor, dim: int) -> Tensor:
        """Put together what each rank has of its tokens along ``dim``, such as a mask; without a gradient."""
        x, most = x.detach().movedim(dim, 0), max(self.counts)
        padded = torch.cat((x, x.new_zeros(most - len(x), *x.shape[1:])))
        found = padded.new_empty(len(self.counts) * most, *x.shape[1:])
        dist.all_gather_into_tensor(found, padded, group=self.group)
        parts = zip(found.split(most), self.counts, strict=True)
        return torch.cat([part[:count] for part, count in parts]).movedim(0, dim)

    def _to_heads(self, x: Tensor) -> Tensor:
        batch, heads, tokens, width = x.shape
        each = heads // len(self.counts)
        sent = x.unflatten(1, (-1, each)).transpose(0, 1).contiguous()
        sizes = [batch * each * count * width for count in self.counts]
        found = self._exchange(sent, [batch * each * tokens * width] * len(sizes), sizes)
        parts = zip(found.split(sizes), self.counts, strict=True)
        return torch.cat([part.view(batch, each, count, width) for part, count in parts], 2)

    def _to_tokens(self, x: Tensor) -> Tensor:
        batch, each, _, width = x.shape
        sent = torch.cat([part.flatten() for part in x.split(self.counts, 2)])
        sizes = [batch * each * count * width for count in self.counts]
        own = self.counts[dist.get_rank(self.group)]
        found = self._exchange(sent, sizes, [batch * each * own * width] * len(sizes))
        return found.view(len(sizes), batch, each, own, width).transpose(0, 1).flatten(1, 2)

    def _exchange(self, sent: Tensor, sizes: list[int], found: list[int]) -> Tensor:
        out = sent.new_empty(sum(found))
        dist.all_to_all_single(out, sent.flatten(), found, sizes, group=self.group)
        return out


class _Exchanged(torch.autograd.Function):
    """An exchange one way; its gradient goes the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange, to_heads: bool) -> Tensor:
        ctx.exchange, ctx.to_heads = exchange, to_heads
        return exchange._to_heads(x) if to_heads else exchange._to_tokens(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        back = ctx.exchange.to_tokens if ctx.to_heads else ctx.exchange.to_heads
        return back(grads[0]), None, None
