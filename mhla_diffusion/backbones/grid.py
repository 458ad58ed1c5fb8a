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
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from .layers import mhla_of
from .processors import is_joint

Grid = tuple[int, ...]


def send_with_rope(rope: nn.Module, grid_of: Callable[..., Grid]) -> None:
    """Append the grid to the rotary tables that a model's ``rope`` returns.

    It is the shape of a third tensor, ``[*grid, 0]``: hooks that spread or move tensors leave it whole.

    Args:
        rope: of the model.
        grid_of: called with the arguments of the rope, such as :func:`grid_of_latents` of some patch.
    """
    rope.register_forward_hook(functools.partial(_append_grid, grid_of=grid_of))


def send_as_argument(model: nn.Module, patch_size: Sequence[int], name: str) -> None:
    """Add the grid of latents ``[B, C, H, W]`` to the dict ``name`` that a model hands to its layers."""
    position = list(inspect.signature(type(model).forward).parameters).index(name) - 1
    hook = functools.partial(_add_argument, patch_size=tuple(patch_size), name=name, position=position)
    model.register_forward_pre_hook(hook, with_kwargs=True)


def receive_grid(attn: nn.Module) -> None:
    """Have an attention layer take the grid off its arguments and, with MHLA, hand it to its processor.

    What it holds of tokens ahead of those of the grid are extra ones.
    """
    attn.register_forward_pre_hook(_hand_over_grid, with_kwargs=True)


def find_grid(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Grid | None:
    """Return the grid that rides on the arguments of an attention layer."""
    carriers = [value[-1] for value in (*args, *kwargs.values()) if _carries_grid(value)]
    return tuple(map(operator.index, carriers[0].shape[:-1])) if carriers else kwargs.get("grid")


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


def grid_of_latents(latents: Tensor, *, patch_size: tuple[int, ...]) -> Grid:
    """Return the grid of latents ``[B, C, F, H, W]``."""
    return token_grid(latents.shape[2:], patch_size)


def _append_grid(
    rope: nn.Module, args: tuple[Any, ...], tables: tuple[Tensor, ...], *, grid_of: Callable[..., Grid]
) -> tuple[Tensor, ...]:
    return *tables, tables[0].new_empty(*grid_of(*args), 0)


def _add_argument(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    patch_size: tuple[int, ...],
    name: str,
    position: int,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    latents = args[0] if args else kwargs["hidden_states"]
    given = args[position] if len(args) > position else kwargs.get(name)
    added = {**(given or {}), "grid": token_grid(latents.shape[2:], patch_size)}
    if len(args) > position:
        return (*args[:position], added, *args[position + 1 :]), kwargs
    return args, {**kwargs, name: added}


def _hand_over_grid(
    attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    grid = find_grid(args, kwargs)
    rest = {name: _without_grid(value) for name, value in kwargs.items() if name != "grid"}
    if mhla_of(attn.processor) is not None:
        rest["grid"] = grid
        tokens = (args[0] if args else kwargs["hidden_states"]).shape[1]
        if grid is not None and not is_joint(attn) and tokens > math.prod(grid):
            rest["extra"] = tokens - math.prod(grid), 0
    return tuple(map(_without_grid, args)), rest


def _without_grid(value: Any) -> Any:
    return value[:-1] if _carries_grid(value) else value


def _carries_grid(value: Any) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) == 3
        and isinstance(value[-1], Tensor)
        and value[-1].ndim > 1
        and value[-1].shape[-1] == 0
    )
