"""Attention layers that hold on to MHLA, whatever is called on the model or the pipeline around them.

diffusers changes processors behind a user's back (memory savers that are switched on and off set the stock
one), and peft puts them into wrappers that hide what they take.
"""

from __future__ import annotations

import functools
import inspect
import logging
from typing import Any

from torch import Tensor, nn

from ..attention import MHLA

logger = logging.getLogger(__name__)


def mhla_of(processor: Any) -> MHLA | None:
    """Return the MHLA that a processor is, or that peft's wrappers hold."""
    while not isinstance(processor, MHLA):
        inner = getattr(processor, "base_layer", None) or getattr(processor, "original_module", None)
        if inner is None:
            return None
        processor = inner
    return processor


class KeepsMHLA(nn.Module):
    """Mixin in front of a stock attention layer, see :func:`keep_mhla`."""

    processor: Any

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Attend; wrapped MHLA gets what the stock layer would leave out for not seeing that it is taken."""
        mhla = None if isinstance(self.processor, MHLA) else mhla_of(self.processor)
        if mhla is None:
            return super().forward(*args, **kwargs)
        bound = inspect.signature(super().forward).bind(*args, **kwargs)
        bound.apply_defaults()
        taken = inspect.signature(mhla.__call__).parameters
        others = {name: value for name, value in bound.kwargs.items() if name in taken}
        return self.processor(self, *bound.args, **others)

    def set_processor(self, processor: Any) -> None:
        """Set another processor, which is said when MHLA is lost by it."""
        if mhla_of(getattr(self, "processor", None)) is not None and mhla_of(processor) is None:
            logger.warning(
                "%s takes the place of MHLA and of its weights: save_pretrained will refuse this model",
                type(processor).__name__,
            )
        super().set_processor(processor)  # type: ignore[misc]

    def __setattr__(self, name: str, value: Any) -> None:
        if (
            name == "processor"
            and mhla_of(self._modules.get("processor")) is not None
            and mhla_of(value) is None
        ):
            raise ValueError(
                f"{type(value).__name__} cannot take the place of MHLA, as perturbed-attention guidance and "
                "others want it: use a pipeline without it"
            )
        super().__setattr__(name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return _blank, (type(self).__bases__[1],), self.__dict__


def keep_mhla(layer: nn.Module) -> None:
    """Give an attention layer that has MHLA the methods of :class:`KeepsMHLA`."""
    if not isinstance(layer, KeepsMHLA):
        stock: Any = type(layer)
        layer.__class__ = _keeping(stock)


@functools.cache
def _keeping(stock: Any) -> Any:
    return type(stock.__name__, (KeepsMHLA, stock), {})


def _blank(stock: Any) -> Any:
    """Return a layer without its state, for copies and pickles, which do not find a class made here."""
    return object.__new__(_keeping(stock))


def _unless_mhla(name: str) -> Any:
    """Return a method that does what the stock layer's does, but nothing to MHLA."""

    def method(self: Any, *args: Any, **kwargs: Any) -> None:
        if mhla_of(self.processor) is None:
            getattr(super(KeepsMHLA, self), name)(*args, **kwargs)

    method.__name__ = name
    method.__doc__ = "Do what the stock layer does, but nothing to MHLA, which has no such form."
    return method


# Memory savers, which a pipeline switches on or off in all of its layers.
for _saver in (
    "set_attention_slice",
    "set_use_memory_efficient_attention_xformers",
    "set_use_npu_flash_attention",
    "set_use_xla_flash_attention",
):
    setattr(KeepsMHLA, _saver, _unless_mhla(_saver))
