"""The arguments of a stock class in front of our own, without writing them again."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from diffusers.configuration_utils import register_to_config


def after(stock: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give ``__init__(self, stock, *, ...)`` the arguments of a stock class before its own.

    The class then takes what the installed diffusers takes, with its names, order and defaults; the function
    gets them as a dict. All arguments go into the registered config, so that ``save_pretrained`` and
    ``from_pretrained`` restore them.
    """
    theirs = list(inspect.signature(stock.__init__).parameters.values())[1:]

    def decorate(init: Callable[..., None]) -> Callable[..., None]:
        own, _, *rest = inspect.signature(init).parameters.values()
        ours = [parameter.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD) for parameter in rest]
        signature = inspect.Signature([own, *theirs, *ours])

        @functools.wraps(init)
        def with_stock(self: Any, *args: Any, **kwargs: Any) -> None:
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            stock_arguments, our_arguments = (
                {parameter.name: bound.arguments[parameter.name] for parameter in parameters}
                for parameters in (theirs, ours)
            )
            init(self, stock_arguments, **our_arguments)

        # register_to_config and everything else that asks for the signature sees this one.
        with_stock.__signature__ = signature  # type: ignore[attr-defined]
        return register_to_config(with_stock)

    return decorate
