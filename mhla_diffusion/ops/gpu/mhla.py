"""GPU kernels for :mod:`mhla_diffusion.ops.tiled`: the same four functions, blocks gathered in registers.

Four kernels do almost everything (:mod:`mhla_diffusion.ops.gpu.kernels`):

- ``outer``, summaries of values and features: the forward of ``summarize``;
- ``inner``, products of features and summaries: the forward of ``read``;
- ``queries``, the gradient of q and, where registers hold it, that of the mixed summaries (up to 64 channels,
  in bfloat16, gradients too, at compute capability 9.0 up to 128 in one tile); ``outer`` finds it elsewhere;
- ``keys``, the gradients of k and v.

Small ones find the centre of values, what of W mixes summaries, and its gradient: an operation of torch for
each step would take the processor longer.

Mixing is a product of matrices and torch's, which is several times slower where sizes are no multiples of 8:
many blocks are filled up with empty ones. All sums are float32. What is multiplied is

- bfloat16 where q, k and v are: features and summaries are rounded to it, and summaries stored in it, with
  the sums of features apart, in float32. Without rotation the sums are products, too, by ones, and the
  denominators by the sums, each in three numbers of bfloat16;
- TF32 for float16, which it holds; features after rotation and summaries are rounded to it;
- float32 for float32, or TF32 where ``torch.backends.cuda.matmul.fp32_precision`` is "tf32".

Denominators are float32 throughout. Values that have a mean would make that rounding costly: gradients of q
and W are small differences. So values are centred where the output then only moves by as much, ``o(v - m) +
m = o(v)``: where there is a denominator and no rotation. Values of one give exactly one.

Head widths that are no power of two are padded to the next in registers (72, 80 and 88 without rotation to
64 and 16 or 32), and no more bytes are moved. No atomics: results do not change from run to run.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..composite import mix
from ..features import Features
from ..layout import BlockLayout
from ..norms import Norms
from ..tiled import new_gradient, new_outputs
from .launch import Launcher, holds_whole_rows, how_held, launch, parts_of, row_of_sums, target_of, tile_of

# Up to so many blocks, products of mixing are too short for their sizes to matter.
_FEW_BLOCKS = 64
# Tokens whose mean stands for that of all values, and what a program reads of them at a time. Fewer would
# leave a mean that is larger than most outputs where values have none. A program waits for memory once for
# each ROWS of them.
_SAMPLE = 2048
_CENTRE_TILE = {"ROWS": 512, "DV": 16, "num_warps": 8, "num_stages": 1}
_NONE = Norms()


def summarize(
    k: Tensor, v: Tensor, layout: BlockLayout, features: Features, norms: Norms = _NONE
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`mhla_diffusion.ops.tiled.summarize`; of keys behind their norm."""
    summaries, sums, centre = new_summaries(k, v, layout, features)
    if centre.shape[-1]:
        _centre(v, features.mask, out=centre)
    _outer(k, v, summaries, sums, layout, features, centre=centre, norms=norms)
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
    """See :func:`mhla_diffusion.ops.tiled.summarize_backward`."""
    grad, grad_sums = grad.contiguous(), grad_sums.contiguous()
    grad_k, grad_v = new_gradient(k), new_gradient(v)
    launch("keys", (k, v, grad_k, grad_v), grad, grad_sums, layout, features, centre=centre)
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
    norms: Norms = _NONE,
) -> tuple[Tensor, Tensor]:
    """See :func:`mhla_diffusion.ops.tiled.read`; of queries behind their norm, and behind what is to follow.

    Where a program holds no whole rows of outputs, as of many channels, torch norms and gates them.
    """
    outside = norms.out is not None and not holds_whole_rows(q, norms.out, summaries.dtype, features)
    kind = norms.dtype_between(dtype, normalized=features.normalized) if outside else dtype
    out, denominators = new_outputs(q, summaries, sums, features, kind)
    mixed, mixed_sums = _mix(_weights(mixing, summaries, sums, features), summaries, sums)
    launch(
        "inner", (q, out), mixed, mixed_sums, layout, features, centre=centre,
        den=denominators if features.normalized else None,
        saturate=kind == torch.float16 and not features.normalized,
        norm=norms.q, out_norm=None if outside else norms.out, gate=None if outside else norms.gate,
        norm_eps=norms.eps,
    )  # fmt: skip
    return norms.behind(out, dtype) if outside else out, denominators


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
    """See :func:`mhla_diffusion.ops.tiled.read_backward`; ``out`` is not read."""
    weights = _weights(mixing, summaries, sums, features)
    mixed, mixed_sums = _mix(weights, summaries, sums)
    grad_q, grad_mixed, grad_sums = new_gradient(q), torch.empty_like(mixed), torch.empty_like(mixed_sums)
    den = (denominators, grad_denominators) if features.normalized else (None, None)
    _queries_backward((q, grad, grad_q), (mixed, mixed_sums), (grad_mixed, grad_sums), den, layout, features)
    shape = weights.narrow.shape
    grad_weights = grad_mixed.flatten(3) @ summaries.flatten(3).mT  # [B, H, M_q, M_k]
    grad_weights = _summed(grad_weights, shape)
    more = _summed(grad_sums @ sums.mT, shape) if sums.shape[-1] else None
    grad_mixing = mixing.new_empty(mixing.shape)
    _launch_weights("weights_grad_kernel", mixing, features, grad_weights, more, grad_mixing)
    return grad_q, *_mix(_Weights(*(x.mT for x in weights)), grad_mixed, grad_sums), grad_mixing


