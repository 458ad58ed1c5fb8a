"""The two halves of the operator and their gradients: keys into summaries, queries out of mixed summaries.

The summary of block b is one matrix ``[d_v + 1, d]``: ``S_b^T = sum_j v_j phi(k_j)^T`` and below it
``z_b = sum_j phi(k_j)``, as if v had one more channel that is 1. One product of matrices then gives
numerators and denominators alike. Without a denominator that row is left out.

Beside the summaries nothing is as large as q, k, v or the output: tiles are copied into buffers that serve
again for the next tile, the backward computes features anew, and blocks, ragged ones too, are only strides.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .composite import mix, weights_of, within_range
from .features import Features, feature_map_of
from .layout import BlockLayout
from .tiles import Part, Tile, tile_groups


def summarize(k: Tensor, v: Tensor, layout: BlockLayout, features: Features) -> tuple[Tensor, Tensor, Tensor]:
    """``[B, H, M, d_v + 1, d]`` from k ``[B, H, N, d]`` and v ``[B, H, N, d_v]``, in float32 or wider.

    And two tensors of no elements: the sums, which other paths keep apart, and the centre of the values.
    """
    summaries, sums, centre = new_summaries(k, v, layout, features)
    for part, places in _places(k, layout, features, summaries.dtype):
        for at in places:
            at.add_outer(at.values(v), at.rows(k), summaries[part])
    return summaries, sums, centre


def summarize_backward(
    grad: Tensor,
    grad_sums: Tensor,
    k: Tensor,
    v: Tensor,
    centre: Tensor,
    layout: BlockLayout,
    features: Features,
) -> tuple[Tensor, Tensor]:
    """Gradients of k and v from those of the summaries."""
    grad_k, grad_v = new_gradient(k), new_gradient(v)
    for part, places in _places(k, layout, features, grad.dtype):
        for at in places:
            rows, matrices = at.rows(k), at.matrices(grad[part])
            at.store(rows.rotated @ matrices[:, : v.shape[-1]].mT, grad_v)
            at.store_gradient(_outer_backward(at.values(v), matrices, rows), rows, k, grad_k)
    return grad_k, grad_v


def read(
    q: Tensor,
    summaries: Tensor,
    sums: Tensor,
    centre: Tensor,
    mixing: Tensor,
    layout: BlockLayout,
    features: Features,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return the output ``[B, H, N, d_v]`` in ``dtype``, and the denominators ``[B, H, N, 1]``, if any.

    A denominator is zero where a query sees no key: all masked, or a row of W that is all zero.
    """
    assert not sums.shape[-1] + centre.shape[-1], "keys and queries take the same path"
    channels = summaries.shape[-2] - features.normalized
    out, denominators = new_outputs(q, summaries, sums, features, dtype)
    weights, _ = weights_of(mixing, summaries.dtype, features)
    for part, places in _places(q, layout, features, summaries.dtype):
        mixed = mix(part.of_heads(weights), summaries[part])
        for at in places:
            rows, products = at.rows(q), at.buffer("products", summaries.shape[-2])
            _inner(at.matrices(mixed), rows, out=products)
            if features.normalized:
                denominator = products[..., channels:]
                at.store(denominator, denominators)
                denominator.masked_fill_(denominator == 0, 1)  # 0 / 1, not NaN
            at.store_ratio(products, channels, out)
    return out, denominators


