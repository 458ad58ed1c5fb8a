"""Quantised models: weights that are tensors made of tensors, codes and their scales."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..attention import MHLA


def dequantised(weight: Tensor) -> Tensor:
    """Return the numbers that a weight stands for, of a quantised one its codes times its scales."""
    if hasattr(weight, "__tensor_flatten__") and hasattr(weight, "dequantize"):
        return weight.detach().dequantize()
    return weight


def require_not_quantised(model: Any, name: str, work: str) -> None:
    """Check that a model has weights in floating point.

    Args:
        model: of diffusers.
        name: of the model, for the message.
        work: that needs such weights, for the message.

    Raises:
        ValueError: for a model that is stored quantised.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return
    method = quantizer.quantization_config.quant_method
    raise ValueError(
        f"{name} is quantised by {getattr(method, 'value', method)}, and {work} needs its weights in "
        "floating point: take the model as it was before, and quantise what comes of it when it is loaded, "
        "with quantization_config="
    )


def require_finite_parts(model: Any) -> None:
    """Check what quantisation on loading made of weights of MHLA, some of which start at 0.

    In float8 the scale of a row of zeros is 0, and the row 0 / 0.

    Raises:
        ValueError: for weights that are NaN now, with what to leave out.
    """
    for name, module in model.named_modules():
        if not isinstance(module, MHLA):
            continue
        for key, weight in module.named_parameters():
            if not hasattr(weight, "__tensor_flatten__") or torch.isfinite(dequantised(weight)).all():
                continue
            layer = key.rpartition(".")[0]
            raise ValueError(
                f"{name}.{key} is NaN when quantised, as rows that are 0 have no scale in a "
                f'{type(weight).__name__}: leave it out, with modules_to_not_convert=["{layer}"] of the '
                "quantization config"
            )
