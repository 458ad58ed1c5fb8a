"""The two halves of MHLA as torch operators: differentiable, opaque to torch.compile, counted in FLOPs.

``mhla::summarize`` and ``mhla::read`` and their gradients; see :mod:`mhla_diffusion.ops.tiled` for what
they compute. What lies between them (an exchange between ranks, say) is ordinary autograd.

::

    k, v --summarize--> Summaries --read(q, mixing)--> out     tiled.py         on CPUs, float32 and wider
                                                               gpu/mhla.py      on GPUs
                                                               composite.py     gradients of gradients
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._decomp import decomposition_table, register_decomposition
from torch.utils.flop_counter import register_flop_formula

from . import composite, tiled
from .autocast import is_autocast, without_autocast
from .composite import weights_of
from .dispatch import implementation_for
from .features import Features
from .layout import BlockLayout
from .norms import Norms

_SETTINGS = (
    "Tensor? rotary, Tensor? mask, int[] grid, int[] blocks, int[]? extra, str feature_map, float eps, "
    "bool normalized, bool shared"
)
_NUM_SETTINGS = 9
# What came later, after all else and with a default: programs of torch.export are stored without it.
_SCALED = "bool scaled=True"


class Summaries(NamedTuple):
    """Summaries of keys and values.

    Args:
        matrices: ``[B, H, M, d_v + 1, d]``, the last row the sums of the features of keys; without
            denominators, or with sums apart, ``[B, H, M, d_v, d]``. In float32 or wider, or bfloat16. On GPUs
            more than 64 blocks are filled up to a multiple of 8 by summaries that are zero.
        sums: ``[B, H, M, d]`` where they are apart, which they are beside bfloat16; else ``[B, H, M, 0]``.
        centre: what was taken from the values, ``[B, H, d_v]``, and is to be added to the output; or
            ``[B, H, 0]``. It carries no gradient, as the output does not depend on it.
    """

    matrices: Tensor
    sums: Tensor
    centre: Tensor


def summarize(k: Tensor, v: Tensor, layout: BlockLayout, features: Features) -> Summaries:
    """Return the summaries of keys ``[B, H, N, d]`` and values ``[B, H, N, d_v]``."""
    return Summaries(*_summarize(k, v, *_as_arguments(layout, features)))


def read(
    q: Tensor,
    summaries: Summaries,
    mixing: Tensor,
    layout: BlockLayout,
    features: Features,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return the output ``[B, H, N, d_v]`` of queries on mixed summaries, and the denominators.

    These are ``[B, H, N, 1]`` in float32 or wider, of rows of W that are scaled, if ``features`` says so, and
    zero where a query sees no key; ``[B, H, N, 0]`` where there are none.

    Args:
        q: ``[B, H, N, d]``.
        summaries: of M_k blocks.
        mixing: ``[M, M_k]``, ``[H, M, M_k]`` or ``[B, H, M, M_k]``.
        layout: of the queries.
        dtype: of the output.
    """
    return _read(q, *summaries, mixing, *_as_arguments(layout, features), dtype, features.scaled)


def fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixing: Tensor,
    layout: BlockLayout,
    features: Features,
    norms: Norms,
    dtype: torch.dtype,
) -> Tensor:
    """Return ``read(q, summarize(k, v), mixing)`` with norms and gate around it, ``[B, H, N, d_v]``.

    On GPUs the kernels apply ``norms`` to what they hold. There is no gradient: that of norms and gate needs
    what is between them, which is never in memory here.

    Args:
        features: with the mask of the keys.
    """
    return _fused(q, k, v, mixing, *_as_arguments(layout, features), dtype, *norms)


def _as_arguments(layout: BlockLayout, features: Features) -> tuple[Any, ...]:
    """As arguments of an operator, which takes no objects."""
    return (
        features.rotary, features.mask, layout.grid, layout.blocks, layout.extra,
        features.feature_map, features.eps, features.normalized, features.shared,
    )  # fmt: skip


def objects(settings: tuple[Any, ...], *, scaled: bool = True) -> tuple[BlockLayout, Features]:
    """Return the objects of the last arguments of an operator."""
    rotary, mask, grid, blocks, extra, feature_map, eps, normalized, shared = settings
    layout = layout_of(tuple(grid), tuple(blocks), None if extra is None else tuple(extra))
    return layout, Features(feature_map, eps, normalized, rotary, mask, shared, scaled)