def read_backward(
    grad: Tensor,
    grad_denominators: Tensor | None,
    out: Tensor,
    denominators: Tensor,
    q: Tensor,
    summaries: Tensor,
    sums: Tensor,
    mixing: Tensor,
    layout: BlockLayout,
    features: Features,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, the summaries, the sums apart (there are none) and the mixing matrix."""
    denominators = torch.where(denominators == 0, 1, denominators)
    grad_q, grad_summaries = new_gradient(q), summaries.new_empty(summaries.shape)
    weights, scale = weights_of(mixing, summaries.dtype, features)
    grad_weights = weights.new_zeros(weights.shape)
    for part, places in _places(q, layout, features, summaries.dtype):
        own = part.of_heads(weights)
        mixed = mix(own, summaries[part])
        grad_mixed = torch.empty_like(mixed)
        for at in places:
            rows, matrices = at.rows(q), at.matrices(mixed)
            outputs = at.outputs(out, matrices, rows, denominators)
            products = at.products_gradient(grad, grad_denominators, outputs, denominators)
            at.add_outer(products, rows, grad_mixed)
            at.store_gradient(_outer_backward(products, matrices, rows), rows, q, grad_q)
        grad_summaries[part] = mix(own.mT, grad_mixed)
        products = grad_mixed.flatten(3) @ summaries[part].flatten(3).mT  # [b, h, M_q, M_k]
        part.of_heads(grad_weights).add_(products.sum_to_size(own.shape))
    grad_mixing = (grad_weights if scale is None else grad_weights * scale).to(mixing.dtype)
    return grad_q, grad_summaries, sums.new_empty(sums.shape), grad_mixing


def new_summaries(
    k: Tensor, v: Tensor, layout: BlockLayout, features: Features
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty: ``[B, H, M, d_v + 1, d]``, ``[B, H, M, 0]`` and ``[B, H, 0]``."""
    dtype = torch.promote_types(torch.promote_types(k.dtype, v.dtype), torch.float32)
    shape, height = (*k.shape[:2], layout.num_blocks), v.shape[-1] + features.normalized
    return (
        k.new_empty(*shape, height, k.shape[-1], dtype=dtype),
        k.new_empty(*shape, 0, dtype=dtype),
        k.new_empty(*k.shape[:2], 0, dtype=dtype),
    )


def new_outputs(
    q: Tensor, summaries: Tensor, sums: Tensor, features: Features, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Empty, ``[B, H, N, d_v]`` and ``[B, H, N, 1]``."""
    channels = summaries.shape[-2] - int(features.normalized and not sums.shape[-1])
    denominators = torch.promote_types(summaries.dtype, torch.float32)
    return (
        empty_in_order_of(q, channels, dtype),
        q.new_empty(*q.shape[:3], int(features.normalized), dtype=denominators),
    )


def new_gradient(x: Tensor) -> Tensor:
    """Empty, in the order of x in memory, but with its channels side by side."""
    return torch.empty_like(x) if x.stride(-1) == 1 else x.new_empty(x.shape)


class _Rows(NamedTuple):
    """The features of a tile of T blocks of n tokens, ``[T, n, d]``; the same tensor twice without rotation.

    ``rotary`` (complex, ``[..., d / 2]``) and ``hidden`` (true where a row does not count) are those of the
    tile, ``[b, h, *counts, *shape, *]``.
    """

    plain: Tensor
    rotated: Tensor
    normalized: bool
    rotary: Tensor | None
    hidden: Tensor | None

    @property
    def sums_apart(self) -> bool:
        """Whether the denominators are made of other features than the numerators."""
        return self.normalized and self.rotary is not None


def _outer(values: Tensor, rows: _Rows, out: Tensor) -> None:
    """Summaries ``[T, c, d]`` of values ``[T, n, c]`` and rows ``[T, n, d]``; the last value is that of z."""
    torch.bmm(values.mT, rows.rotated, out=out)
    if rows.sums_apart:
        out[:, -1:] = values[..., -1:].mT @ rows.plain


def _inner(matrices: Tensor, rows: _Rows, out: Tensor) -> None:
    """Products ``[T, n, c]`` of matrices ``[T, c, d]`` and rows ``[T, n, d]``; the last is that with z."""
    torch.bmm(rows.rotated, matrices.mT, out=out)
    if rows.sums_apart:
        out[..., -1:] = rows.plain @ matrices[:, -1:].mT


def _outer_backward(values: Tensor, matrices: Tensor, rows: _Rows) -> Tensor:
    """The gradient of the plain rows ``[T, n, d]``, where ``matrices`` is that of :func:`_outer`'s result.

    Or that from :func:`_inner`, where ``values`` is the gradient of its result.
    """
    if rows.rotary is None:
        return values @ matrices
    channels = values.shape[-1] - rows.normalized
    grad = values[..., :channels] @ matrices[:, :channels]
    _rotate_(grad, rows.rotary.conj())
    if rows.normalized:
        grad.addcmul_(values[..., channels:], matrices[:, channels:])
    return grad


def _rotate_(x: Tensor, rotary: Tensor) -> None:
    """Turn the pairs of x ``[T, n, d]`` in place; rotary complex, ``[..., d / 2]``."""
    torch.view_as_complex(x.view(*rotary.shape, 2)).mul_(rotary)


def empty_in_order_of(x: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """``[B, H, N, channels]``, with heads side by side in memory where x ``[B, H, N, d]`` has them so."""
    batch, heads, tokens, _ = x.shape
    if x.stride(1) < x.stride(2):
        return x.new_empty(batch, tokens, heads, channels, dtype=dtype).transpose(1, 2)
    return x.new_empty(batch, heads, tokens, channels, dtype=dtype)


def _places(
    x: Tensor, layout: BlockLayout, features: Features, dtype: torch.dtype
) -> Iterator[tuple[Part, Iterator[_Place]]]:
    """All tiles of x, by samples and heads; sums are to be taken in ``dtype``."""
    rotary = hidden = None
    if features.rotary is not None:
        pairs = features.rotary.to(dtype).unflatten(-1, (-1, 2)).contiguous()
        rotary = torch.view_as_complex(pairs).expand(*x.shape[:-1], -1)
    if features.mask is not None:
        hidden = ~features.mask[:, None, :, None].expand(*x.shape[:-1], 1)
    buffers = _Buffers(x.device, dtype)
    for part, tiles in tile_groups(x, layout):
        yield part, (_Place(part, tile, features, rotary, hidden, buffers) for tile in tiles)


class _Place(NamedTuple):
    """A tile of some samples and heads, with what it takes to work there."""

    part: Part
    tile: Tile
    settings: Features
    rotary: Tensor | None
    hidden: Tensor | None
    buffers: _Buffers

    def tokens(self, x: Tensor) -> Tensor:
        """The view ``[b, h, *counts, *shape, c]`` of ``[B, H, N, c]``."""
        return self.tile.tokens_of(x, self.part)

    def buffer(self, name: str, width: int) -> Tensor:
        """Memory for ``[T, n, width]``, valid until the next tile."""
        samples, heads = self.part.size
        return self.buffers(name, samples * heads * self.tile.num_blocks, self.tile.block_size, width)

    def values(self, v: Tensor) -> Tensor:
        """The tile of v and a channel of ones, ``[T, n, d_v + 1]``."""
        channels, view = v.shape[-1], self.tokens(v)
        values = self.buffer("values", channels + self.settings.normalized)
        copy = _shaped(values, view)[..., :channels].copy_(view)
        if self.hidden is not None:
            # Their features are 0, but 0 times NaN is not.
            copy.masked_fill_(self.tokens(self.hidden), 0)
        return values  # the ones are there already

    def rows(self, x: Tensor) -> _Rows:
        """The features of the tile of x."""
        view, plain = self.tokens(x), self.buffer("features", x.shape[-1])
        feature_map_of(self.settings.feature_map).into(_shaped(plain, view), view, self.settings.eps)
        hidden = None if self.hidden is None else self.tokens(self.hidden)
        if hidden is not None:
            _shaped(plain, view).masked_fill_(hidden, 0)
        if self.rotary is None:
            return _Rows(plain, plain, self.settings.normalized, None, hidden)
        rotary, rotated = self.tokens(self.rotary), self.buffer("rotated", x.shape[-1])
        _rotate_(rotated.copy_(plain), rotary)
        return _Rows(plain, rotated, self.settings.normalized, rotary, hidden)

    def matrices(self, summaries: Tensor) -> Tensor:
        """The tile's own ``[T, c, d]`` of ``[b, h, M, c, d]``."""
        return self.tile.blocks_of(summaries).flatten(0, -3)

    def add_outer(self, values: Tensor, rows: _Rows, summaries: Tensor) -> None:
        """Add :func:`_outer` to the tile's own of ``[b, h, M, c, d]``; the first slab of a block writes."""
        view = self.tile.blocks_of(summaries)
        shape = len(values), *summaries.shape[-2:]
        if self.tile.first and view.is_contiguous():
            _outer(values, rows, out=view.view(shape))
            return
        product = view.new_empty(shape)
        _outer(values, rows, out=product)
        product = product.view(view.shape)
        if self.tile.first:
            view.copy_(product)
        else:
            view.add_(product)

    def store(self, x: Tensor, out: Tensor) -> None:
        """Write ``[T, n, c]`` where it belongs in ``[B, H, N, c]``."""
        view = self.tokens(out)
        view.copy_(_shaped(x, view))

    def store_ratio(self, products: Tensor, channels: int, out: Tensor) -> None:
        """Write numerators over denominators, or numerators alone where there are none."""
        view = self.tokens(out)
        products = _shaped(products, view)
        if self.settings.normalized:
            torch.div(products[..., :channels], products[..., channels:], out=view)
        else:
            view.copy_(within_range(products, out.dtype))

    def outputs(self, out: Tensor, matrices: Tensor, rows: _Rows, denominators: Tensor) -> Tensor:
        """The tile of the output, ``[b, h, *counts, *shape, d_v]``, as exact as sums are.

        The gradient of q is a small difference of ``S^T g`` and ``(g . o) z``. What a narrow dtype rounds off
        o is as large as that difference where values have a mean, so o is computed anew there.
        """
        view = self.tokens(out)
        if out.dtype == matrices.dtype or not self.settings.normalized:
            return view
        products = self.buffer("outputs", matrices.shape[1])
        _inner(matrices, rows, out=products)
        return _shaped(products, view)[..., :-1].div_(self.tokens(denominators))

    def products_gradient(
        self, grad: Tensor, grad_denominators: Tensor | None, outputs: Tensor, denominators: Tensor
    ) -> Tensor:
        """The gradient of numerators and denominators, ``[T, n, d_v + 1]``, from that of ``o = n / den``.

        ``g / den`` that of n, ``-(g . o) / den`` that of den, and its own; ``outputs`` is the tile of o.
        """
        channels, view = grad.shape[-1], self.tokens(grad)
        products = self.buffer("products", channels + self.settings.normalized)
        numerators = _shaped(products, view)[..., :channels]
        if self.settings.normalized:
            torch.div(view, self.tokens(denominators), out=numerators)
            sums = (numerators * outputs).sum(-1, keepdim=True).neg_()
            if grad_denominators is not None:
                sums += self.tokens(grad_denominators)
            _shaped(products, view)[..., channels:] = sums
        else:
            numerators.copy_(view)
        return products

    def store_gradient(self, grad: Tensor, rows: _Rows, x: Tensor, out: Tensor) -> None:
        """Write the gradient of x, from that of its features ``[T, n, d]``."""
        view = self.tokens(out)
        grad, plain = _shaped(grad, view), _shaped(rows.plain, view)
        if rows.hidden is not None:
            grad.masked_fill_(rows.hidden, 0)
        feature_map_of(self.settings.feature_map).backward(grad, self.tokens(x), plain, view)


def _shaped(x: Tensor, view: Tensor) -> Tensor:
    """``[T, n, c]`` in the shape of a tile, ``[b, h, *counts, *shape, c]``."""
    return x.view(*view.shape[:-1], x.shape[-1])


class _Buffers:
    """Memory that tiles use in turn. The last column of ``values`` is 1."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._memory: dict[str, Tensor] = {}

    def __call__(self, name: str, blocks: int, tokens: int, width: int) -> Tensor:
        memory = self._memory.get(name)
        if memory is None or len(memory) < blocks * tokens:
            memory = torch.empty(blocks * tokens, width, device=self._device, dtype=self._dtype)
            if name == "values":
                memory[:, -1] = 1
            self._memory[name] = memory
        assert memory.shape[1] == width, "one width for each name"
        return memory[: blocks * tokens].view(blocks, tokens, width)
