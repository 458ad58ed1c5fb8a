"""MHLA over ranks that exchange the tokens of all heads for some heads of all tokens, and back."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .ops.exchange import Exchange
from .ops.features import RotaryEmbedding, turn_all

_Module = TypeVar("_Module", bound=nn.Module)


def attend_by_heads(
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    extra: tuple[int, int] | None,
    rotary_emb: RotaryEmbedding | None,
    key_mask: Tensor | None,
    group: dist.ProcessGroup,
    **grids: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend with some heads of a :class:`mhla_diffusion.MHLA` to the tokens of all ranks.

    Takes and returns what :meth:`mhla_diffusion.MHLA.attend` does, of the tokens of this rank. Gradients of
    weights are the part of this rank's heads: add them up over the group.

    Raises:
        ValueError: when the ranks do not divide the heads, and for hooks on parts that are sliced.
    """
    exchange = Exchange.of(group, k.shape[2], k.device, masked=key_mask is not None)
    heads = exchange.heads(q.shape[1])
    order, number = exchange.grid_first(extra, k.device)
    tensors = exchange.to_heads(torch.cat((q, k, v), -1)).index_select(2, order)
    if rotary_emb is not None:
        tables = (exchange.all_tokens(x, -2) for x in turn_all(rotary_emb, k.shape[2], extra))
        cos, sin = (x.index_select(-2, order) for x in tables)
        each = (..., heads, slice(None), slice(None)) if cos.ndim > 2 and cos.shape[-3] > 1 else ...
        rotary_emb = cos[each], sin[each]
    if exchange.masked:  # as bytes: not every backend sends booleans
        own = key_mask.byte() if key_mask is not None else k.new_ones(len(k), k.shape[2], dtype=torch.uint8)
        key_mask = exchange.all_tokens(own, 1).bool().index_select(1, order)
    parts = tensors.split([x.shape[-1] for x in (q, k, v)], -1)
    found = _of_heads(module, heads).attend(
        *(part.to(x.dtype) for part, x in zip(parts, (q, k, v), strict=True)),
        extra=None if extra is None else (0, number), rotary_emb=rotary_emb, key_mask=key_mask, **grids,
    )  # fmt: skip
    there = [x for x in found if x is not None]
    together = exchange.to_tokens(torch.cat(there, -1).index_select(2, order.argsort()))
    out, *beside = together.split([x.shape[-1] for x in there], -1)
    return out, beside[0] if beside else None


def _of_heads(module: Any, heads: slice) -> Any:
    """Some heads of an MHLA: a module with slices of its weights, through which gradients reach these."""
    part = _with_slices(module, heads, () if module.config.mixing_per_head else ("mixing",))
    channels = slice(heads.start * module.head_dim, heads.stop * module.head_dim)
    convolutions = ("conv_q", "conv_k", "cpe")
    shares = {"feature_q": heads, "feature_k": heads} | dict.fromkeys(convolutions, channels)
    part._modules = {
        name: _with_slices(child, shares[name]) if name in shares and child is not None else child
        for name, child in module._modules.items()
    }
    for conv in (getattr(part, name) for name in convolutions):
        if conv is not None:
            conv.groups = channels.stop - channels.start
    return part


def _with_slices(module: _Module, share: slice, whole: tuple[str, ...] = ()) -> _Module:
    """A module whose parameters, but the whole ones, are slices along their first axis.

    Raises:
        ValueError: for one with a hook in place of its forward, which would go on with all heads.
    """
    if "forward" in module.__dict__:
        raise ValueError(
            f"a hook on {type(module).__name__} (offloading, layerwise casting) sees all heads, of which a "
            "rank has a share where ranks exchange tokens: leave hooks on parts of MHLA layers out, or "
            "convolutions and learned features"
        )
    part = object.__new__(type(module))
    part.__dict__.update(module.__dict__)
    part._parameters = {
        name: value if value is None or name in whole else value[share]  # type: ignore[misc]
        for name, value in module._parameters.items()
    }
    return part
