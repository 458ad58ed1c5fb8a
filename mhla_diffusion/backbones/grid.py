"""How the grid of its tokens reaches an attention layer that is never told it.

Stock blocks pass on what they know nothing of: keyword arguments, or what the model's ``rope`` gave. There
the grid rides along, and each self-attention layer takes it off again in front of its forward, so that stock
blocks and stock processors stay what they are. Nothing is kept from call to call: models may be called with
several grids before one backward, and from several threads.
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .layers import mhla_of
from .processors import is_joint

Grid = tuple[int, ...]

# Arguments of a call, by position and by name.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def send_with_rope(rope: nn.Module, grid_of: Callable[..., Grid | None]) -> None:
    """Append the grid to the rotary tables that a model's ``rope`` returns.

    It is the shape of one more tensor, ``[*grid, 0]``: hooks that spread or move tensors leave it whole.

    Args:
        rope: of the model; it returns a tuple of tables, or a dict of them.
        grid_of: called with the arguments of the rope, such as :func:`grid_of_latents` of some patch; with
            None for a grid nothing is appended.
    """
    rope.register_forward_hook(functools.partial(_append_grid, grid_of=grid_of), with_kwargs=True)


def send_as_argument(
    model: nn.Module, patch_size: Sequence[int], name: str, carry: Callable[[Any, Tensor], Any]
) -> None:
    """Have the argument ``name``, which a model hands to its layers, carry the grid of its latents.

    Args:
        model: called with latents ``[B, C, ...]`` first.
        patch_size: latents of a token along the last axes.
        name: of the argument.
        carry: makes one argument of that which is given, or None, and of a tensor ``[*grid, 0]``:
            :func:`in_dict` or :func:`in_tables`.
    """
    position = list(inspect.signature(type(model).forward).parameters).index(name) - 1
    hook = functools.partial(
        _add_argument, patch_size=tuple(patch_size), name=name, position=position, carry=carry
    )
    model.register_forward_pre_hook(hook, with_kwargs=True)


def carrier_of(latents: Tensor, patch_size: Sequence[int]) -> Tensor:
    """Make a tensor ``[*grid, 0]`` that carries the grid of latents."""
    return latents.new_empty(*grid_of_latents(latents, patch_size=tuple(patch_size)), 0)


def in_dict(given: Mapping[str, Any] | None, carrier: Tensor) -> dict[str, Any]:
    """Put the grid into keyword arguments for attention layers."""
    return {**(given or {}), "grid": _grid_of_carrier(carrier)}


def in_tables(given: tuple[Any, ...] | None, carrier: Tensor) -> tuple[Any, ...]:
    """Put the grid behind rotary tables."""
    return *(given or ()), carrier


def receive_grid(attn: Any, names: Mapping[str, str | None] | None = None) -> None:
    """Have an attention layer take the grid off its arguments and, with MHLA, hand it to its processor.

    What it holds of tokens ahead of those of the grid are extra ones.

    Args:
        attn: attention layer.
        names: what :class:`MHLAAttnProcessor` calls the arguments of this layer; None for those that say
            nothing to it.
    """
    attn.argument_names = dict(names or {})
    attn.register_forward_pre_hook(_hand_over_grid, with_kwargs=True)


def our_arguments(attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Return the arguments of a layer as :class:`MHLAAttnProcessor` takes them."""
    names = getattr(attn, "argument_names", {})
    named = {names.get(name, name): value for name, value in kwargs.items()}
    rest = {name: _without_grid(value) for name, value in named.items() if name is not None}
    return tuple(map(_without_grid, args)), {**rest, "grid": find_grid(args, kwargs)}


def find_grid(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Grid | None:
    """Return the grid that rides on the arguments of an attention layer."""
    for value in (*args, *kwargs.values()):
        carrier = _carrier(value)
        if carrier is not None:
            return _grid_of_carrier(carrier)
    return kwargs.get("grid")


def token_grid(sizes: Sequence[int], patch_size: Sequence[int]) -> Grid:
    """Return the tokens along each axis.

    Raises:
        ValueError: when a size is not a multiple of the patch.
    """
    # Plain integers under torch.compile too, whose default makes sizes symbolic from the second grid on.
    sizes = tuple(map(operator.index, sizes))
    if any(size % p for size, p in zip(sizes, patch_size, strict=True)):
        raise ValueError(
            f"{'frames, ' * (len(sizes) > 2)}height and width must be multiples of the patch "
            f"{tuple(patch_size)}, got {sizes}"
        )
    return tuple(size // p for size, p in zip(sizes, patch_size, strict=True))


def grid_of_latents(latents: Tensor, *, patch_size: tuple[int, ...], **rest: Any) -> Grid:
    """Return the grid of latents ``[B, C, ...]``, whose last axes have patches; what else a rope is given, as
    frames a second, says nothing of it."""
    return token_grid(latents.shape[-len(patch_size) :], patch_size)


def _append_grid(
    rope: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    tables: Any,
    *,
    grid_of: Callable[..., Grid | None],
) -> Any:
    grid = grid_of(*args, **kwargs)
    if grid is None:
        return tables
    if isinstance(tables, dict):
        return {**tables, "grid": next(iter(tables.values())).new_empty(*grid, 0)}
    return *tables, tables[0].new_empty(*grid, 0)


def _add_argument(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    patch_size: tuple[int, ...],
    name: str,
    position: int,
    carry: Callable[[Any, Tensor], Any],
) -> Arguments:
    latents = args[0] if args else kwargs["hidden_states"]
    given = args[position] if len(args) > position else kwargs.get(name)
    added = carry(given, carrier_of(latents, patch_size))
    if len(args) > position:
        return (*args[:position], added, *args[position + 1 :]), kwargs
    return args, {**kwargs, name: added}


def _hand_over_grid(attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    if mhla_of(attn.processor) is not None:
        args, rest = our_arguments(attn, args, kwargs)
        grid, tokens = rest["grid"], (args[0] if args else rest["hidden_states"]).shape[1]
        if grid is not None and not is_joint(attn) and tokens > math.prod(grid):
            rest["extra"] = tokens - math.prod(grid), 0
        return args, rest
    rest = {name: _without_grid(value) for name, value in kwargs.items() if name != "grid"}
    return tuple(map(_without_grid, args)), rest


def _without_grid(value: Any) -> Any:
    if _carrier(value) is None:
        return value
    if isinstance(value, dict):
        return {name: table for name, table in value.items() if name != "grid"}
    return value[:-1] or None


def _carrier(value: Any) -> Tensor | None:
    """Return the tensor ``[*grid, 0]`` behind rotary tables, if there is one."""
    if isinstance(value, dict):
        return value.get("grid")
    last = value[-1] if isinstance(value, tuple) and value else None
    return last if isinstance(last, Tensor) and last.ndim > 1 and last.shape[-1] == 0 else None


def _grid_of_carrier(carrier: Tensor) -> Grid:
    return tuple(map(operator.index, carrier.shape[:-1]))