def reading(settings: tuple[Any, ...]) -> tuple[BlockLayout, Features, torch.dtype]:
    """Return the objects of the last arguments of ``read``; torch leaves out what is at its default."""
    dtype, *scaled = settings[_NUM_SETTINGS:]
    return *objects(settings[:_NUM_SETTINGS], scaled=all(scaled)), dtype


@functools.lru_cache(maxsize=256)
def layout_of(
    grid: tuple[int, ...], blocks: tuple[int, ...], extra: tuple[int, int] | None = None
) -> BlockLayout:
    """Return a layout; the same one for the same arguments."""
    return BlockLayout(grid, blocks, extra)


class _Operator:
    """An operator of torch, which runs on the device of its tensors, and without autocast: sums are float32.

    Torch is called where anything looks on: compilers, exporters, counters of FLOPs. In the transforms of
    torch.func what it is made of takes its place, see :mod:`.decompositions`. Other calls go straight to the
    function: the layers of torch take a processor longer than all launches.
    """

    def __init__(self, name: str, schema: str, function: Callable[..., Any]) -> None:
        self._function = function
        self.registered = torch.library.custom_op(f"mhla::{name}", self.run, mutates_args=(), schema=schema)
        self._differentiable: Any = None
        self._overload = getattr(torch.ops.mhla, name).default

    def __call__(self, *args: Any) -> Any:
        if in_transform() and self._overload in decomposition_table:
            with without_autocast(args[0]):
                return decomposition_table[self._overload](*args)
        if is_watched(args):
            return self.registered(*args)
        if self._differentiable is not None and torch.is_grad_enabled():
            return self._differentiable.apply(*args)
        return self.run(*args)

    def run(self, *args: Any) -> Any:
        """Compute without a gradient."""
        device = args[0].device
        if is_autocast(args[0]):
            with without_autocast(args[0]):
                return self.run(*args)
        # Triton launches on the current device, not that of its tensors.
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self._function(*args)
        return self._function(*args)

    def register_fake(self, function: Callable[..., Any]) -> None:
        """Take a function that makes the outputs without numbers, for torch.compile and the meta device."""
        self.registered.register_fake(function)
        # Where sizes are symbols, what stands in no such table is made by decompositions, in another order in
        # memory than the function's.
        register_decomposition(self._overload, type="meta")(function)

    def register_autograd(self, save: Callable[..., None], gradient: Callable[..., Any]) -> None:
        """Take what ``save(ctx, inputs, output)`` keeps for ``gradient(ctx, *grads)``."""

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *args: Any) -> Any:
                output = self.run(*args)
                save(ctx, args, output)
                return output

            backward = staticmethod(gradient)

        self._differentiable = Function
        self.registered.register_autograd(gradient, setup_context=save)


_PLAIN = {Tensor, torch.nn.Parameter, type(None), torch.dtype, tuple, list, str, float, int, bool}


def in_transform() -> bool:
    """Return True inside torch.func (grad, jvp, vmap), which takes no operator with a gradient of its own."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def is_watched(args: tuple[Any, ...]) -> bool:
    """Return True where a call has to pass through torch: tensors that stand for others are no plain ones."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch.jit.is_tracing()
        or args[0].is_meta
        or not _PLAIN.issuperset(map(type, args))
    )


def operator(name: str, schema: str) -> Callable[[Callable[..., Any]], _Operator]:
    return functools.partial(_Operator, name, schema)


