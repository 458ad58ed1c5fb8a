"""The range [0, 1] of mixing matrices: they are brought back into it after every step of any optimizer.

A constraint of the module itself, so that no training loop can forget it.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

_constrained: weakref.WeakSet[Any] = weakref.WeakSet()


def constrain(module: Any) -> None:
    """Have ``clamp_mixing`` of a module called after every optimizer step, for as long as it lives."""
    _constrained.add(module)


@torch.no_grad()
def clamp(weight: nn.Parameter) -> None:
    """Bring a weight into [0, 1], with the copy of it that an optimizer steps in its place.

    DeepSpeed's ZeRO steps a part of a flat copy and writes it over the weight afterwards. Where that part is
    in stages 1 and 2 ``_hp_mapping`` knows, in stage 3 ``_z3_optimizer``.
    """
    # On .data: where nothing leaves [0, 1] a graph that saved this tensor stays valid.
    weight.data.clamp_(0, 1)
    if (copy := getattr(weight, "_hp_mapping", None)) is not None:
        copy.hp_fragment.data.clamp_(0, 1)
    if (sharded := getattr(weight, "_z3_optimizer", None)) is not None:
        sharded.set_local_hp_param(sharded.get_local_fp32_param(weight).clamp(0, 1), weight)


def _clamp_all(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    # All live modules, not this optimizer's parameters: FSDP, DeepSpeed and from_pretrained replace those.
    for module in list(_constrained):
        module.clamp_mixing()


register_optimizer_step_post_hook(_clamp_all)
