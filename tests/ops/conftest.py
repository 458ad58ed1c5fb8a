"""With TRITON_INTERPRET=1 Triton interprets its kernels: test_triton.py runs tests again in that way."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch


def multiply_as_gpus_do() -> None:
    """Let the interpreter round as a GPU does.

    As it is, it adds and multiplies the bit patterns of bfloat16 numbers, cuts off what bfloat16 does not
    hold, and takes float32 for TF32, of which tensor cores do not look at the last 13 bits.
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_dot = InterpreterBuilder.create_dot

    def as_float(x: Any, precision: Any) -> Any:
        if x.dtype.scalar == tl.bfloat16:
            return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
        if x.dtype.scalar == tl.float32 and str(precision).upper().endswith("TF32"):
            bits = np.ascontiguousarray(x.data).view(np.uint32) & np.uint32(0xFFFFE000)
            return TensorHandle(bits.view(np.float32), tl.float32)
        return x

    def rounded(self: Any, a: Any, b: Any, d: Any, precision: Any, *rest: Any) -> Any:
        return create_dot(self, as_float(a, precision), as_float(b, precision), d, precision, *rest)

    cast_impl = InterpreterBuilder.cast_impl

    def cast(self: Any, source: Any, kind: Any) -> Any:
        if source.dtype.scalar == tl.float32 and kind.scalar == tl.bfloat16:
            nearest = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
            return TensorHandle(nearest.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)
        return cast_impl(self, source, kind)

    def of_numbers(name: str) -> None:
        create = getattr(InterpreterBuilder, name)

        def through_float32(self: Any, a: Any, b: Any) -> Any:
            if a.dtype.scalar != tl.bfloat16:
                return create(self, a, b)
            return cast(self, create(self, as_float(a, None), as_float(b, None)), tl.bfloat16)

        setattr(InterpreterBuilder, name, through_float32)

    InterpreterBuilder.create_dot = rounded
    InterpreterBuilder.cast_impl = cast
    of_numbers("create_fadd")
    of_numbers("create_fsub")


if os.environ.get("TRITON_INTERPRET") == "1":
    multiply_as_gpus_do()