def _summed(x: Tensor, shape: torch.Size) -> Tensor:
    """``[B, H, M_q, M_k]`` in the shape of W: in float32, or as it is where there is nothing to be summed."""
    return x.view(shape) if x.numel() == shape.numel() else x.float().sum_to_size(shape)


def _queries_backward(
    tokens: tuple[Tensor, Tensor, Tensor],
    mixed: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor],
    denominators: tuple[Tensor | None, Tensor | None],
    layout: BlockLayout,
    features: Features,
) -> None:
    """Gradients of queries and of their summaries: by one kernel, or by two where one would hold too much.

    ``denominators`` come with the gradient that they have of their own, if they have one.
    """
    q, grad, _ = tokens
    den, own_grad = (None if x is None else x.contiguous() for x in denominators)
    held = how_held(features.feature_map, turned=features.rotary is not None, normalized=features.normalized)
    options = tile_of(
        "queries", q.shape[-1], grad.shape[-1], q.dtype, grad.dtype, mixed[0].dtype, target_of(q, grad), *held
    )
    if options["FUSED"]:
        parts = parts_of("outer", q, layout)
        _add_up(
            *grads, parts,
            lambda matrices, sums: launch(
                "queries", tokens, *mixed, layout, features, den=den, own_grad=own_grad, parts=parts,
                matrix_grads=matrices, sum_grads=row_of_sums(matrices, sums),
            ),
        )  # fmt: skip
        return
    den_grad = None if den is None else torch.empty_like(den)
    launch(
        "queries", tokens, *mixed, layout, features, den=den, den_grad=den_grad, own_grad=own_grad,
        matrix_grads=None, sum_grads=None,
    )  # fmt: skip
    _outer(q, grad, *grads, layout, features, den=den, den_grad=den_grad)


