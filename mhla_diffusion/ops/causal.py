"""MHLA for sequences in which a token sees no later one: in parallel over blocks, and token by token.

Appendix C of the paper. The sequence is cut into blocks of ``block_size`` tokens, the last of which may be
shorter. With W lower triangular, block i has the numerators
``phi(Q_i) (sum_{b < i} W[i, b] S_b) + W[i, i] tril(phi(Q_i) phi(K_i)^T) V_i``, and the denominators the same
with 1 in place of V.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from .autocast import without_autocast
from .composite import counted, features_of, inner, mix, outer, ratio
from .features import (
    Features,
    RotaryEmbedding,
    check_key_mask,
    check_rotary,
    feature_map_of,
)
from .rotary import rotary_table


def mhla_causal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixing: Tensor,
    block_size: int,
    *,
    feature_map: str = "relu",
    normalizer: str = "paper",
    rotary_emb: RotaryEmbedding | None = None,
    key_mask: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Causal MHLA, all blocks at once; time O(N d^2 + N n d + M^2 d^2) and memory O(N n + M d^2).

    Sums and denominators are taken in float32 (float64 for float64 inputs), also under autocast.

    Args:
        q, k: ``[B, H, N, d]``, before the feature map.
        v: ``[B, H, N, d_v]``.
        mixing: W, ``[M, M]`` or one per head ``[H, M, M]``, for at least as many blocks as the sequence has:
            the leading ones count. What is above its diagonal is not looked at, as block i sees no later one.
        block_size: n, tokens in a block.
        feature_map, rotary_emb, key_mask, eps: see :func:`mhla_diffusion.ops.mhla`.
        normalizer: ``"paper"`` or ``"none"``.

    Returns:
        ``[B, H, N, d_v]`` in the dtype of v.

    Raises:
        ValueError: for shapes or names that do not fit together.
    """
    features = _features(feature_map, normalizer, eps, rotary_emb, key_mask)
    _check(q, k, v, mixing, block_size)
    tokens = q.shape[2]
    check_rotary(rotary_emb, q)
    check_key_mask(key_mask, k)
    blocks = -(-tokens // block_size)
    with without_autocast(q):
        q_rows, k_rows = features_of(q, dataclasses.replace(features, mask=None)), features_of(k, features)
        weights = mixing[..., :blocks, :blocks].to(q_rows[0].dtype)

        def cut(x: Tensor) -> Tensor:
            """``[B, H, N, d]`` to ``[B, H, M, n, d]``; what is missing is zero and adds nothing."""
            return F.pad(x, (0, 0, 0, blocks * block_size - tokens)).unflatten(2, (blocks, block_size))

        queries, keys = [cut(x) for x in q_rows], [cut(x) for x in k_rows]
        values = cut(counted(v, key_mask).to(q_rows[0].dtype))
        past = mix(weights.tril(-1), outer(values, *keys, normalized=features.normalized))
        products = inner(past, *queries, normalized=features.normalized)
        diagonal = weights.diagonal(dim1=-2, dim2=-1)[..., None, None]
        products = products + diagonal * _within(queries, keys, values, normalized=features.normalized)
        return ratio(products, normalized=features.normalized).flatten(2, 3)[:, :, :tokens].to(v.dtype)


class MHLAState:
    """Memory of causal MHLA over a sequence: the summaries of its blocks.

    ``prefill`` takes a prompt or a further piece of any length, ``step`` one token. Together they give what
    :func:`mhla_causal` gives for the whole sequence. A step costs O(d^2); the first of a block, in which the
    summaries are mixed for it, O(M d^2). No gradient flows through the state.

    Args:
        mixing: W of :func:`mhla_causal`, for as many blocks as the sequence will have.
        block_size, feature_map, normalizer, eps: see :func:`mhla_causal`.
        relative: whether ``mixing`` is the weights ``[m]`` or ``[H, m]`` of
            :func:`mhla_diffusion.ops.causal_mixing`. Then the sequence may be of any length, and no more than
            m + 1 summaries are kept (3 where m is 1): blocks that weigh alike for good are one.
    """

    def __init__(
        self,
        mixing: Tensor,
        block_size: int,
        *,
        feature_map: str = "relu",
        normalizer: str = "paper",
        eps: float = 1e-6,
        relative: bool = False,
    ) -> None:
        self._settings = _features(feature_map, normalizer, eps, None, None)
        self._mixing, self._block_size, self._relative = mixing.detach(), block_size, relative
        self.tokens = 0
        # Of the finished blocks, one each (relative: the first of them all those that weigh like it); of the
        # running block; and what its queries read: the finished ones mixed for it, and its own summary so far
        # times W[i, i].
        self._finished: list[Tensor] = []
        self._running: Tensor | None = None
        self._visible: Tensor | None = None

    def prefill(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        rotary_emb: RotaryEmbedding | None = None,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the outputs of the tokens that come next.

        Args:
            q, k, v: ``[B, H, T, d]``, of these tokens alone.
            rotary_emb: tables of these tokens, ``[..., T, d / 2]``.
            key_mask: bool ``[B, T]``, true where a key counts.

        Returns:
            ``[B, H, T, d_v]`` in the dtype of v.

        Raises:
            ValueError: for shapes that do not fit together or those of the tokens before, or more tokens than
                W has blocks for. The state is as it was then.
        """
        if self._relative:
            _check_relative(q, k, v, self._mixing, self._block_size)
        else:
            _check(q, k, v, self._mixing, self._block_size, before=self.tokens)
        self._check_kept(q, v)
        check_rotary(rotary_emb, q)
        check_key_mask(key_mask, k)
        settings = dataclasses.replace(self._settings, rotary=rotary_table(rotary_emb), mask=key_mask)
        # Inside the function: dynamo has no source for a decorated method of a state that it sees made.
        with torch.no_grad(), without_autocast(q):
            queries = features_of(q, dataclasses.replace(settings, mask=None))
            keys, values = features_of(k, settings), counted(v, key_mask).to(queries[0].dtype)
            outputs, start = [], 0
            while start < q.shape[2]:
                stop = min(q.shape[2], start + self._block_size - self.tokens % self._block_size)
                piece = slice(start, stop)
                outputs.append(
                    self._extend(
                        [x[:, :, piece] for x in queries], [x[:, :, piece] for x in keys], values[:, :, piece]
                    )
                )
                start = stop
        if not outputs:
            return v.new_empty(v.shape)
        return torch.cat(outputs, 2).to(v.dtype)

    def step(self, q: Tensor, k: Tensor, v: Tensor, *, rotary_emb: RotaryEmbedding | None = None) -> Tensor:
        """Return the output of one more token: ``[B, H, 1, d]`` each; see :meth:`prefill`."""
        if q.ndim != 4 or q.shape[2] != 1:
            raise ValueError(f"step takes one token, [B, H, 1, d], got {tuple(q.shape)}; prefill takes more")
        return self.prefill(q, k, v, rotary_emb=rotary_emb)

    def select(self, samples: Tensor) -> None:
        """Keep these samples of the batch, ``[B']`` int64, each as often and in the order that they come."""
        samples = samples.to(self._mixing.device)
        self._finished = [summary.index_select(0, samples) for summary in self._finished]
        if self._running is not None and self._visible is not None:
            self._running, self._visible = (
                x.index_select(0, samples) for x in (self._running, self._visible)
            )

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        kept = (*self._finished, self._running, self._visible)
        return sum(summary.nbytes for summary in kept if summary is not None)

    def _check_kept(self, q: Tensor, v: Tensor) -> None:
        """Refuse tokens of other sizes than those before: as sums, summaries would be broadcast to them."""
        kept = self._finished[0] if self._running is None and self._finished else self._running
        if kept is None:
            return
        batch, heads, channels, d = kept.shape
        before = batch, heads, d, channels - self._settings.normalized
        given = (*q.shape[:2], q.shape[3], v.shape[3])
        if given != before:
            raise ValueError(
                f"the state holds tokens of [B, H, d, d_v] = {before}, got tokens of {tuple(given)}: pass q, "
                "k and v of the same samples in the same order, after select(samples) where others are to go "
                "on, and begin a new state for other heads"
            )

    def _row(self) -> Tensor:
        """Weights of the summaries that are kept and, last, of the running block, ``[M]`` or ``[H, M]``."""
        kept = len(self._finished)
        if not self._relative:
            return self._mixing[..., kept, : kept + 1]
        back = torch.arange(kept, -1, -1, device=self._mixing.device)
        return self._mixing[..., back.clamp_max(self._mixing.shape[-1] - 1)]

    def _finish(self, summary: Tensor) -> None:
        """Keep the summary of a block that is full."""
        self._finished.append(summary)
        if self._relative and len(self._finished) > max(1, self._mixing.shape[-1] - 1):
            self._finished[:2] = [self._finished[0] + self._finished[1]]

    def _extend(self, queries: list[Tensor], keys: list[Tensor], values: Tensor) -> Tensor:
        """Tokens of one block, which may have begun."""
        normalized = self._settings.normalized
        own = outer(values, *keys, normalized=normalized)  # [B, H, d_v + 1, d]
        row = self._row().to(own.dtype)
        weight = row[..., -1, None, None]
        if self._running is None or self._visible is None:
            self._running = torch.zeros_like(own)
            self._visible = torch.zeros_like(own)
            if self._finished:
                self._visible = mix(row[..., None, :-1], torch.stack(self._finished, 2))[:, :, 0]
        products = inner(self._visible, *queries, normalized=normalized)
        products = products + weight * _within(queries, keys, values, normalized=normalized)
        self._running += own
        self._visible += weight * own
        self.tokens += values.shape[2]
        if self.tokens % self._block_size == 0:
            self._finish(self._running)
            self._running = self._visible = None
        return ratio(products, normalized=normalized)


def _within(queries: list[Tensor], keys: list[Tensor], values: Tensor, *, normalized: bool) -> Tensor:
    """Numerators and denominators of tokens ``[..., n, d]`` with themselves and those before, W aside."""
    scores = (queries[1] @ keys[1].mT).tril()
    products = scores @ values
    if not normalized:
        return products
    plain = scores if queries[0] is queries[1] else (queries[0] @ keys[0].mT).tril()
    return torch.cat((products, plain.sum(-1, keepdim=True)), -1)


def _features(
    feature_map: str, normalizer: str, eps: float, rotary_emb: RotaryEmbedding | None, key_mask: Tensor | None
) -> Features:
    feature_map_of(feature_map)
    if normalizer not in ("paper", "none"):
        raise ValueError(f"normalizer {normalizer!r} of the causal form is not one of paper, none")
    return Features(feature_map, eps, normalizer == "paper", rotary_table(rotary_emb), key_mask)


def _check_tokens(q: Tensor, k: Tensor, v: Tensor, block_size: int) -> None:
    if not isinstance(block_size, int) or block_size < 1:
        raise ValueError(f"block_size must be an integer of at least 1 token, got {block_size!r}")
    if not q.ndim == v.ndim == 4 or q.shape != k.shape or v.shape[:3] != k.shape[:3]:
        raise ValueError(
            "q, k and v must be [B, H, N, d] with the same B, H, N (q and k also d), got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )


def _check_relative(q: Tensor, k: Tensor, v: Tensor, mixing: Tensor, block_size: int) -> None:
    _check_tokens(q, k, v, block_size)
    if not mixing.ndim or not mixing.shape[-1] or mixing.shape[:-1] not in ((), q.shape[1:2]):
        raise ValueError(
            f"relative mixing must be [m] or [H, m] with H = {q.shape[1]} and m of at least 1, got "
            f"{tuple(mixing.shape)}"
        )


def _check(q: Tensor, k: Tensor, v: Tensor, mixing: Tensor, block_size: int, before: int = 0) -> None:
    _check_tokens(q, k, v, block_size)
    size = mixing.shape[-1] if mixing.ndim else 0
    blocks = -(-(before + q.shape[2]) // block_size)
    if mixing.shape not in ((size, size), (q.shape[1], size, size)):
        raise ValueError(
            f"mixing must be [M, M] or [H, M, M] with H = {q.shape[1]}, got {tuple(mixing.shape)}"
        )
    if blocks > size:
        raise ValueError(
            f"the sequence needs {blocks} blocks of {block_size} tokens, but mixing is for {size}; take a "
            "larger block_size, or resize the matrix with resize_mixing"
        )
