"""The two halves of MHLA as torch operators: differentiable, opaque to torch.compile, counted in FLOPs.

``mhla::summarize`` and ``mhla::read`` and their gradients; see :mod:`mhla_diffusion.ops.tiled` for what
they compute. What lies between them (an exchange between ranks, say) is ordinary autograd.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import composite, tiled
from .dispatch import implementation_for
from .features import Features
from .layout import BlockLayout

_SETTINGS = (
    "Tensor? rotary, Tensor? mask, int[] grid, int[] blocks, str feature_map, float eps, bool normalized"
)


def summarize(k: Tensor, v: Tensor, layout: BlockLayout, features: Features) -> Tensor:
    """Key/value summaries, ``[B, H, M, d_v + 1, d]`` (without denominators ``d_v``), in float32 or wider."""
    return _summarize(k, v, *_as_arguments(layout, features))


def read(
    q: Tensor, summaries: Tensor, mixing: Tensor, layout: BlockLayout, features: Features, dtype: torch.dtype
) -> Tensor:
    """The output ``[B, H, N, d_v]`` of queries on mixed summaries.

    Args:
        q: ``[B, H, N, d]``.
        summaries: ``[B, H, M_k, d_v + 1, d]``.
        mixing: ``[M, M_k]`` or ``[H, M, M_k]``.
        layout: of the queries.
        dtype: of the output.
    """
    mixing = mixing.to(summaries.dtype)
    if features.normalized:
        mixing = mixing * _row_scale(mixing.detach())
    return _read(q, summaries, mixing, *_as_arguments(layout, features), dtype)[0]


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors in the dtype of autocast where it is on, as ``F.scaled_dot_product_attention`` takes them.

    Norms give float32 there: queries and keys would be wider than values, and products slow on a GPU.
    """
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _row_scale(mixing: Tensor) -> Tensor:
    """Powers of two ``[..., M, 1]`` that bring the largest weight of each row to between 1/2 and 1.

    A quotient does not see them, and no bit of it changes; but with tiny weights numerators and denominators
    would leave the range of float32.
    """
    largest = torch.linalg.vector_norm(mixing, torch.inf, -1, keepdim=True)
    largest = largest.clamp_min(torch.finfo(mixing.dtype).tiny)
    return torch.frexp(largest).mantissa / largest


def _as_arguments(layout: BlockLayout, features: Features) -> tuple[Any, ...]:
    """As arguments of an operator, which takes no objects."""
    return (
        features.rotary, features.mask, layout.grid, layout.blocks,
        features.feature_map, features.eps, features.normalized,
    )  # fmt: skip


def _objects(settings: tuple[Any, ...]) -> tuple[BlockLayout, Features]:
    rotary, mask, grid, blocks, feature_map, eps, normalized = settings
    layout = _layout(tuple(grid), tuple(blocks))
    return layout, Features(feature_map, eps, normalized, rotary, mask)


@functools.lru_cache(maxsize=256)
def _layout(grid: tuple[int, ...], blocks: tuple[int, ...]) -> BlockLayout:
    return BlockLayout(grid, blocks)


def _operator(name: str, schema: str) -> Callable[[Callable[..., Any]], Any]:
    """Register an operator. Autocast is off inside: sums are float32 at least."""

    def register(function: Callable[..., Any]) -> Any:
        @functools.wraps(function)
        def run(*args: Any) -> Any:
            device = args[0].device.type
            if not torch.is_autocast_enabled(device):
                return function(*args)
            with torch.autocast(device, enabled=False):
                return function(*args)

        return torch.library.custom_op(f"mhla::{name}", run, mutates_args=(), schema=schema)

    return register


@_operator("summarize", f"(Tensor k, Tensor v, {_SETTINGS}) -> Tensor")
def _summarize(k: Tensor, v: Tensor, *settings: Any) -> Tensor:
    return implementation_for(k, v).summarize(k, v, *_objects(settings))


