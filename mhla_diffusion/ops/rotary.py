"""Tables of positions as the operator reads them, which the layers of a model share."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .features import RotaryEmbedding, turn_all
from .operators import is_watched

# For the cosines that a table was made of: of what views of them and of which sines, and the table.
_kept: Any = WeakTensorKeyDictionary()


def rotary_table(
    rotary_emb: RotaryEmbedding | None, tokens: int | None = None, extra: tuple[int, int] | None = None
) -> Tensor | None:
    """Return cosine and sine of each pair side by side, ``[..., N, d]``.

    A model gives all its layers the same tensors, of which each takes views of its own. So the last table is
    kept for as long as what it was made of lives and is not written to: layers do not make it again, and in
    training save one for all of them.

    Args:
        rotary_emb: cosines and sines, ``[..., N, d / 2]`` each.
        tokens, extra: number of all tokens and of the extra ones before and after those of the grid, where
            tables may be of the grid alone.
    """
    if rotary_emb is None:
        return None
    if _is_made_anew(*rotary_emb):
        return _table(rotary_emb, tokens, extra)
    cosines, sines = (x if x._base is None else x._base for x in rotary_emb)
    views = [(x.storage_offset(), x.shape, x.stride(), x.dtype, x._version) for x in rotary_emb]
    stream = torch.cuda.current_stream(cosines.device) if cosines.is_cuda else None
    made_of = (views, tokens, extra, stream)
    found = _kept.get(cosines)
    if found is not None and found[0] == made_of and found[1]() is sines:
        return found[2]
    with torch.inference_mode(False):  # what is kept may be needed in training later
        table = _table(rotary_emb, tokens, extra)
    _kept[cosines] = made_of, weakref.ref(sines), table
    return table


def _table(rotary_emb: RotaryEmbedding, tokens: int | None, extra: tuple[int, int] | None) -> Tensor:
    if tokens is not None:
        rotary_emb = turn_all(rotary_emb, tokens, extra)
    return torch.stack(tuple(rotary_emb), -1).flatten(-2)


def _is_made_anew(cos: Tensor, sin: Tensor) -> bool:
    """Whether a table is of no use to the next layer, or one that is kept would be wrong.

    Compilers see themselves that layers compute the same; tensors of inference mode do not say when they
    are written to; and a CUDA graph would read a table again after it is gone.
    """
    if is_watched((cos, sin)) or cos.is_inference() or sin.is_inference():
        return True
    return cos.is_cuda and torch.cuda.is_current_stream_capturing()
