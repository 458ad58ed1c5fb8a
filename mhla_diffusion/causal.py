"""Causal MHLA: the operator along a sequence with its parameters, as one module."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from .attention import MHLA
from .config import AUTO_WINDOW, MHLAConfig
from .ops import BlockLayout, MHLAState, causal_mixing, initial_mixing, mhla_causal
from .ops.features import RotaryEmbedding

# What looks at all tokens, or at a grid.
_REFUSED = (
    "cpe", "qk_conv", "local", "local_margin", "routed_blocks", "exact_routing", "center_keys", "extra_block",
    "key_blocks", "mixing_relative", "mixing_content",
)  # fmt: skip


class CausalMHLA(MHLA):
    """MHLA on a sequence in which a token sees no later one, of any length.

    A block weighs another by how far back it lies, :func:`mhla_diffusion.ops.causal_mixing`: with ``blocks``
    m there are m weights, the last of them for all that lie m - 1 blocks or more back. So they are learned
    on short sequences and hold for long ones, and :meth:`state` keeps no more than m + 1 summaries, or 3
    where m is 1.

    Args:
        config: see :class:`MHLAConfig`, whose window ``"auto"`` is none here; ``blocks`` is m, one number.
            ``mixing_init`` gives the weights that a block at the end of m + 1 has for the others, with 1 for
            itself.
        heads, head_dim: H and d.
        block_size: tokens in a block.
        query_dim: width of the hidden states that the gate reads; H d by default.

    Raises:
        ValueError: for settings that the causal form does not have.
    """

    def __init__(
        self,
        config: MHLAConfig,
        *,
        heads: int,
        head_dim: int,
        block_size: int,
        query_dim: int | None = None,
    ) -> None:
        refused = [name for name in _REFUSED if getattr(config, name) not in (None, False, 0, AUTO_WINDOW)]
        if refused or config.normalizer == "official":
            raise ValueError(
                f"causal MHLA has no {', '.join(refused) or 'normalizer official'}: leave it out of the "
                "config"
            )
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1 token, got {block_size}")
        distances = config.blocks if isinstance(config.blocks, int) else math.prod(config.blocks)
        if config.local == AUTO_WINDOW:
            config = dataclasses.replace(config, local=None)
        super().__init__(config, heads=heads, head_dim=head_dim, grid=(distances,), query_dim=query_dim)
        self.block_size = block_size
        if self.mixing is not None:
            self.mixing = nn.Parameter(self.mixing[..., 0, :].clone())  # [m] or [H, m]

    def _mixing_start(self) -> Tensor:
        """Weights by distance, ``[m]``."""
        count = self.blocks[0]
        layout = BlockLayout((count + 1,), (count + 1,))
        weights = initial_mixing(layout, self.config.mixing_init)[0, :count]
        return weights / weights[0]

    def mixing_matrix(self, device: torch.device | None = None) -> Tensor:
        """Return W of as many blocks as are told apart, ``[m, m]`` or ``[H, m, m]``, lower triangular."""
        return causal_mixing(self.weights(device), self.blocks[0])

    def weights(self, device: torch.device | None = None) -> Tensor:
        """Return the weights of blocks by how far back they lie, ``[m]`` or ``[H, m]``."""
        if self.mixing is None:
            return torch.ones(1, device=device)
        mixing = self.mixing.softmax(-1) if self.config.constraint == "softmax" else self.mixing
        return mixing.to(device)

    def state(self) -> MHLAState:
        """Return the memory of a sequence that is about to begin, for :meth:`forward`."""
        return MHLAState(
            self.weights(),
            self.block_size,
            feature_map=self.operator_map,
            normalizer=self.config.normalizer,
            eps=self.config.eps,
            relative=True,
        )

    def forward(  # type: ignore[override]
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        hidden_states: Tensor | None = None,
        rotary_emb: RotaryEmbedding | None = None,
        state: MHLAState | None = None,
    ) -> Tensor:
        """Attend: ``norm(mhla_causal(q, k, v)) * SiLU(gate(x))``.

        Args:
            q, k, v: ``[B, H, N, d]``, before the feature map.
            hidden_states: x, ``[B, N, query_dim]``, read by the gate alone.
            rotary_emb: see :func:`mhla_diffusion.ops.mhla`, tables of these tokens.
            state: of :meth:`state`, which has seen what comes before these tokens. No gradient flows then.

        Returns:
            ``[B, N, H d]``.
        """
        self._check_sizes(q, k, v, hidden_states)
        q, k = self.features(*self.normed(q, k))
        rotary_emb = self._turns(rotary_emb)
        if state is not None:
            out = state.prefill(q, k, v, rotary_emb=rotary_emb)
        else:
            mixing = causal_mixing(self.weights(q.device), -(-q.shape[2] // self.block_size))
            out = mhla_causal(
                q, k, v, mixing, self.block_size,
                feature_map=self.operator_map, normalizer=self.config.normalizer,
                rotary_emb=rotary_emb, eps=self.config.eps,
            )  # fmt: skip
        out = out if self.norm is None else self.norm(out).to(out.dtype)
        return self._gated(out, hidden_states).transpose(1, 2).flatten(2)
