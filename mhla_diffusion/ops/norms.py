"""RMS norms of queries, keys and outputs, and a gate: what often stands around the operator."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .composite import within_range


class Norms(NamedTuple):
    """RMS norms and gate around the operator: ``norm(mhla(norm(q), norm(k), v)) * SiLU(gate)``.

    A norm is over the channels of each head, ``x / sqrt(mean(x^2) + eps) * weights``.

    Args:
        q, k: weights ``[d]`` of the norms of queries and keys, or None for no norm.
        out: weights ``[d_v]`` of that of outputs.
        gate: ``[B, H, N, d_v]``, before SiLU.
        eps: of all norms.
    """

    q: Tensor | None = None
    k: Tensor | None = None
    out: Tensor | None = None
    gate: Tensor | None = None
    eps: float = 1e-6

    @property
    def any(self) -> bool:
        """True where there is a norm or a gate."""
        return any(x is not None for x in self[:4])

    def before(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries and keys ``[B, H, N, d]`` behind their norms."""
        return self._normed(q, self.q), self._normed(k, self.k)

    def behind(self, out: Tensor, dtype: torch.dtype) -> Tensor:
        """Return outputs ``[B, H, N, d_v]`` behind their norm and the gate, in ``dtype`` and in its range."""
        if not self.any:
            return out.to(dtype)
        out = self._normed(out, self.out)
        return within_range(out if self.gate is None else out * F.silu(self.gate), dtype).to(dtype)

    def double(self) -> Norms:
        """Return the same in float64."""
        q, k, out, gate = (None if x is None else x.double() for x in self[:4])
        return Norms(q, k, out, gate, self.eps)

    def dtype_between(self, dtype: torch.dtype, *, normalized: bool) -> torch.dtype:
        """Return what dtype the operator has to leave for ``behind``: sums may be too large for float16."""
        follows = self.out is not None or (self.gate is not None and not normalized)
        return torch.float32 if follows and dtype == torch.float16 else dtype

    def check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Refuse what does not fit queries ``[B, H, N, d]``, keys and values, with a ValueError."""
        wanted = {
            "q": q.shape[-1:],
            "k": k.shape[-1:],
            "out": v.shape[-1:],
            "gate": (*q.shape[:-1], v.shape[-1]),
        }
        for name, shape in wanted.items():
            x = getattr(self, name)
            if x is None:
                continue
            if not isinstance(x, Tensor) or x.shape != shape or not x.is_floating_point():
                found = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else f"{x!r}"
                raise ValueError(
                    f"{name} of the norms must be a floating-point tensor {list(shape)} beside q "
                    f"{tuple(q.shape)} and v {tuple(v.shape)}, got {found}"
                )
            if x.device != q.device:
                raise ValueError(f"{name} of the norms is on {x.device} and q on {q.device}: move it there")
        if not 0 <= self.eps < 1:
            raise ValueError(f"eps of the norms must be a number from 0 to less than 1, got {self.eps!r}")

    def _normed(self, x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return x
        wide = torch.promote_types(x.dtype, weight.dtype)  # torch has no fast norm of two dtypes
        weight = weight.to(wide)
        shape = (operator.index(weight.shape[0]),)  # which no compiler takes for a symbol
        return over_channels(lambda y: F.rms_norm(y, shape, weight, self.eps), x.to(wide)).to(x.dtype)


def over_channels(norm: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Norm over channels of ``[B, H, N, d]``, in the order that heads and tokens have in memory.

    Kernels that want contiguous rows would copy them otherwise, and put heads before tokens.
    """
    # torch.compile takes no strides that are symbols.
    compiling = torch.compiler.is_compiling()
    tokens_first = not x.is_contiguous() if compiling else x.stride(1) < x.stride(2)
    return norm(x.transpose(1, 2)).transpose(1, 2) if tokens_first else norm(x)


def is_plain(norm: nn.Module, device: torch.device, eps: float) -> bool:
    """Return whether an RMS norm is that of its weights, there, and no hook, as of offloading, changes it."""
    hooks = norm._forward_pre_hooks or norm._forward_hooks or _has_any_global_hook()
    if type(norm) is not nn.RMSNorm or norm.eps != eps or hooks or "forward" in norm.__dict__:
        return False
    return norm.weight is not None and norm.weight.device == device
