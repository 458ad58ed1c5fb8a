"""Sharding by FSDP 2: what accelerate leaves undone."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import convert_outputs_to_fp32
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class AveragedWeights(EMAModel):
    """Exponential moving average of weights, which are whole in checkpoints where FSDP 2 shards them.

    diffusers' own hands on the shards of each process, of which accelerate writes those of the first.
    """

    shadow_params: list[Tensor]

    def state_dict(self) -> dict[str, Any]:
        """Return the state, in the first process with whole weights; to be called by all."""
        return {**super().state_dict(), "shadow_params": [_stored(weight) for weight in self.shadow_params]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state, and shard the weights as those that are there.

        Raises:
            ValueError: for a checkpoint that holds the shards of one process.
        """
        if any(isinstance(weight, DTensor) for weight in state_dict["shadow_params"]):
            raise ValueError(
                "it is of a sharded run of an earlier version, which kept one process' part of the averaged "
                "weights"
            )
        before = self.shadow_params
        super().load_state_dict(state_dict)
        self.shadow_params = [
            distribute_tensor(weight.to(own.device), own.device_mesh, own.placements)
            if isinstance(own, DTensor)
            else weight
            for weight, own in zip(self.shadow_params, before, strict=True)
        ]


def _stored(weight: Tensor) -> Tensor:
    if not isinstance(weight, DTensor):
        return weight
    whole = weight.full_tensor()  # one after the other: all of them need not fit a GPU
    return whole.cpu() if PartialState().is_main_process else weight


def gathered(x: Tensor) -> Tensor:
    """Return a tensor in one piece; to be called by all processes that hold a part."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def gather_in_dtype(accelerator: Accelerator) -> None:
    """Have the weights of models gathered in the dtype of mixed precision, and nothing else cast.

    accelerate's policy casts all that layers are given, times and rotary positions too, and adds up gradients
    in that dtype. Layers compute by :func:`autocast_forward` instead.
    """
    dtype = _DTYPES.get(accelerator.mixed_precision)
    accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=torch.float32, cast_forward_inputs=False
    )


def gather_as_stored(accelerator: Accelerator) -> None:
    """Have the weights of models gathered in their own dtype."""
    accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(cast_forward_inputs=False)


def autocast_forward(model: Any, device: torch.device, mixed_precision: str) -> None:
    """Have a model of FSDP 2 or DeepSpeed compute as others do: accelerate leaves autocast out."""
    dtype = _DTYPES.get(mixed_precision)
    if dtype is not None:
        autocast = torch.autocast(device.type, dtype)
        model.forward = convert_outputs_to_fp32(autocast(model.forward))


def reshard(model: nn.Module) -> None:
    """Give back weights that are still gathered: after a forward without gradients the outermost are.

    What is written into the shards would not be seen by the next forward.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
