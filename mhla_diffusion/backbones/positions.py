"""Rotary tables as layers of diffusers are given them, in the one form that MHLA reads."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from ..ops.features import RotaryEmbedding
from ..ops.operators import is_watched
from ..ops.rotary import rotary_table

# Of the first tensor that a model gave: what it gave beside it and to which layers, and the pairs.
_kept: Any = WeakTensorKeyDictionary()


def shared_pairs(rotary_emb: Any, attn: Any) -> RotaryEmbedding:
    """:func:`rotary_pairs`, found once for all layers that a model gives the same tensors.

    They are views of one table, which the operator reads as it lies and training saves once. It is kept for
    as long as these tensors live, which in most models is a forward. What is written to them has to be seen
    by autograd, or to move them.
    """
    leaves = tree_leaves(rotary_emb)
    given = [x for x in leaves if isinstance(x, Tensor)]
    if not _may_be_kept(given):
        return rotary_pairs(rotary_emb, attn)
    first, *rest = given
    layer = attn.heads, attn.inner_dim, getattr(attn, "rotary_halves", 0)
    state = [(x.data_ptr(), x._version, x.shape, x.stride(), x.dtype, x.is_neg(), x.is_conj()) for x in given]
    numbers = [x for x in leaves if not isinstance(x, Tensor)]
    key = layer, state, numbers, torch.cuda.current_stream(first.device) if first.is_cuda else None
    found = _kept.get(first)
    if found is not None and found[0] == key and all(x() is y for x, y in zip(found[1], rest, strict=True)):
        return found[2]
    with torch.inference_mode(False):  # what is kept may be needed in training later
        table = rotary_table(rotary_pairs(rotary_emb, attn))
        assert table is not None
        pairs = table[..., 0::2], table[..., 1::2]
    _kept[first] = key, [weakref.ref(x) for x in rest], pairs
    return pairs


def _may_be_kept(given: list[Tensor]) -> bool:
    """Whether tensors say when they are written to, and the next layer has a use for what is made of them.

    Compilers see themselves that layers compute the same, and a CUDA graph would read what is kept after it
    is gone.
    """
    if is_watched(tuple(given)) or any(x.is_inference() or x.requires_grad for x in given):
        return False
    return not (given[0].is_cuda and torch.cuda.is_current_stream_capturing())


def rotary_pairs(rotary_emb: Any, attn: Any) -> RotaryEmbedding:
    """Cosines and sines ``[..., N, d / 2]`` of the rotary tables that a layer of diffusers is given.

    Those are cosines and sines of each pair, ``[N, d / 2]``; each of them twice, ``[N, d]`` or (Wan)
    ``[1, N, 1, d]``; for each head its own, ``[B, N, H d]`` (LTX); complex numbers ``[..., N, d / 2]``, also
    in a dict (AnyFlow), or a pair of them of an image and a text, of which the text then comes first
    (Qwen-Image); rotations ``[B, N, 1, d / 2, 2, 2]`` (Kandinsky); or tables of each axis and positions in
    them (Allegro).
    """
    if isinstance(rotary_emb, dict):
        rotary_emb = rotary_emb["query"]
    if isinstance(rotary_emb, Tensor) and not rotary_emb.is_complex():
        rotary_emb = rotary_emb.transpose(1, 2)
        return rotary_emb[..., 0, 0], rotary_emb[..., 1, 0]
    if isinstance(rotary_emb, Tensor):
        return rotary_emb.real.float(), rotary_emb.imag.float()
    if isinstance(rotary_emb[0], tuple):
        return _of_positions(*rotary_emb)
    cos, sin = rotary_emb
    if cos.is_complex():
        turns = torch.cat((sin, cos))
        return turns.real, turns.imag
    if cos.ndim == 3 and cos.shape[-1] == attn.inner_dim:  # for each head its own
        cos, sin = (table.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for table in (cos, sin))
        return cos[..., 0::2], sin[..., 1::2]
    if cos.ndim == 4 and cos.shape[2] == 1:
        cos, sin = cos[:, :, 0], sin[:, :, 0]
    width = attn.inner_dim // attn.heads
    if cos.shape[-1] != width:
        return cos, sin
    if getattr(attn, "rotary_halves", 0):
        return cos[..., : width // 2], sin[..., : width // 2]
    return cos[..., 0::2], sin[..., 1::2]


def _of_positions(tables: Any, positions: Any) -> RotaryEmbedding:
    """Cosines and sines of tokens at positions ``[1, N]`` in tables ``[n, d / 3]`` of three axes."""
    cos, sin = (
        torch.cat(
            [
                axis[part][at][..., : axis[part].shape[-1] // 2]
                for axis, at in zip(tables, positions, strict=True)
            ],
            dim=-1,
        )
        for part in (0, 1)
    )
    return cos, sin
