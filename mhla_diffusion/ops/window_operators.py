"""Softmax windows in GPU kernels as operators of torch: ``mhla::window`` and its gradient."""

from __future__ import annotations

import functools
from operator import index
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .dispatch import has_kernels
from .layout import BlockLayout, Margin
from .operators import differentiate, layout_of, operator
from .tiled import empty_in_order_of, new_gradient
from .window_composite import softmax_of_scores

_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor? far, Tensor? log_sums, Tensor? mask"
_SETTINGS = "int[] grid, int[] blocks, int[] margin"


# Channels of a head that registers have room for.
_WIDEST = 128


def is_fused(*tensors: Tensor) -> bool:
    """Return True where the kernels take these q, k and v.

    Raises:
        ValueError: where the environment asks for what cannot be, see :func:`.dispatch.has_kernels`.
    """
    kinds = [(x.dtype, index(x.shape[-1])) for x in tensors]  # no symbol of torch.compile's
    return has_kernels(tensors[0].device, *kinds) and max(width for _, width in kinds) <= _WIDEST


def fused_window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    key_mask: Tensor | None,
    margin: Margin,
    rest: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Return the output of :func:`mhla_diffusion.ops.window_attention` on a grid without extra tokens."""
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in (q, k, v)))
    far, log_sums = (None, None) if rest is None else rest
    tensors = (*(x.to(dtype) for x in (q, k, v)), far, log_sums, key_mask)
    return _window(*tensors, layout.grid, layout.blocks, layout.margins(margin))[0]


@functools.cache
def _kernels() -> ModuleType:
    from .gpu import window

    return window


def objects(
    far: Tensor | None, log_sums: Tensor | None, mask: Tensor | None, *settings: Any
) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None, BlockLayout, tuple[int, ...]]:
    """Return the last arguments of the operators as functions take them: rest, mask, layout, margin."""
    grid, blocks, margin = map(tuple, settings)
    rest = None if far is None or log_sums is None else (far, log_sums)
    return rest, mask, layout_of(grid, blocks), margin


@operator("window", f"({_TENSORS}, {_SETTINGS}) -> (Tensor, Tensor)")
def _window(q: Tensor, k: Tensor, v: Tensor, *rest_and_settings: Any) -> tuple[Tensor, Tensor]:
    return _kernels().forward(q, k, v, *objects(*rest_and_settings))


@operator(
    "window_backward",
    f"(Tensor grad, Tensor out, Tensor log_den, {_TENSORS}, {_SETTINGS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _window_backward(
    grad: Tensor, out: Tensor, log_den: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest_and_settings: Any
) -> tuple[Tensor, ...]:
    grads = _kernels().backward(grad, out, log_den, q, k, v, *objects(*rest_and_settings))
    return tuple(q.new_empty(0) if x is None else x for x in grads)


@_window.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest_and_settings: Any) -> tuple[Tensor, Tensor]:
    out = empty_in_order_of(q, v.shape[-1], torch.float32)
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


@_window_backward.register_fake
def _(
    grad: Tensor,
    out: Tensor,
    log_den: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    far: Tensor | None,
    *others: Any,
) -> tuple[Tensor, ...]:
    grads = tuple(new_gradient(x) for x in (q, k, v))
    if far is None:
        return *grads, q.new_empty(0), q.new_empty(0)
    return *grads, new_gradient(far), q.new_empty(q.shape[:3], dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *inputs[:6])
    ctx.settings = inputs[6:]


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:  # nothing was made of the output
        return (None,) * (6 + len(ctx.settings))
    out, log_den, *tensors = ctx.saved_tensors
    *differentiated, mask = tensors
    if torch.is_grad_enabled():  # a gradient of this gradient is wanted
        present = tuple(x for x in differentiated if x is not None)

        def again(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
            others, _, layout, margin = objects(*(rest or (None, None)), mask, *ctx.settings)
            return softmax_of_scores(q, k, v, layout, mask, margin, others)

        grads = differentiate(again, present, grad)
    else:
        grads = _window_backward(grad, out, log_den, *tensors, *ctx.settings)
    dfar, dlog_sums = (None, None) if differentiated[3] is None else grads[3:]
    if dlog_sums is not None:
        dlog_sums = dlog_sums.to(differentiated[4].dtype)
    return *grads[:3], dfar, dlog_sums, *[None] * (1 + len(ctx.settings))


_window.register_autograd(_save, _backward)


def _products(q: Any, v: Any, *settings: Any) -> int:
    """Multiplications of scores and of the output, each counted with its addition."""
    layout = BlockLayout(*settings[:2])
    batch, heads, tokens, d = q
    return 2 * batch * heads * tokens * layout.reach_size(settings[2]) * (d + v[-1])


@register_flop_formula(torch.ops.mhla.window)
def _(q: Any, k: Any, v: Any, far: Any, log_sums: Any, mask: Any, *settings: Any, **_: Any) -> int:
    return _products(q, v, *map(tuple, settings))


@register_flop_formula(torch.ops.mhla.window_backward)
def _(grad: Any, out: Any, log_den: Any, q: Any, k: Any, v: Any, *others: Any, **_: Any) -> int:
    # The scores again and four gradients, as torch counts the backward of its own attention.
    return _products(q, v, *map(tuple, others[3:])) * 5 // 2
