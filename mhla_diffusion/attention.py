"""MHLA: the operator with its parameters, as one module with flags."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .by_heads import attend_by_heads
from .config import POWER_MAP, WIDE_MAPS, WINDOW_ONLY, OneConfig, as_config
from .constraint import clamp, constrain
from .convolution import convolve, depthwise_conv
from .hedgehog import Hedgehog
from .ops import (
    FEATURE_MAPS,
    BlockLayout,
    choose_blocks,
    content_mixing,
    extend_mixing,
    initial_mixing,
    mhla,
    mhla_local,
    mhla_parallel,
    offset_means,
    relative_mixing,
    resize_mixing,
    window_attention,
)
from .ops.composite import counted, within_range
from .ops.features import RotaryEmbedding, check_arguments, check_key_mask, turned
from .ops.norms import Norms, is_plain, over_channels
from .ops.operators import in_transform

# Summed values of more, each of about 1, begin to exceed what float16 holds.
_MOST_SUMMED_IN_FLOAT16 = 16384

_NORM_EPS = 1e-6

# SiLU(1.2785) = 1: a gate with this bias and no weights lets everything through.
_OPEN_GATE_BIAS = 1.2784645427610738


class MHLA(nn.Module):
    """Multi-Head Linear Attention on projected queries, keys and values.

    Holds what the operator learns: the mixing matrix and, by flags, the convolutions (``cpe``,
    ``qk_conv``), the per-head norms and the gate. The blocks along each axis are fixed at construction and
    follow the grid: at another resolution blocks grow or shrink, and the mixing matrix stays valid. Where an
    axis has fewer tokens than blocks (a single frame, say), each token there is a block, and the mixing
    matrix is resized.

    Args:
        config: see :class:`MHLAConfig`. With one block there is no mixing matrix: plain linear attention.
        heads, head_dim: H and d.
        grid: the grid the model is made for, ``(H, W)`` or ``(F, H, W)``.
        key_grid: for cross-attention, the grid of the keys: ``(N_k,)`` for text. The mixing matrix,
            ``[M, M_k]``, then starts uniform, as blocks of two grids have no distance.
        query_dim: width of the hidden states that the gate reads; H d by default.

    Raises:
        ValueError: when a grid cannot hold its blocks, or convolutions do not go over it, and for no number
            of heads or channels.
    """

    def __init__(
        self,
        config: OneConfig,
        *,
        heads: int,
        head_dim: int,
        grid: tuple[int, ...],
        key_grid: tuple[int, ...] | None = None,
        query_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.config = config = as_config(config)
        if any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in (heads, head_dim)):
            raise ValueError(f"heads and head_dim must be integers >= 1, got {heads!r} and {head_dim!r}")
        layout, key_layout = config.layout(grid), config.key_layout(key_grid)
        if key_layout is not None and (config.cpe is not None or config.qk_conv):
            raise ValueError(
                "convolutions are for self-attention: leave them out in cross-attention, got cpe "
                f"{config.cpe!r} and qk_conv {config.qk_conv}"
            )
        if (config.cpe is not None or config.qk_conv) and len(grid) not in (2, 3):
            raise ValueError(
                f"convolutions (cpe, qk_conv) are for grids of 2 or 3 axes, got {grid}: leave them out"
            )
        if query_dim is not None and not (isinstance(query_dim, int) and query_dim > 0):
            raise ValueError(f"query_dim must be an integer >= 1, or None for H d, got {query_dim!r}")
        self.blocks = layout.blocks
        self.key_blocks = None if key_layout is None else key_layout.blocks
        self.heads, self.head_dim, inner_dim = heads, head_dim, heads * head_dim
        size: tuple[int, ...] = tuple(
            x.num_blocks + config.extra_block for x in (layout, key_layout or layout)
        )
        per_head = (heads,) if config.mixing_per_head else ()
        if config.mixing_relative:
            size = (math.prod(2 * count - 1 for count in layout.blocks) + 3 * config.extra_block,)
        alone = config.window == WINDOW_ONLY
        self.mixing = nn.Parameter(torch.empty(*per_head, *size)) if config.has_mixing else None
        by_content = config.mixing_content and config.has_mixing
        self.strength = nn.Parameter(torch.empty(heads)) if by_content else None
        learned = config.feature_map == "hedgehog"
        self.feature_q = Hedgehog(heads, head_dim) if learned else None
        self.feature_k = Hedgehog(heads, head_dim) if learned else None
        self.local = nn.Parameter(torch.empty(heads)) if config.window and not alone else None
        self.conv_q = depthwise_conv(inner_dim, len(grid)) if config.qk_conv else None
        self.conv_k = depthwise_conv(inner_dim, len(grid)) if config.qk_conv else None
        self.norm_q = nn.RMSNorm(head_dim, eps=_NORM_EPS) if config.qk_norm else None
        self.norm_k = nn.RMSNorm(head_dim, eps=_NORM_EPS) if config.qk_norm else None
        self.cpe = depthwise_conv(inner_dim, len(grid)) if config.cpe else None
        self.norm = nn.RMSNorm(head_dim, eps=_NORM_EPS) if config.output_norm else None
        self.gate = (
            nn.Linear(inner_dim if query_dim is None else query_dim, inner_dim) if config.gate else None
        )
        self.reset_parameters()
        self._keep_constraint()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Copies and unpickled modules skip __init__, but hold the constraint too.
        super().__setstate__(state)
        self._keep_constraint()

    def _keep_constraint(self) -> None:
        if self.config.constraint == "clamp" and self.mixing is not None:
            constrain(self)

    def extra_repr(self) -> str:
        return f"blocks={self.config.blocks}, heads={self.heads}, head_dim={self.head_dim}"

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Bring every parameter to the start that the config names."""
        if self.mixing is not None:
            self.mixing.copy_(self._unconstrained(self._mixing_start()).expand_as(self.mixing))
        for part in (self.norm_q, self.norm_k, self.norm, self.feature_q, self.feature_k):
            if part is not None:
                part.reset_parameters()
        if self.strength is not None:
            nn.init.zeros_(self.strength)
        if self.local is not None:
            nn.init.constant_(self.local, self._local_start())
        for conv in (self.conv_q, self.conv_k, self.cpe):
            if conv is not None:
                nn.init.zeros_(conv.weight)
                assert conv.bias is not None
                nn.init.zeros_(conv.bias)
        if self.cpe is not None and self.config.cpe == "identity":
            weights = self.cpe.weight.flatten(1)  # a view: [channels, 3^axes]
            weights[:, weights.shape[1] // 2] = 1  # the centre
        if self.gate is not None:
            nn.init.zeros_(self.gate.weight)
            nn.init.constant_(self.gate.bias, _OPEN_GATE_BIAS)

    def _mixing_start(self) -> Tensor:
        if self.key_blocks is None:
            layout = BlockLayout(self.blocks, self.blocks, self._no_extra)
            return initial_mixing(layout, self.config.mixing_init)
        keys = math.prod(self.key_blocks)
        return torch.full((math.prod(self.blocks), keys), 1 / keys)

    def _local_start(self) -> float:
        """The start of the softmax window: a gate half open, or one denominator in which keys weigh alike.

        A key that the softmax sees weighs about exp(0); one of MHLA about 1 / M, as rows of W sum to 1, times
        the product of two features, which is 2 / d for learned ones without preference.
        """
        if self.config.window == "gate":
            return 0.0
        d = self.head_dim
        # Means over standard normal queries and keys; that of powers is of d 32 to 64, and falls with d.
        relu = d / (2 * math.pi)
        products = {
            "hedgehog": 2 / d, "softmax": 1 / d, "relu": relu, "crelu": 2 * relu, "elu": 1.35 * d,
            POWER_MAP: 0.06 * d,
        }  # fmt: skip
        return math.log(math.prod(self.blocks) / products[self.config.feature_map])

    @property
    def _no_extra(self) -> tuple[int, int] | None:
        """The extra block of a layout in which it is empty."""
        return (0, 0) if self.config.extra_block else None

    def _unconstrained(self, mixing: Tensor) -> Tensor:
        """The parameter that gives a mixing matrix."""
        if self.config.mixing_relative:
            mixing = offset_means(mixing, self.blocks, extra=self.config.extra_block)
        # Logits. A weight of exactly 0 would have no gradient.
        return mixing.clamp_min(1e-4).log() if self.config.constraint == "softmax" else mixing

    def mixing_matrix(self, device: torch.device | None = None) -> Tensor:
        """Return W of the operator, ``[M, M]`` or ``[H, M, M]`` (``M_k`` columns in cross-attention).

        The last row and column are those of extra tokens, if they are a block.
        """
        if self.config.window == WINDOW_ONLY:
            return torch.eye(math.prod(self.blocks), device=device)
        if self.mixing is None:
            return torch.ones(math.prod(self.blocks), 1, device=device)
        mixing: Tensor = self.mixing
        if self.config.mixing_relative:
            mixing = relative_mixing(mixing, self.blocks, extra=self.config.extra_block)
        return mixing.softmax(-1) if self.config.constraint == "softmax" else mixing

    @torch.no_grad()
    def take_mixing(self, other: MHLA) -> None:
        """Start from the mixing matrix of another module, resized to the blocks of this one.

        See :func:`mhla_diffusion.ops.resize_mixing`. Under the constraint ``"clamp"`` a matrix with weights
        above 1 is divided by the largest, under ``"softmax"`` each row by its sum. The denominator cancels
        these factors; without one (``normalizer="none"``) only ``output_norm`` does. Where a window shares
        the denominator (``local="shared"`` in both), its weight takes them over, of rows the mean of their
        logarithms, and with other blocks that a weight is one of more or fewer.
        """
        assert self.mixing is not None
        mixing, extra = other.mixing_matrix(), self.config.extra_block
        if other.config.extra_block and not extra:
            mixing = mixing[..., :-1, :-1]
        elif extra and not other.config.extra_block:
            mixing = extend_mixing(mixing)
        mixing = _resize(
            mixing,
            (other.blocks, other.key_blocks or other.blocks),
            (self.blocks, self.key_blocks or self.blocks),
            self._no_extra,
        )
        if mixing.ndim == 3 and not self.config.mixing_per_head:
            mixing = mixing.mean(0)
        within = mixing / mixing.max().clamp_min(1) if self.config.constraint == "clamp" else mixing
        self.mixing.copy_(self._unconstrained(within).expand_as(self.mixing))
        if self.local is not None and other.local is not None and other.config.window == self.config.window:
            shared = self.config.window == "shared"
            blocks = math.log(math.prod(self.blocks) / math.prod(other.blocks))
            self.local.copy_(other.local + (self._scale_of(mixing) + blocks if shared else 0))

    def _scale_of(self, mixing: Tensor) -> Tensor:
        """Logarithm of how much larger the rows of a matrix are than those of this one: ``[H]`` or one."""
        sums, own = (rows.sum(-1) for rows in (mixing, self.mixing_matrix()))
        counts = (sums > 0) & (own > 0)
        logs = torch.where(counts, sums, 1.0).log() - torch.where(counts, own, 1.0).log()
        return logs.sum(-1) / counts.sum(-1).clamp_min(1)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        grid: tuple[int, ...],
        extra: tuple[int, int] | None = None,
        key_grid: tuple[int, ...] | None = None,
        hidden_states: Tensor | None = None,
        rotary_emb: RotaryEmbedding | None = None,
        key_mask: Tensor | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> Tensor:
        """Attend, and apply what the flags ask for: ``norm(mhla(q, k, v)) * SiLU(gate(x)) + cpe(v)``.

        Args:
            q, k, v: ``[B, H, N, d]`` in grid order, before the feature map; extra tokens before or after.
            grid: the grid of these tokens; ``key_grid`` that of k and v, in cross-attention.
            extra: numbers of tokens before and after those of the grid that lie on none, others in every
                call as may be. Convolutions leave them out. See ``extra_block`` of the config.
            hidden_states: x, ``[B, N, query_dim]``, read by the gate alone.
            rotary_emb, key_mask: see :func:`mhla_diffusion.ops.mhla`. To convolutions masked tokens are 0.
            group: ranks that hold one sequence, each the share of the grid that ``torch.tensor_split`` gives
                it and ``extra`` tokens of its own, of which all other tensors are then. They exchange
                summaries, see :func:`mhla_diffusion.ops.mhla_parallel`; or, where the config
                ``needs_all_tokens``, tokens for heads, whose number they then have to divide.

        Returns:
            ``[B, N, H d]``.

        Raises:
            ValueError: when shapes, grid and blocks do not fit together.
        """
        if (key_grid is None) != (self.key_blocks is None):
            self.config.key_layout(key_grid)  # says what is missing
        if key_grid is not None and group is not None:
            raise ValueError("over ranks MHLA has no cross-attention: leave key_grid or the group out")
        self._check_sizes(q, k, v, hidden_states)
        check_key_mask(key_mask, k)
        unbounded = self.config.normalizer == "none" and self.norm is None
        if unbounded and v.dtype == torch.float16 and k.shape[2] > _MOST_SUMMED_IN_FLOAT16:
            raise ValueError(
                f"normalizer 'none' without output_norm sums over {_MOST_SUMMED_IN_FLOAT16} tokens or more; "
                "float16 holds no more than 65,504: use bfloat16 or float32"
            )
        settings: dict[str, Any] = {
            "grid": grid, "extra": extra, "key_grid": key_grid, "rotary_emb": rotary_emb,
            "key_mask": key_mask,
        }  # fmt: skip
        if group is not None and self.config.needs_all_tokens:
            out, beside = attend_by_heads(self, q, k, v, group=group, **settings)
            out = self._gated(out, hidden_states)
        else:
            out, beside = self.attend(q, k, v, group=group, hidden_states=hidden_states, **settings)
        out = out.transpose(1, 2).flatten(2)
        # Behind norm and gate, as in the public reference code.
        return out if beside is None else out + beside.transpose(1, 2).flatten(2)

    def _check_sizes(self, q: Tensor, k: Tensor, v: Tensor, hidden_states: Tensor | None) -> None:
        """Refuse other heads and channels than this module has, and a gate without its hidden states."""
        for name, x in (("q", q), ("k", k), ("v", v)):
            if x.ndim != 4 or x.shape[1] != self.heads or x.shape[3] != self.head_dim:
                raise ValueError(
                    f"{name} must be [B, H, N, d] with H = {self.heads} and d = {self.head_dim} of this "
                    f"MHLA, got {tuple(x.shape)}"
                )
        if self.gate is None:
            return
        if hidden_states is None:
            raise ValueError("this MHLA has a gate, which reads the hidden states: pass hidden_states=x")
        expected = (q.shape[0], q.shape[2], self.gate.in_features)
        if hidden_states.shape != expected:
            raise ValueError(
                f"hidden_states, which the gate reads, must be [B, N, query_dim] = {list(expected)}, got "
                f"{tuple(hidden_states.shape)}"
            )

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        grid: tuple[int, ...],
        extra: tuple[int, int] | None = None,
        key_grid: tuple[int, ...] | None = None,
        rotary_emb: RotaryEmbedding | None = None,
        key_mask: Tensor | None = None,
        group: dist.ProcessGroup | None = None,
        hidden_states: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend as :meth:`forward` does, whose arguments these are; without hidden states before the gate.

        Returns:
            ``norm(mhla(q, k, v)) * SiLU(gate(x))`` and ``cpe(v)``, ``[B, H, N, d]`` each; None without a
            convolution.
        """
        layout, key_layout, mixing = self.fit(grid, key_grid, extra=extra, device=q.device)
        # Convolutions and the gradients of norms and learned features see them too.
        k, v = counted(k, key_mask), counted(v, key_mask)
        beside = None if self.cpe is None else convolve(self.cpe, v, layout)
        whole = group is None and self.config.window is None
        norms = self._norms(hidden_states, q.device) if whole else None
        q, k = self._convolved(q, k, layout, key_mask, v.dtype)
        if norms is None or norms.q is None:
            q, k = self._normed(q, k)
        mixing = self.weighed(mixing, q, k, layout, key_layout, key_mask)
        window = (q, k)
        if self.config.window is not None:
            check_arguments(q, k, v, mixing, layout, rotary_emb=rotary_emb, key_mask=key_mask)
            window = turned(q, k, rotary_emb, layout)
        q, k = self.features(q, k, key_mask)
        rotary_emb = self._turns(rotary_emb)
        attend: Callable[..., Tensor]
        if group is not None:
            attend = self._attend_in_parts(layout, group, k.shape[2])
        elif self.config.window is not None:
            attend = functools.partial(self._attend_locally, window)
        else:
            attend = functools.partial(mhla, key_layout=key_layout, norms=norms)
        # Sums over all tokens can be too large for float16 where no denominator follows, but a norm or gate.
        wide = norms is None and v.dtype == torch.float16
        out = attend(
            q, k, v, mixing.to(q.device), layout,
            feature_map=self.operator_map, normalizer=self.config.normalizer,
            rotary_emb=rotary_emb, key_mask=key_mask, eps=self.config.eps,
            dtype=torch.float32 if wide else None,
        )  # fmt: skip
        if norms is None:
            dtype = v.dtype if wide else out.dtype
            out = self._gated(out if self.norm is None else over_channels(self.norm, out), hidden_states)
            out = within_range(out, dtype).to(dtype)
        return out, beside

    def _norms(self, hidden_states: Tensor | None, device: torch.device) -> Norms | None:
        """Norms and gate as arguments of the operator; None where a norm is more than its weights."""
        norms = self.norm_q, self.norm_k, self.norm
        if not all(is_plain(x, device, _NORM_EPS) for x in norms if x is not None):
            return None
        q_norm, k_norm, out_norm = (None if x is None else x.weight for x in norms)
        if (
            self.strength is not None
            or self.config.center_keys
            or self.config.feature_map not in FEATURE_MAPS
        ):
            q_norm = k_norm = None  # normed queries and keys go elsewhere first
        return Norms(q_norm, k_norm, out_norm, self._gate_of(hidden_states), _NORM_EPS)

    def _turns(self, rotary_emb: RotaryEmbedding | None) -> RotaryEmbedding | None:
        """Rotary tables of the features: both halves of wide ones turn alike."""
        if rotary_emb is None or self.config.feature_map not in WIDE_MAPS:
            return rotary_emb
        return torch.cat((rotary_emb[0],) * 2, -1), torch.cat((rotary_emb[1],) * 2, -1)

    def _gate_of(self, hidden_states: Tensor | None) -> Tensor | None:
        """What gates the output, ``[B, H, N, d]`` before SiLU, if anything does."""
        if self.gate is None or hidden_states is None:
            return None
        return self.gate(hidden_states).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _gated(self, out: Tensor, hidden_states: Tensor | None) -> Tensor:
        """The output ``[B, H, N, d]`` behind the gate, if there is one."""
        gate = self._gate_of(hidden_states)
        return out if gate is None else (out * F.silu(gate)).to(out.dtype)

    @property
    def operator_map(self) -> str:
        """Feature map inside the operator, behind :meth:`features`."""
        # What features() makes is positive, and relu leaves it as it is, plus eps.
        return self.config.feature_map if self.config.feature_map in FEATURE_MAPS else "relu"

    def normed(
        self,
        q: Tensor,
        k: Tensor,
        layout: BlockLayout | None = None,
        key_mask: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return queries and keys ``[B, H, N, d]`` behind their convolutions, if any, and their norms.

        Args:
            q, k: ``[B, H, N, d]``.
            layout, key_mask, dtype: what convolutions need: of the tokens, and that of v, to compute in.
        """
        return self._normed(*self._convolved(q, k, layout, key_mask, dtype or q.dtype))

    def _convolved(
        self, q: Tensor, k: Tensor, layout: BlockLayout | None, key_mask: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        if self.conv_q is not None and self.conv_k is not None:
            assert layout is not None
            q = q + convolve(self.conv_q, counted(q, key_mask).to(dtype), layout).to(q.dtype)
            k = k + convolve(self.conv_k, counted(k, key_mask).to(dtype), layout).to(k.dtype)
        return q, k

    def _normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.norm_q is not None and self.norm_k is not None:
            q, k = over_channels(self.norm_q, q), over_channels(self.norm_k, k)
        return q, k

    def weighed(
        self,
        mixing: Tensor,
        q: Tensor,
        k: Tensor,
        layout: BlockLayout,
        key_layout: BlockLayout | None = None,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        """Return W as normed queries and keys make it, ``[B, H, M, M_k]``, or as it was without content."""
        if self.strength is None:
            return mixing
        return content_mixing(mixing, q, k, self.strength, layout, key_layout=key_layout, key_mask=key_mask)

    def features(self, q: Tensor, k: Tensor, key_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return normed queries and keys as the operator gets them: centred, in features of this layer."""
        if self.config.center_keys:
            count = k.shape[2] if key_mask is None else key_mask.sum(1).clamp_min(1)[:, None, None, None]
            wide = torch.promote_types(k.dtype, torch.float32)
            k = k - (counted(k, key_mask).sum(2, keepdim=True, dtype=wide) / count).to(k.dtype)
        if self.feature_q is not None and self.feature_k is not None:
            q, k = self.feature_q(q), self.feature_k(k)
        elif self.config.feature_map == "crelu":
            q, k = torch.cat((q, -q), -1), torch.cat((k, -k), -1)
        elif self.config.feature_map == POWER_MAP:
            q, k = _power(q), _power(k)
        return q, k

    def _attend_locally(
        self, window: tuple[Tensor, Tensor], *tensors: Any, normalizer: str, dtype: Any, **settings: Any
    ) -> Tensor:
        """The operator with a softmax window, or that alone."""
        _, _, v, _, layout = tensors
        key_mask, chosen = settings["key_mask"], None
        if self.config.routed_blocks:
            count, exact = self.config.routed_blocks, self.config.exact_routing
            chosen = choose_blocks(*window, layout, count, exact=exact, key_mask=key_mask)
        wider: dict[str, Any] = {"margin": self.config.margin, "chosen": chosen}
        if self.config.window == WINDOW_ONLY:
            return _attend_in_blocks(*window, v, layout, key_mask, wider)
        assert self.local is not None
        assert self.config.window is not None
        return mhla_local(
            *tensors, window=window, weight=self.local, form=self.config.window, **settings | wider
        )

    @staticmethod
    def _attend_in_parts(layout: BlockLayout, group: dist.ProcessGroup, tokens: int) -> Callable[..., Tensor]:
        """The operator over the ranks of a group, of which this one holds so many tokens."""
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        share, longer = divmod(math.prod(layout.grid), ranks)
        expected, held = share + (rank < longer), tokens - sum(layout.extra or ())
        if held != expected:  # other ranks would take its tokens for those of other places
            raise ValueError(
                f"rank {rank} of {ranks} must hold {expected} tokens of the grid {layout.grid}, as "
                f"torch.tensor_split gives it, got {held}"
            )
        return functools.partial(mhla_parallel, start=rank * share + min(rank, longer), group=group)

    def fit(
        self,
        grid: tuple[int, ...],
        key_grid: tuple[int, ...] | None = None,
        *,
        extra: tuple[int, int] | None = None,
        device: torch.device | None = None,
    ) -> tuple[BlockLayout, BlockLayout | None, Tensor]:
        """Fit to these grids: layouts of queries and, in cross-attention, keys, and the mixing matrix.

        Raises:
            ValueError: for extra tokens where they have no block and there are several others.
        """
        layout = _largest_layout(grid, self.blocks, self._no_extra if extra is None else extra)
        mixing = self.mixing_matrix(device)
        keys, key_layout = layout.blocks, None
        if key_grid is not None and self.key_blocks is not None:
            key_layout = _largest_layout(key_grid, self.key_blocks)
            keys = key_layout.blocks
        mixing = _resize(
            mixing, (self.blocks, self.key_blocks or self.blocks), (layout.blocks, keys), self._no_extra
        )
        if extra is not None and not self.config.extra_block:
            if math.prod(self.blocks) > 1 or key_layout is not None:
                raise ValueError(
                    f"this MHLA has no row and column of the mixing matrix for extra tokens, got {extra}: "
                    "set extra_block=True in its MHLAConfig (self-attention alone), or blocks=1"
                )
            mixing = F.pad(mixing, (0, 1, 0, 1), value=1.0)  # plain linear attention: all tokens are alike
        return layout, key_layout, mixing

    def clamp_mixing(self) -> None:
        """Bring the mixing matrix back into [0, 1]; called after every optimizer step."""
        assert self.mixing is not None
        clamp(self.mixing)


def _power(x: Tensor) -> Tensor:
    """Rows ``relu(x)^3`` with the norm of ``relu(x)``: nearer to the axis of their largest channel."""
    positive = F.relu(x.to(torch.promote_types(x.dtype, torch.float32)))
    # With a largest channel of 1 no cube is out of range. The direction, and its gradient, are the same.
    largest = positive.detach().amax(-1, keepdim=True).clamp_min(1e-12)
    scaled = positive / largest
    # Not the norm of a row of zeros, which has no gradient.
    norms = (scaled.square().sum(-1, keepdim=True) + 1e-12).sqrt() * largest
    return (F.normalize(scaled**3, dim=-1) * norms).to(x.dtype)


def _attend_in_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    key_mask: Tensor | None,
    wider: dict[str, Any],
) -> Tensor:
    """Softmax attention inside blocks; of one, and extra tokens beside it, by the kernel of its own."""
    if math.prod(layout.blocks) > 1:
        return window_attention(q, k, v, layout, key_mask=key_mask, **wider).to(v.dtype)
    if in_transform():  # that kernel has no derivative in forward mode on a CPU
        all_tokens = BlockLayout((layout.num_tokens,), (1,))
        return window_attention(q, k, v, all_tokens, key_mask=key_mask).to(v.dtype)
    mask = None if key_mask is None else key_mask[:, None, None]
    return F.scaled_dot_product_attention(q, k, v.to(q.dtype), attn_mask=mask).to(v.dtype)


def _largest_layout(
    grid: tuple[int, ...], blocks: tuple[int, ...], extra: tuple[int, int] | None = None
) -> BlockLayout:
    """The blocks on a grid, or as many along each axis as it has tokens."""
    if not isinstance(grid, (tuple, list)) or len(grid) != len(blocks):
        return BlockLayout(grid, blocks)  # says so
    return BlockLayout(grid, tuple(min(b, max(n, 1)) for b, n in zip(blocks, grid, strict=True)), extra)


def _resize(
    mixing: Tensor,
    old: tuple[tuple[int, ...], ...],
    new: tuple[tuple[int, ...], ...],
    extra: tuple[int, int] | None,
) -> Tensor:
    """A mixing matrix for other blocks of queries and keys."""
    if old == new:  # of almost all calls, which then make no layouts
        return mixing
    # One token a block: resizing depends on the blocks alone.
    (from_layout, from_keys), (to_layout, to_keys) = (
        (BlockLayout(blocks, blocks, extra) for blocks in both) for both in (old, new)
    )
    return resize_mixing(mixing, from_layout, to_layout, from_keys=from_keys, to_keys=to_keys)
