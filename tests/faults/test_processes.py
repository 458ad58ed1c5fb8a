"""Several processes on a machine without a GPU."""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mhla_diffusion import processes
from mhla_diffusion.processes import (
    in_first_process,
    make_accelerator,
    one_fate,
    process_state,
    wait_for_all,
)
from tests.processes import ROOT, free_port

WITHOUT_GPU = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
ASK = """
from mhla_diffusion.processes import process_state
state = process_state()
print(state.process_index, state.num_processes)
"""
OPEN_MPI = (
    "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
)  # fmt: skip


def join(rank: int) -> None:
    """Say to accelerate what a launcher would have."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2")
    os.environ.update(WITHOUT_GPU)
    assert process_state().num_processes == 2


def start_as_mpirun(rank: int, port: int) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    os.environ.update(WITHOUT_GPU | {"MASTER_PORT": str(port)})
    os.environ.update(zip(OPEN_MPI, (str(rank), "2", str(rank), "2"), strict=True))
    state = process_state()
    state.wait_for_everyone()
    assert (state.process_index, state.num_processes, state.backend) == (rank, 2, "gloo")
    state.destroy_process_group()


def test_processes_of_mpirun_find_each_other() -> None:
    mp.start_processes(start_as_mpirun, (free_port(),), nprocs=2, start_method="forkserver")


def test_one_process_where_two_were_asked_for_is_said() -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    environment = os.environ | WITHOUT_GPU
    result = subprocess.run(
        [*launch, "--no_python", sys.executable, "-c", ASK],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.stdout.split()[:2] == ["0", "1"], result.stderr
    assert "asked for 2 processes and started one" in result.stderr
    assert "torchrun --nproc_per_node 2 -- SCRIPT starts them all" in result.stderr


def wait_long(rank: int, port: int) -> None:
    # The others wait for longer than a collective would.
    dist.barrier()  # the other may still be connecting
    dist.destroy_process_group()
    os.environ["MASTER_PORT"] = str(port)  # where no rank finds what the group before left
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=4))
    join(rank)

    def work() -> str:
        assert rank == 0
        time.sleep(5)
        return "scores"

    assert in_first_process(work) == "scores"

    def fail() -> None:
        raise ValueError("no such metric")

    error, message = (ValueError, "^no such") if rank == 0 else (ConnectionError, "first process .* no such")
    with pytest.raises(error, match=message):
        in_first_process(fail)
    assert in_first_process(lambda: 7) == 7
    started = time.perf_counter()
    time.sleep(5 * rank)
    wait_for_all()
    assert time.perf_counter() - started > 4.5


def test_others_wait_for_the_first_beyond_the_timeout_of_a_collective(
    run_processes: Callable[..., None],
) -> None:
    run_processes(wait_long, 2, free_port())


def nest(rank: int) -> None:
    """What processes share is done by the first alone where that one alone has come."""
    faulthandler.dump_traceback_later(120, exit=True)  # where one waits for the other for ever
    join(rank)

    def work() -> int:
        assert rank == 0
        state = process_state()
        assert (state.process_index, state.num_processes, state.is_main_process) == (0, 1, True)
        wait_for_all()
        state.wait_for_everyone()
        with pytest.raises(AssertionError, match="by all processes"):
            make_accelerator()
        with pytest.raises(ValueError, match="no such metric"):
            in_first_process(fail)
        return in_first_process(lambda: in_first_process(lambda: 7))

    def fail() -> None:
        raise ValueError("no such metric")

    assert in_first_process(work) == 7
    with pytest.raises((ValueError, ConnectionError), match="no such"):
        in_first_process(lambda: in_first_process(fail))
    state = process_state()
    assert (state.process_index, state.num_processes) == (rank, 2)
    wait_for_all()
    assert in_first_process(lambda: 8) == 8
    faulthandler.cancel_dump_traceback_later()


def test_the_first_process_is_alone_in_what_it_alone_does(run_processes: Callable[..., None]) -> None:
    run_processes(nest, 2)


def lose_peer(rank: int, file: str) -> None:
    join(rank)
    if rank == 1:
        os._exit(0)
    with pytest.raises(ConnectionError, match="another process of this run has ended"), one_fate():
        dist.all_reduce(torch.ones(1))
    Path(file).touch()


def test_the_loss_of_a_process_is_one_sentence_in_the_others(
    run_processes: Callable[..., None], tmp_path: Path
) -> None:
    run_processes(lose_peer, 2, str(tmp_path / "said"))
    assert (tmp_path / "said").exists()


def lose_peer_of_store(rank: int, file: str) -> None:
    join(rank)
    if rank == 1:
        time.sleep(1)
        os._exit(0)
    processes.SILENCE = 3.0
    with pytest.raises(ConnectionError, match="process 1 of this run has ended"):
        wait_for_all()
    Path(file).touch()


def test_a_process_that_is_waited_for_and_dies_is_noticed(
    run_processes: Callable[..., None], tmp_path: Path
) -> None:
    run_processes(lose_peer_of_store, 2, str(tmp_path / "said"))
    assert (tmp_path / "said").exists()


def test_a_training_process_that_dies_ends_the_others(
    write_settings: Callable[[], Path], settings: dict[str, Any], tmp_path: Path
) -> None:
    settings["trainer"] |= {"max_steps": 100_000, "checkpoint_every": 100_000}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max_restarts", "0"]
    script = ["scripts/train_image.py", "--config", str(write_settings())]
    launcher = subprocess.Popen(
        [*torchrun, "--nproc_per_node", "2", "--", *script, "--output_dir", str(tmp_path / "run")],
        cwd=ROOT, env={**os.environ, **WITHOUT_GPU}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert launcher.stdout is not None
    for line in launcher.stdout:
        if "step 2 " in line:
            break
    ranks = {
        process.environ()["RANK"]: process
        for process in psutil.Process(launcher.pid).children(recursive=True)
        if "RANK" in process.environ()
    }
    assert ranks.keys() == {"0", "1"}
    ranks["1"].send_signal(signal.SIGKILL)
    killed = time.perf_counter()
    output, _ = launcher.communicate(timeout=120)
    assert time.perf_counter() - killed < 60
    assert launcher.returncode
    assert "error: another process of this run has ended" in output
    assert not ranks["0"].is_running()


def test_the_pulse_of_a_process_ends_with_its_group_without_a_word() -> None:
    """Whoever ends the group, as accelerate's end_training does, may end the process some time later."""
    assert not dist.is_initialized()
    processes._Pulse(0).run()
