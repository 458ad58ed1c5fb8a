"""Which implementation runs: Triton's kernels on GPUs that they suit, else operations of torch in tiles."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from types import ModuleType

import torch
from torch import Tensor

from . import tiled

logger = logging.getLogger(__name__)

KERNELS = ("auto", "torch", "triton")


def implementation_for(*tensors: Tensor) -> ModuleType:
    """Return the module whose ``summarize``, ``read`` and gradients take these tensors.

    Raises:
        ValueError: see :func:`has_kernels`.
    """
    kinds = [(x.dtype, x.shape[-1]) for x in tensors]
    return _triton() if has_kernels(tensors[0].device, *kinds) else tiled


@torch.compiler.assume_constant_result  # what is asked here, compilers could not trace
def has_kernels(device: torch.device, *kinds: tuple[torch.dtype, int]) -> bool:
    """Return True where Triton's kernels run on tensors of these dtypes and head widths.

    The environment variable ``MHLA_KERNELS`` says where: ``auto`` (the default) takes Triton where it can and
    logs why it cannot, once for each reason; ``torch`` never takes it; ``triton`` fails where it cannot. On a
    CPU Triton runs in its interpreter alone (``TRITON_INTERPRET=1``), for tests.

    Raises:
        ValueError: for another value of the variable, and where it asks for what cannot be.
    """
    choice = os.environ.get("MHLA_KERNELS", "auto")
    if choice not in KERNELS:
        raise ValueError(
            f"the environment variable MHLA_KERNELS must be of {', '.join(KERNELS)}, got {choice!r}"
        )
    if choice == "torch" or (choice == "auto" and device.type != "cuda"):
        return False
    reason = _obstacle(device, kinds)
    if reason is not None and choice == "triton":
        raise ValueError(f"MHLA_KERNELS=triton, but {reason}; unset it, or set it to auto")
    if reason is not None:
        _log_once(reason)
    return reason is None


def _obstacle(device: torch.device, kinds: tuple[tuple[torch.dtype, int], ...]) -> str | None:
    """Why Triton's kernels cannot take such tensors."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {device}, and Triton's kernels are for GPUs"
    reason = _obstacle_of(device)
    if reason is not None:
        return reason
    for dtype, width in kinds:
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"{dtype} is none of float32, bfloat16, float16"
        if width > 256:
            return f"heads of {width} channels are wider than 256"
    return None


@functools.cache
def _obstacle_of(device: torch.device) -> str | None:
    """Why Triton's kernels do not run on a device; asked once, as it takes longer than a launch."""
    if not _is_installed():
        return "the package triton is not installed"
    if device.type == "cuda" and not torch.cuda.is_available():
        return "there is no GPU to compile for"  # fake tensors
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return f"{torch.cuda.get_device_name(device)} has compute capability {capability}, below (8, 0)"
    return None


def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _triton() -> ModuleType:
    from .gpu import mhla

    return mhla


@functools.cache
def _log_once(reason: str) -> None:
    logger.warning("MHLA runs in operations of torch, not in its GPU kernels: %s", reason)
