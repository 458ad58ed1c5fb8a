"""Launcher of a run, such as ``accelerate launch``: what it sets has to be what the run's config says."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import DynamoBackend, TorchDynamoPlugin, parse_flag_from_env

from ..processes import launch_option, make_accelerator, process_state
from .data.stream import BatchShare
from .settings import TrainerConfig

logger = logging.getLogger(__name__)

# What a launcher may set, and the key of the run's config that says the same.
_KEYS = {
    "mixed_precision": "mixed_precision",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "train_batch_size": "batch_size",
}


def start_accelerator(config: TrainerConfig, **settings: Any) -> Accelerator:
    """Return an Accelerator that does what the config says.

    Args:
        config: of the trainer.
        settings: further arguments of Accelerator.

    Raises:
        ValueError: when the launcher says something else, or asks for DeepSpeed or FSDP in a way that cannot
            be; or fp16 is asked for on a CPU.
    """
    # Launchers write "auto" and "no" where nobody chose; accelerate takes a number alone.
    if os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS") == "auto":
        del os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"]
    # Some options reach the environment with DeepSpeed alone, and would be lost without a word.
    said = {
        name: os.environ.get(f"ACCELERATE_{name.upper()}") or launch_option(name) or "auto" for name in _KEYS
    }
    if said["mixed_precision"] == "no":
        said["mixed_precision"] = "auto"
    require_agreement(said, config)
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        _require_usable_deepspeed(config)
    # accelerate refuses fp16 on other devices that have no loss scaling, and trains in fp32 on this one.
    if config.mixed_precision == "fp16" and process_state().device.type == "cpu":
        raise ValueError(
            "trainer.mixed_precision fp16 needs a GPU, and this run is on a CPU: take bf16 or no; a run that "
            "began in fp16 goes on with a GPU alone"
        )
    accelerator = make_accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        dynamo_backend="no",  # see compile_as_launched
        **settings,
    )
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and accelerator.distributed_type != DistributedType.FSDP:
        raise ValueError(
            f"the launcher asks for FSDP, which accelerate leaves out on {accelerator.num_processes} "
            f"process(es) of type {accelerator.device.type}: start it on GPUs with accelerate launch or "
            "torchrun, or leave FSDP out"
        )
    return accelerator


def _require_usable_deepspeed(config: TrainerConfig) -> None:
    if parse_flag_from_env("ACCELERATE_USE_CPU"):
        raise ValueError(
            "the launcher asks for DeepSpeed and for a CPU, with which accelerate trains without it: leave "
            "DeepSpeed out, and start several processes with torchrun"
        )
    if config.mixed_precision == "fp16":
        raise ValueError(
            "trainer.mixed_precision fp16 has no loss scaling under DeepSpeed here: take bf16, or leave "
            "DeepSpeed out"
        )


def require_agreement(said: Mapping[str, Any], config: TrainerConfig) -> None:
    """Check what a launcher says against the config of the run.

    Args:
        said: by accelerate's names; ``"auto"`` where the launcher leaves it open.
        config: of the trainer.

    Raises:
        ValueError: with both values of each that differ.
    """
    differing = [
        f"{name} {value} beside trainer.{_KEYS[name]} {ours}"
        for name, value in said.items()
        if value != "auto" and not _same(value, ours := getattr(config, _KEYS[name]))
    ]
    if differing:
        raise ValueError(
            f"the launcher asks for {'; for '.join(differing)} of the run: give both the same, or take it "
            "out of the launcher's options and configuration"
        )


def _same(said: Any, ours: Any) -> bool:
    try:
        return float(said) == float(ours or 0)
    except ValueError:
        return str(said) == str(ours)


def tell_deepspeed(accelerator: Accelerator, config: TrainerConfig, share: BatchShare) -> None:
    """Give DeepSpeed the batch, the accumulation and the clipping of the run.

    Its own bf16 would round the weights of the model, and take no other input: it trains in float32, and the
    model computes by :func:`.sharding.autocast_forward`, as without it.

    Raises:
        ValueError: when its own configuration says something else, or shards the weights.
    """
    settings = accelerator.state.deepspeed_plugin.deepspeed_config
    if settings.get("zero_optimization", {}).get("stage") == 3:
        raise ValueError(
            "ZeRO stage 3 of DeepSpeed shards weights, but not the averages of weights that are kept here: "
            "take stage 1 or 2, or FSDP (configs/accelerate/fsdp.yaml), which shards both"
        )
    said = {name: settings[name] for name in _KEYS if name in settings}
    for precision in ("bf16", "fp16"):
        if settings.get(precision, {}).get("enabled") is True:
            said["mixed_precision"] = precision
        settings[precision] = {"enabled": False}
    require_agreement(said, config)
    settings["gradient_accumulation_steps"] = config.gradient_accumulation_steps
    settings["gradient_clipping"] = config.max_grad_norm or 0.0
    # Read off a prepared loader otherwise, and this one is not.
    settings["train_micro_batch_size_per_gpu"] = share.micro_batch_size


def compile_as_launched(model: Any) -> None:
    """Compile a model in place with the dynamo backend that the launcher names, if it does.

    accelerate would wrap it, and the wrapper is no model of diffusers that can be saved.
    """
    plugin = TorchDynamoPlugin()
    if plugin.backend == DynamoBackend.NO:
        return
    regional = plugin.use_regional_compilation and getattr(model, "_repeated_blocks", None)
    (model.compile_repeated_blocks if regional else model.compile)(**plugin.to_kwargs())


def warn_of_idle_cores(num_processes: int) -> None:
    """Say when cores have no thread: unless told otherwise, ``accelerate launch`` gives each process one."""
    threads, cores = torch.get_num_threads() * num_processes, os.cpu_count() or 1
    if threads < cores:
        logger.warning(
            "training on %d of %d cores: accelerate launch --num_cpu_threads_per_process %d uses them all",
            threads,
            cores,
            cores // num_processes,
        )
