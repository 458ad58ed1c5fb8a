"""The scripts in processes of their own, without the seconds that each would take to import torch again."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]

# Started at the first script, in an environment that conftest has set. What it has imported, its forks have.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        "jsonargparse",
        "torch",
        "diffusers.loaders.peft",
        "mhla_diffusion.pipelines.auto",
        "mhla_diffusion.training",
        "mhla_diffusion.commands.evaluate",
    ]
)


def free_port() -> int:
    """Return a port of this machine that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def join(rank: int, num_processes: int, port: int) -> None:
    """Say in a process what torchrun would have said to it."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(num_processes)))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), CUDA_VISIBLE_DEVICES="")


class Script:
    """``python scripts/<name>.py arguments`` in the root of the repository, on one thread, as it runs.

    Args:
        name, arguments: of the script.
        stderr_to_stdout: take both for one.
        before: called in the process, before the script.
    """

    def __init__(
        self,
        name: str,
        *arguments: object,
        stderr_to_stdout: bool = False,
        before: Callable[[], object] | None = None,
    ) -> None:
        self.command = [f"scripts/{name}.py", *map(str, arguments)]
        self._folder = tempfile.TemporaryDirectory()
        names = ["stdout", "stdout" if stderr_to_stdout else "stderr"]
        self._outputs = [Path(self._folder.name) / name for name in names]
        self._process = _SERVER.Process(target=_run, args=(self.command, *map(str, self._outputs), before))
        self._process.start()

    def ends_within(self, seconds: float) -> bool:
        """Wait for the end, but no longer; tell whether it came."""
        self._process.join(seconds)
        return not self._process.is_alive()

    def says(self, text: str) -> bool:
        """Wait until it prints a text; tell whether it did before its end."""
        while not any(text in path.read_text(errors="replace") for path in self._outputs if path.exists()):
            if self.ends_within(0.02):
                return False
        return True

    def send(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        pid = self._process.pid
        if self._process.is_alive() and pid is not None:
            # The server that started it is told of its end first, and sees to it that the process is gone.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def finish(self, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        """Wait for the end; returns what it printed.

        Raises:
            TimeoutExpired: when it takes longer; it is killed then.
        """
        with self._folder:
            if not self.ends_within(timeout):
                self._process.kill()
                self._process.join()
                raise subprocess.TimeoutExpired(self.command, timeout)
            # One that was killed at once has none.
            stdout, stderr = (
                path.read_text(errors="replace") if path.exists() else "" for path in self._outputs
            )
        code = self._process.exitcode
        assert code is not None
        one = self._outputs[0] == self._outputs[1]
        return subprocess.CompletedProcess(self.command, code, stdout, "" if one else stderr)


def start_processes(start: Callable[[Callable[[], object]], Script], num_processes: int = 2) -> list[Script]:
    """Start a script in several processes that find each other, as torchrun does.

    Args:
        start: gives the script that calls a function before it runs.
        num_processes: how many.
    """
    port = free_port()
    return [start(partial(join, rank, num_processes, port)) for rank in range(num_processes)]


def run_script(
    name: str,
    *arguments: object,
    num_processes: int = 1,
    stderr_to_stdout: bool = False,
    timeout: float = 240,
) -> subprocess.CompletedProcess[str]:
    """Run a :class:`Script` to its end, in several processes too: what they print is joined then."""
    if num_processes == 1:
        return Script(name, *arguments, stderr_to_stdout=stderr_to_stdout).finish(timeout)
    scripts = start_processes(
        lambda before: Script(name, *arguments, stderr_to_stdout=stderr_to_stdout, before=before),
        num_processes,
    )
    results = [script.finish(timeout) for script in scripts]
    return subprocess.CompletedProcess(
        results[0].args,
        next((result.returncode for result in results if result.returncode), 0),
        "".join(result.stdout for result in results),
        "".join(result.stderr for result in results),
    )


def _run(command: list[str], stdout: str, stderr: str, before: Callable[[], object] | None) -> None:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    torch.set_num_threads(1)
    os.chdir(ROOT)
    sys.argv = command
    sys.path.insert(0, str(ROOT / "scripts"))
    if before is not None:
        before()
    try:
        runpy.run_path(command[0], run_name="__main__")
        code: object = 0
    except SystemExit as exit:
        code = exit.code
        if isinstance(code, str):
            sys.stderr.write(f"{code}\n")
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code if isinstance(code, int) else int(code is not None))
