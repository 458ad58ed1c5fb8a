"""Autocast: what takes its dtype, and what is computed without it. Tensors of the meta device know none."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def is_autocast(tensor: Tensor) -> bool:
    """Return True where autocast is on for the device of a tensor."""
    device = tensor.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def without_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    """Context in which operations on the device of a tensor keep the dtypes of their inputs."""
    device = tensor.device.type
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors in the dtype of autocast where it is on, as ``F.scaled_dot_product_attention`` takes them.

    Norms give float32 there: queries and keys would be wider than values, and products slow on a GPU.
    """
    if not is_autocast(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)