@operator("summarize", f"(Tensor k, Tensor v, {_SETTINGS}) -> (Tensor, Tensor, Tensor)")
def _summarize(k: Tensor, v: Tensor, *settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    return implementation_for(k, v).summarize(k, v, *objects(settings))


@operator(
    "summarize_backward",
    f"(Tensor grad, Tensor grad_sums, Tensor k, Tensor v, Tensor centre, {_SETTINGS}) -> (Tensor, Tensor)",
)
def _summarize_backward(
    grad: Tensor, grad_sums: Tensor, k: Tensor, v: Tensor, centre: Tensor, *settings: Any
) -> tuple[Tensor, Tensor]:
    implementation = implementation_for(k, v)
    return implementation.summarize_backward(grad, grad_sums, k, v, centre, *objects(settings))


@operator(
    "read",
    "(Tensor q, Tensor summaries, Tensor sums, Tensor centre, Tensor mixing, "
    f"{_SETTINGS}, ScalarType dtype, {_SCALED}) -> (Tensor, Tensor)",
)
def _read(
    q: Tensor, summaries: Tensor, sums: Tensor, centre: Tensor, mixing: Tensor, *settings: Any
) -> tuple[Tensor, Tensor]:
    implementation = implementation_for(q, summaries)
    return implementation.read(q, summaries, sums, centre, mixing, *reading(settings))


@operator(
    "read_backward",
    "(Tensor grad, Tensor out, Tensor denominators, Tensor q, Tensor summaries, Tensor sums, "
    f"Tensor mixing, {_SETTINGS}, {_SCALED}, Tensor? grad_denominators=None) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
)
def _read_backward(
    grad: Tensor,
    out: Tensor,
    denominators: Tensor,
    q: Tensor,
    summaries: Tensor,
    sums: Tensor,
    mixing: Tensor,
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    later = dict(zip(("scaled", "grad_denominators"), settings[_NUM_SETTINGS:], strict=False))
    grad_denominators = later.pop("grad_denominators", None)
    return implementation_for(q, summaries).read_backward(
        grad, grad_denominators, out, denominators, q, summaries, sums, mixing,
        *objects(settings[:_NUM_SETTINGS], **later),
    )  # fmt: skip


@operator(
    "fused",
    f"(Tensor q, Tensor k, Tensor v, Tensor mixing, {_SETTINGS}, ScalarType dtype, "
    "Tensor? q_norm, Tensor? k_norm, Tensor? out_norm, Tensor? gate, float norm_eps) -> Tensor",
)
def _fused(q: Tensor, k: Tensor, v: Tensor, mixing: Tensor, *settings: Any) -> Tensor:
    layout, keys, dtype = reading(settings[: _NUM_SETTINGS + 1])
    features = dataclasses.replace(keys, mask=None)
    norms, implementation = Norms(*settings[_NUM_SETTINGS + 1 :]), implementation_for(q, k, v)
    if implementation is tiled:  # as where a program that was made for a GPU runs on another device
        (q, k), between = norms.before(q, k), norms.dtype_between(dtype, normalized=features.normalized)
        out, _ = tiled.read(q, *tiled.summarize(k, v, layout, keys), mixing, layout, features, between)
        return norms.behind(out, dtype)
    summaries = implementation.summarize(k, v, layout, keys, norms)
    return implementation.read(q, *summaries, mixing, layout, features, dtype, norms)[0]


# Shapes and strides without numbers, for torch.compile and the meta device.


@_summarize.register_fake
def _(k: Tensor, v: Tensor, *settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    return implementation_for(k, v).new_summaries(k, v, *objects(settings))


@_summarize_backward.register_fake
def _(
    grad: Tensor, grad_sums: Tensor, k: Tensor, v: Tensor, centre: Tensor, *settings: Any
) -> tuple[Tensor, Tensor]:
    return tiled.new_gradient(k), tiled.new_gradient(v)


@_read.register_fake
def _(
    q: Tensor, summaries: Tensor, sums: Tensor, centre: Tensor, mixing: Tensor, *settings: Any
) -> tuple[Tensor, Tensor]:
    _, features, dtype = reading(settings)
    return tiled.new_outputs(q, summaries, sums, features, dtype)


@_read_backward.register_fake
def _(
    grad: Tensor,
    out: Tensor,
    denominators: Tensor,
    q: Tensor,
    summaries: Tensor,
    sums: Tensor,
    mixing: Tensor,
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_summaries, grad_sums, grad_mixing = (x.new_empty(x.shape) for x in (summaries, sums, mixing))
    return tiled.new_gradient(q), grad_summaries, grad_sums, grad_mixing


@_fused.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mixing: Tensor, *settings: Any) -> Tensor:
    return tiled.empty_in_order_of(q, v.shape[-1], settings[_NUM_SETTINGS])


def _save_keys(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)  # it would make one of what has none, too
    ctx.save_for_backward(output[2], *inputs[:4])
    ctx.settings, ctx.outputs = inputs[4:], [(x.shape, x.dtype) for x in output[:2]]


def _keys_backward(ctx: Any, *grads_or_none: Tensor | None) -> tuple[Tensor | None, ...]:
    centre, k, v, *tables = ctx.saved_tensors
    grad, grad_sums = (
        k.new_zeros(shape, dtype=dtype) if x is None else x
        for x, (shape, dtype) in zip(grads_or_none, ctx.outputs, strict=False)
    )
    settings = (*tables, *ctx.settings)
    if torch.is_grad_enabled():  # a gradient of this gradient is wanted
        its = objects(settings)
        grad = joined(grad, grad_sums)[:, :, : its[0].num_blocks]
        grads = differentiate(lambda k, v: composite.summarize(k, v, centre, *its), (k, v), grad)
    else:
        grads = _summarize_backward(grad, grad_sums, k, v, centre, *settings)
    return *grads, *[None] * len(settings)


def _save_queries(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    if not output[1].shape[-1]:
        ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *inputs[:7])
    ctx.settings = inputs[7:]


def _queries_backward(
    ctx: Any, grad: Tensor | None, grad_denominators: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad is None and grad_denominators is None:  # nothing was made of the outputs
        return (None,) * (len(ctx.saved_tensors) - 2 + len(ctx.settings))
    out, denominators, q, summaries, sums, centre, mixing, *tables = ctx.saved_tensors
    layout, features, dtype = reading((*tables, *ctx.settings))
    grad = torch.zeros_like(out) if grad is None else grad
    if torch.is_grad_enabled():
        given = [grad] if grad_denominators is None else [grad, grad_denominators]

        def again(q: Tensor, summaries: Tensor, sums: Tensor, mixing: Tensor) -> tuple[Tensor, ...]:
            whole = joined(summaries, sums)[:, :, : mixing.shape[-1]]
            weights, _ = weights_of(mixing, summaries.dtype, features)
            return composite.read(q, whole, centre, weights, layout, features, dtype)[: len(given)]

        grads = differentiate(again, (q, summaries, sums, mixing), given)
    else:
        grads = _read_backward(
            grad, out, denominators, q, summaries, sums, mixing, *_as_arguments(layout, features),
            features.scaled, grad_denominators,
        )  # fmt: skip
    grad_q, grad_summaries, grad_sums, grad_mixing = grads
    return grad_q, grad_summaries, grad_sums, None, grad_mixing, *[None] * (2 + len(ctx.settings))


_summarize.register_autograd(_save_keys, _keys_backward)
_read.register_autograd(_save_queries, _queries_backward)


def joined(matrices: Tensor, sums: Tensor) -> Tensor:
    """Summaries, or gradients of them, with the sums in the last row, in float32 or wider."""
    matrices = matrices.to(torch.promote_types(matrices.dtype, torch.float32))
    return torch.cat((matrices, sums[..., None, :]), -2) if sums.shape[-1] else matrices


def differentiate(
    function: Callable[..., Any], tensors: tuple[Tensor, ...], grads: Tensor | list[Tensor]
) -> tuple[Tensor, ...]:
    # Views, as one of these may depend on another, or be the same: a gradient is of its own place alone.
    tensors = tuple(x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in tensors)
    outputs = function(*tensors)
    found = torch.autograd.grad(outputs, tensors, grads, create_graph=True, materialize_grads=True)
    return tuple(found)


def _flops(queries_or_keys: Any, summaries: Any, sums: Any) -> int:
    batch, heads, tokens, d = queries_or_keys
    return 2 * batch * heads * tokens * d * _height(summaries, sums)


def _height(summaries: Any, sums: Any) -> int:
    """Rows of the summaries, with that of the sums."""
    return summaries[-2] + bool(sums[-1])


def _mixing_flops(summaries: Any, sums: Any, mixing: Any) -> int:
    return 2 * math.prod(summaries[:3]) * _height(summaries, sums) * summaries[-1] * mixing[-2]


@register_flop_formula(torch.ops.mhla.summarize)
def _(k: Any, v: Any, *settings: Any, out_shape: Any, **_: Any) -> int:
    return _flops(k, *out_shape[:2])


@register_flop_formula(torch.ops.mhla.summarize_backward)
def _(grad: Any, grad_sums: Any, k: Any, *settings: Any, **_: Any) -> int:
    return 2 * _flops(k, grad, grad_sums)


@register_flop_formula(torch.ops.mhla.read)
def _(q: Any, summaries: Any, sums: Any, centre: Any, mixing: Any, *settings: Any, **_: Any) -> int:
    return _flops(q, summaries, sums) + _mixing_flops(summaries, sums, mixing)


@register_flop_formula(torch.ops.mhla.fused)
def _(q: Any, k: Any, v: Any, mixing: Any, *settings: Any, **_: Any) -> int:
    normalized = settings[_NUM_SETTINGS - 2]
    summaries = *q[:2], mixing[-1], v[-1] + normalized, q[-1]
    return 2 * _flops(q, summaries, (0,)) + _mixing_flops(summaries, (0,), mixing)


@register_flop_formula(torch.ops.mhla.read_backward)
def _(
    grad: Any, out: Any, den: Any, q: Any, summaries: Any, sums: Any, mixing: Any, *_: Any, **__: Any
) -> int:
    # Summaries are mixed again, and there is a gradient of them and one of W.
    return 2 * _flops(q, summaries, sums) + 3 * _mixing_flops(summaries, sums, mixing)
