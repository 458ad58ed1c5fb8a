"""Devices that a user names."""

from __future__ import annotations

import torch


def resolve_device(device: str | None) -> str:
    """Return the device that was asked for; without one a GPU when there is one, else the CPU.

    Raises:
        ValueError: when there is no such device, or it computes nothing.
    """
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        raise ValueError(
            f"device {device!r} cannot be used: choose one of {', '.join(['cpu', *gpus])} "
            f"({str(error).split('. ')[0]})"
        ) from error
    return device