@_operator("summarize_backward", f"(Tensor grad, Tensor k, Tensor v, {_SETTINGS}) -> (Tensor, Tensor)")
def _summarize_backward(grad: Tensor, k: Tensor, v: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    return implementation_for(k, v).summarize_backward(grad, k, v, *_objects(settings))


@_operator(
    "read",
    f"(Tensor q, Tensor summaries, Tensor mixing, {_SETTINGS}, ScalarType dtype) -> (Tensor, Tensor)",
)
def _read(q: Tensor, summaries: Tensor, mixing: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    return implementation_for(q, summaries).read(q, summaries, mixing, *_objects(settings[:-1]), settings[-1])


@_operator(
    "read_backward",
    "(Tensor grad, Tensor out, Tensor denominators, Tensor q, Tensor summaries, Tensor mixing, "
    f"{_SETTINGS}) -> (Tensor, Tensor, Tensor)",
)
def _read_backward(
    grad: Tensor,
    out: Tensor,
    denominators: Tensor,
    q: Tensor,
    summaries: Tensor,
    mixing: Tensor,
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return implementation_for(q, summaries).read_backward(
        grad, out, denominators, q, summaries, mixing, *_objects(settings)
    )


# Shapes and strides without numbers, for torch.compile and the meta device.


@_summarize.register_fake
def _(k: Tensor, v: Tensor, *settings: Any) -> Tensor:
    return tiled.new_summaries(k, v, *_objects(settings))


@_summarize_backward.register_fake
def _(grad: Tensor, k: Tensor, v: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(k), torch.empty_like(v)


@_read.register_fake
def _(q: Tensor, summaries: Tensor, mixing: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    return tiled.new_outputs(q, summaries, _objects(settings[:-1])[1], settings[-1])


@_read_backward.register_fake
def _(
    grad: Tensor,
    out: Tensor,
    denominators: Tensor,
    q: Tensor,
    summaries: Tensor,
    mixing: Tensor,
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), summaries.new_empty(summaries.shape), mixing.new_empty(mixing.shape)


def _save_keys(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.settings = inputs[4:]


def _keys_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    k, v, *tables = ctx.saved_tensors
    settings = (*tables, *ctx.settings)
    if torch.is_grad_enabled():  # a gradient of this gradient is wanted
        grads = _differentiate(composite.summarize, (k, v), _objects(settings), (), grad)
    else:
        grads = _summarize_backward(grad, k, v, *settings)
    return *grads, *[None] * len(settings)


def _save_queries(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, *inputs[:5])
    ctx.settings = inputs[5:]


def _queries_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    out, denominators, q, summaries, mixing, *tables = ctx.saved_tensors
    settings, dtype = (*tables, *ctx.settings[:-1]), ctx.settings[-1]
    if torch.is_grad_enabled():
        grads = _differentiate(composite.read, (q, summaries, mixing), _objects(settings), (dtype,), grad)
    else:
        grads = _read_backward(grad, out, denominators, q, summaries, mixing, *settings)
    return *grads, *[None] * len(settings), None


_summarize.register_autograd(_keys_backward, setup_context=_save_keys)
_read.register_autograd(_queries_backward, setup_context=_save_queries)


def _differentiate(
    function: Callable[..., Tensor],
    tensors: tuple[Tensor, ...],
    objects: tuple[BlockLayout, Features],
    options: tuple[Any, ...],
    grad: Tensor,
) -> tuple[Tensor, ...]:
    tensors = tuple(x if x.requires_grad else x.detach().requires_grad_() for x in tensors)
    return torch.autograd.grad(function(*tensors, *objects, *options), tensors, grad, create_graph=True)


def _flops(queries_or_keys: Any, height: int) -> int:
    batch, heads, tokens, d = queries_or_keys
    return 2 * batch * heads * tokens * d * height


@register_flop_formula(torch.ops.mhla.summarize)
def _(k: Any, v: Any, *settings: Any, out_shape: Any, **_: Any) -> int:
    return _flops(k, out_shape[-2])


@register_flop_formula(torch.ops.mhla.summarize_backward)
def _(grad: Any, k: Any, *settings: Any, **_: Any) -> int:
    return 2 * _flops(k, grad[-2])


@register_flop_formula(torch.ops.mhla.read)
def _(q: Any, summaries: Any, mixing: Any, *settings: Any, **_: Any) -> int:
    return _flops(q, summaries[-2]) + _mixing_flops(summaries, mixing)


@register_flop_formula(torch.ops.mhla.read_backward)
def _(grad: Any, out: Any, den: Any, q: Any, summaries: Any, mixing: Any, *settings: Any, **_: Any) -> int:
    # Summaries are mixed again, and there is a gradient of them and one of W.
    return 2 * _flops(q, summaries[-2]) + 3 * _mixing_flops(summaries, mixing)


def _mixing_flops(summaries: Any, mixing: Any) -> int:
    return 2 * math.prod(summaries) * mixing[-2]
