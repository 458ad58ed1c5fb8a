"""Processes of a run, whoever started them: torchrun, accelerate launch or mpirun.

Whatever asks accelerate which process it is asks here first: left alone, accelerate takes each of several
processes on a machine without a GPU for the only one.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from accelerate.utils.environment import get_cpu_distributed_information

logger = logging.getLogger(__name__)

T = TypeVar("T")

SILENCE = 45.0
"""Seconds without a sign of life after which a process is taken for dead."""


def process_state() -> PartialState:
    """Return accelerate's state of this process, after it joined the others of its run.

    Without an accelerator they talk through gloo. Inside of :func:`in_first_process` it is the state of one
    process alone, as the others do not come to what it would wait for.
    """
    if not PartialState._shared_state:
        if not _is_one_of_several():
            _warn_of_missing_processes()
        state = PartialState(cpu=_has_only_cpus())
        if state.num_processes > 1:
            _Pulse(state.process_index).start()
            if state.is_main_process:
                logger.info("%d processes share the work", state.num_processes)
    return PartialState() if _alone is None else _alone


def make_accelerator(**settings: Any) -> Accelerator:
    """Return an Accelerator for :func:`process_state`; ``settings`` are its arguments."""
    assert _alone is None, "what an Accelerator does is done by all processes, not inside in_first_process"
    # With cpu it would leave DeepSpeed out, which runs there too.
    partitioned = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    return Accelerator(cpu=process_state().device.type == "cpu" and not partitioned, **settings)


def in_first_process(work: Callable[[], T]) -> T:
    """Return in every process what ``work`` returns in the first.

    The others wait for as long as it takes, and not in a collective, whose timeout would end them.

    Args:
        work: called in the first process alone; what it returns can be pickled. What processes share
            elsewhere is done by that one in it.

    Raises:
        ConnectionError: in the others, when ``work`` raised an exception in the first, with its message, or
            that process has ended.
    """
    state = process_state()
    if state.num_processes == 1:
        return work()
    key = f"mhla_diffusion/{next(_turns)}"
    outcome: list[Any] = [None, None]
    failure = None
    if state.is_main_process:
        try:
            with _one_process():
                outcome[0] = work()
        except Exception as error:
            failure, outcome[1] = error, str(error) or type(error).__name__
        _store().set(key, "done")
    else:
        _wait(key, 0)
    _leave(key)
    value, message = broadcast_object_list(outcome)
    if failure is not None:
        raise failure
    if message is not None:
        raise ConnectionError(f"the first process of this run ended: {message}")
    return value


def wait_for_all() -> None:
    """Wait until every process has come here, for as long as it takes.

    Raises:
        ConnectionError: when one of them has ended.
    """
    state = process_state()
    if state.num_processes == 1:
        return
    key = f"mhla_diffusion/{next(_turns)}"
    _store().set(f"{key}/{state.process_index}", "here")
    for index in range(state.num_processes):
        _wait(f"{key}/{index}", index)
    _leave(key)


@contextmanager
def one_fate() -> Iterator[None]:
    """End with the other processes of the run, also as a decorator.

    Raises:
        ConnectionError: when another process has ended while this one was exchanging something with it.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or _LOST.search(str(error)):
            raise ConnectionError(
                "another process of this run has ended, and what it said last tells why; start the run again"
            ) from error
        raise


_turns = itertools.count()
_alone: PartialState | None = None
_LOST = re.compile(r"closed by peer|connection reset|connection refused|broken pipe|gloo.*timed? ?out", re.I)


@contextmanager
def _one_process() -> Iterator[None]:
    """Let :func:`process_state` be that of one process alone, inside the with block."""
    global _alone
    one = {"distributed_type": DistributedType.NO, "num_processes": 1, "local_process_index": 0}
    state = PartialState.__new__(PartialState)  # without the dict that all others of its class share
    vars(state).update(PartialState._shared_state, **one, process_index=0, backend=None)
    _alone = state
    try:
        yield
    finally:
        _alone = None


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


class _Pulse(threading.Thread):
    """Shows the other processes that this one lives, through the store, until it ends, however it ends."""

    seconds = 2.0

    def __init__(self, index: int) -> None:
        super().__init__(daemon=True)
        self.key = _pulse_of(index)

    def run(self) -> None:
        with suppress(RuntimeError, ValueError):  # the store has ended, or the group that knows it
            for beat in itertools.count():
                _store().set(self.key, str(beat))
                time.sleep(self.seconds)


def _pulse_of(index: int) -> str:
    return f"mhla_diffusion/pulse/{index}"


def _wait(key: str, index: int) -> None:
    """Wait for what a process will say, for as long as it lives.

    Raises:
        ConnectionError: when it has given no sign of life for :data:`SILENCE` seconds.
    """
    store, pulse, heard = _store(), b"", time.monotonic()
    while not store.check([key]):  # by looking, as a wait would keep the pulse out of the store
        time.sleep(0.05)
        if time.monotonic() - heard < _Pulse.seconds:
            continue
        beat = store.get(_pulse_of(index)) if store.check([_pulse_of(index)]) else pulse
        if beat != pulse:
            pulse, heard = beat, time.monotonic()
        elif time.monotonic() - heard > SILENCE:
            raise ConnectionError(
                f"process {index} of this run has ended, and what it said last tells why; start the run again"
            )


def _leave(key: str) -> None:
    """Let the first process, with which the store ends, be the last that needs it."""
    state = process_state()
    if not state.is_main_process:
        _store().set(f"{key}/{state.process_index}/left", "")
        return
    for index in range(1, state.num_processes):
        _wait(f"{key}/{index}/left", index)


def _is_one_of_several() -> bool:
    """Read the launcher's environment, and complete it as torchrun would have written it."""
    found = get_cpu_distributed_information()
    if found.world_size < 2:
        return False
    os.environ.setdefault("RANK", str(found.rank))
    os.environ.setdefault("WORLD_SIZE", str(found.world_size))
    os.environ.setdefault("LOCAL_RANK", str(found.local_rank))
    os.environ.setdefault("LOCAL_WORLD_SIZE", str(found.local_world_size))
    if found.local_world_size == found.world_size:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29500")
    return True


def _has_only_cpus() -> bool:
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return True
    # Apple's GPU has no way to talk to another process.
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return several and (accelerator is None or accelerator.type == "mps")


def launch_option(name: str) -> str | None:
    """Return what ``accelerate launch`` was given for one of its options, None where it was not."""
    try:
        parent = psutil.Process().parent()
        command = " ".join(parent.cmdline() if parent is not None else [])
    except psutil.Error:
        return None
    found = re.search(rf"\baccelerate\b.* --{name.replace('_', '[_-]')}[ =](\S+)", command)
    return None if found is None else found[1]


def _warn_of_missing_processes() -> None:
    """Say when ``accelerate launch`` was asked for several processes, but started this one alone."""
    asked = launch_option("num_processes") or ""
    if asked.isdecimal() and int(asked) > 1:
        logger.warning(
            "accelerate launch was asked for %s processes and started one, as it does without a GPU: "
            "torchrun --nproc_per_node %s -- SCRIPT starts them all",
            asked,
            asked,
        )