def new_summaries(
    k: Tensor, v: Tensor, layout: BlockLayout, features: Features
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors as in :class:`mhla_diffusion.ops.operators.Summaries`.

    Bfloat16 keys and values have bfloat16 summaries with the sums apart.
    """
    shape, d, channels = (*k.shape[:2], _blocks(layout, features)), k.shape[-1], v.shape[-1]
    narrow = k.dtype == v.dtype == torch.bfloat16 and not features.shared
    apart = narrow and features.normalized
    centred = features.normalized and features.rotary is None and not features.shared
    dtype = torch.bfloat16 if narrow else torch.float32
    return (
        k.new_empty(*shape, channels + int(features.normalized and not apart), d, dtype=dtype),
        k.new_empty(*shape, d if apart else 0, dtype=torch.float32),
        k.new_empty(*k.shape[:2], channels if centred else 0, dtype=torch.float32),
    )


def _blocks(layout: BlockLayout, features: Features) -> int:
    """Number of summaries: that of the blocks, many filled up to a multiple of 8."""
    few = features.shared or layout.num_blocks <= _FEW_BLOCKS
    return layout.num_blocks if few else -(-layout.num_blocks // 8) * 8


class _Weights(NamedTuple):
    """W as it mixes summaries, ``[..., M_q, M_k]``, in their dtype, and their sums, in float32."""

    narrow: Tensor
    wide: Tensor


def _weights(mixing: Tensor, summaries: Tensor, sums: Tensor, features: Features) -> _Weights:
    """See :func:`mhla_diffusion.ops.composite.weights_of`; zero for, and of, blocks that only fill up."""
    rows, columns = mixing.shape[-2], summaries.shape[2]
    if rows > _FEW_BLOCKS and not features.shared:
        rows = -(-rows // 8) * 8
    shape = *mixing.shape[:-2], rows, columns
    narrow = mixing.new_empty(shape, dtype=summaries.dtype)
    wide = mixing.new_empty(shape, dtype=torch.float32) if sums.shape[-1] else None
    _launch_weights("weights_kernel", mixing, features, narrow, wide)
    return _Weights(narrow, narrow if wide is None else wide)


def _launch_weights(
    name: str, mixing: Tensor, features: Features, filled: Tensor, more: Tensor | None, *out: Tensor
) -> None:
    """Launch what reads W and one or two tensors ``[..., M_q, M_k]`` of blocks filled up."""
    launcher = _weights_launcher(
        name, mixing.shape, mixing.stride(), mixing.dtype, filled.shape, filled.dtype, more is not None,
        features.normalized and features.scaled, mixing.device,
    )  # fmt: skip
    launcher(mixing, filled, more, *out)


@functools.lru_cache(maxsize=256)
def _weights_launcher(
    name: str,
    shape: torch.Size,
    stride: tuple[int, ...],
    dtype: torch.dtype,
    filled: torch.Size,
    filled_dtype: torch.dtype,
    more: bool,
    scaled: bool,
    device: torch.device,
) -> Launcher:
    """For W of that kind on a device; each program takes a row."""
    *each, rows, width = filled
    columns = triton.next_power_of_2(width)
    numbers = dict(zip(("w_n", "w_m", "w_h", "w_b"), reversed((0, 0, *stride)), strict=False))
    numbers |= {
        "heads": each[-1] if each else 1, "rows": shape[-2], "columns": shape[-1], "filled": rows,
        "width": width, "COLUMNS": columns, "num_warps": 1 if columns <= 256 else 4,
    }  # fmt: skip
    return Launcher(name, math.prod(each) * rows, {**numbers, "SCALED": scaled, "MORE": more})


def _centre(v: Tensor, mask: Tensor | None, *, out: Tensor) -> None:
    """About the mean of the values that count, ``[B, H, d_v]``. Any other centre would be right, too."""
    launcher = _centre_launcher(
        v.shape, v.stride(), v.dtype, None if mask is None else (mask.stride(), mask.dtype), v.device
    )
    launcher(v, out, mask)


@functools.lru_cache(maxsize=256)
def _centre_launcher(
    shape: torch.Size,
    stride: tuple[int, ...],
    dtype: torch.dtype,
    mask: tuple[tuple[int, ...], torch.dtype] | None,
    device: torch.device,
) -> Launcher:
    """For values and a mask of that kind on a device."""
    batch, heads, tokens, channels = shape
    step = max(1, tokens // _SAMPLE) | 1  # odd, so that it meets every column of a grid of even width
    tiles = -(-channels // _CENTRE_TILE["DV"])
    numbers = dict(zip(("v_b", "v_h", "v_n", "v_d"), stride, strict=True))
    numbers |= dict(zip(("mask_b", "mask_n"), mask[0] if mask else (0, 0), strict=True))
    numbers |= {"heads": heads, "tokens": tokens, "step": step, "CHANNELS": channels, "TILES": tiles}
    arguments = {**numbers, "MASK": mask is not None, **_CENTRE_TILE}
    return Launcher("centre_kernel", batch * heads * tiles, arguments)


def _mix(weights: _Weights, summaries: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Summaries and sums of the query blocks, contiguous."""
    mixed = mix(weights.narrow, summaries).contiguous()
    if not sums.shape[-1]:
        return mixed, sums.new_empty(*mixed.shape[:3], 0)
    return mixed, (weights.wide @ sums).contiguous()


def _outer(
    x: Tensor,
    v: Tensor,
    summaries: Tensor,
    sums: Tensor,
    layout: BlockLayout,
    features: Features,
    *,
    centre: Tensor | None = None,
    den: Tensor | None = None,
    den_grad: Tensor | None = None,
    norms: Norms = _NONE,
) -> None:
    """Summaries of x, behind the norm of keys, and v."""
    parts = parts_of("outer", x, layout)
    _add_up(
        summaries, sums, parts,
        lambda each, each_sums: launch(
            "outer", (x, v), each, each_sums, layout, features, centre=centre, dtype=summaries.dtype,
            parts=parts, den=den, den_grad=den_grad, norm=norms.k, norm_eps=norms.eps,
        ),
    )  # fmt: skip


def _add_up(summaries: Tensor, sums: Tensor, parts: int, launch: Callable[[Tensor, Tensor], None]) -> None:
    """Launch what writes summaries, by several programs a block, and add up what each of them finds."""
    if parts == 1:
        launch(summaries, sums)
        return
    each, each_sums = (
        y.new_empty(*y.shape[:3], parts, *y.shape[3:], dtype=torch.float32) for y in (summaries, sums)
    )
    launch(each, each_sums)
    torch.sum(each_sums, 3, out=sums)
    if summaries.dtype == each.dtype:
        torch.sum(each, 3, out=summaries)
    else:
        summaries.copy_(each.sum(3))
