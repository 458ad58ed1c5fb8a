"""The two halves of MHLA in operations of torch's core, for torch.func and exporters such as that of ONNX.

``torch.export`` keeps ``mhla::summarize`` and ``mhla::read`` whole (and ``mhla::window``, which runs on GPUs
alone), and so does torch.compile. What knows torch's own operators alone, ``torch.onnx.export(model, args,
dynamo=True)``, takes these in their place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._decomp import register_decomposition

from . import composite, window_operators
from .operators import joined, objects, reading
from .window_composite import softmax_of_scores


@register_decomposition(torch.ops.mhla.summarize.default)
def summarize(k: Tensor, v: Tensor, *settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`mhla_diffusion.ops.operators.summarize`; sums are in the matrices, no values are centred."""
    layout, features = objects(settings)
    centre = v.new_empty(*v.shape[:2], 0)
    matrices = composite.summarize(k, v, centre, layout, features)
    return matrices, matrices.new_empty(*matrices.shape[:3], 0), centre


@register_decomposition(torch.ops.mhla.read.default)
def read(
    q: Tensor, summaries: Tensor, sums: Tensor, centre: Tensor, mixing: Tensor, *settings: Any
) -> tuple[Tensor, Tensor]:
    """See :func:`mhla_diffusion.ops.operators.read`."""
    layout, features, dtype = reading(settings)
    mixing = mixing.to(torch.promote_types(summaries.dtype, torch.float32))
    if features.normalized and features.scaled:  # as composite.weights_of, but ONNX has no frexp
        largest = mixing.detach().abs().amax(-1, keepdim=True)
        largest = largest.masked_fill(largest == 0, 0.5).clamp_min(torch.finfo(mixing.dtype).tiny)
        mixing = mixing * torch.exp2(-1 - largest.log2().floor())
    return composite.read(q, joined(summaries, sums), centre, mixing, layout, features, dtype)


@register_decomposition(torch.ops.mhla.window.default)
def window(q: Tensor, k: Tensor, v: Tensor, *rest_and_settings: Any) -> tuple[Tensor, Tensor]:
    """Softmax windows from their scores; no logarithms of denominators, which a backward alone reads."""
    rest, mask, layout, margin = window_operators.objects(*rest_and_settings)
    out = softmax_of_scores(q, k, v, layout, mask, margin, rest)
    return out, out.new_empty(out.shape[:3])
