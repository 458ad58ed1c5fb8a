"""The scripts in processes of their own, without the seconds that each would take to import torch again."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
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


def torchrun(num_processes: int) -> list[str]:
    """Return the beginning of a command line that runs a script in several processes."""
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--max_restarts", "0"),
        *("--nproc_per_node", str(num_processes), "--"),
    ]


def run_script(
    name: str, *arguments: object, stderr_to_stdout: bool = False, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """``python scripts/<name>.py arguments`` in the root of the repository, on one thread."""
    command = [f"scripts/{name}.py", *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / "stdout", Path(folder) / ("stdout" if stderr_to_stdout else "stderr")]
        process = _SERVER.Process(target=_run, args=(command, *map(str, outputs)))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            raise subprocess.TimeoutExpired(command, timeout)
        stdout, stderr = (path.read_text(errors="replace") for path in outputs)
    code = process.exitcode
    assert code is not None
    return subprocess.CompletedProcess(command, code, stdout, "" if stderr_to_stdout else stderr)


def _run(command: list[str], stdout: str, stderr: str) -> None:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    torch.set_num_threads(1)
    os.chdir(ROOT)
    sys.argv = command
    sys.path.insert(0, str(ROOT / "scripts"))
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
