"""The environment that the scripts make for themselves, but for what is installed into it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A folder with what the script reads, and a blank in its name."""
    folder = tmp_path / "a copy"
    (folder / "scripts").mkdir(parents=True)
    for name in ("scripts/environment.sh", "setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def source(repository: Path) -> subprocess.CompletedProcess[str]:
    """Run the script where no package can be installed."""
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "source scripts/environment.sh test; echo done"],
        cwd=repository, capture_output=True, text=True, timeout=120,
        env={
            "PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "PIP_NO_INDEX": "1",
            "PIP_CONFIG_FILE": os.devnull,
        },
    )  # fmt: skip


def test_an_environment_that_was_stopped_while_it_was_made_is_made_whole(repository: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", ".venv"], cwd=repository, check=True)
    (repository / ".venv" / "mine").write_text("kept")
    result = source(repository)
    assert "installing mhla-diffusion[test]" in result.stdout
    assert "No module named pip" not in result.stderr
    assert "No matching distribution found for torch" in result.stderr
    assert result.returncode
    assert (repository / ".venv" / "mine").read_text() == "kept"
    assert not (repository / ".venv" / "installed-for").exists()


def test_a_python_that_is_too_old_is_refused(repository: Path) -> None:
    old = repository / ".venv" / "bin" / "python"
    old.parent.mkdir(parents=True)
    old.write_text('#!/bin/sh\n[ "$1" = -m ]\n')  # has pip, and fails whatever is asked of its version
    old.chmod(0o755)
    result = source(repository)
    assert result.stderr == (
        "error: .venv is of a Python before 3.10: remove it, and set PYTHON to a newer one\n"
    )
    assert (result.returncode, result.stdout) == (1, "")


def test_a_second_script_waits_for_the_first(repository: Path) -> None:
    if shutil.which("flock") is None:
        pytest.skip("no flock")
    python = repository / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    # Installs until it is told to end, in which time nobody else may be installing.
    python.write_text(
        '#!/bin/sh\n[ "$3" = install ] || exit 0\nmkdir installing || exit 9\n'
        "until [ -e end ]; do sleep 0.05; done\nrmdir installing\n"
    )
    python.chmod(0o755)
    command = ["bash", "-euo", "pipefail", "-c", "exec 2>$1; source scripts/environment.sh test", "bash"]

    def start(errors: str) -> subprocess.Popen[str]:
        return subprocess.Popen([*command, errors], cwd=repository, stdout=subprocess.PIPE, text=True)

    def wait_until(come: Callable[[], bool]) -> None:
        for _ in range(1000):
            if come():
                return
            time.sleep(0.05)
        pytest.fail("it did not come")

    first = start("first")
    wait_until((repository / "installing").is_dir)
    second, told = start("second"), repository / "second"
    wait_until(lambda: told.exists() and "waiting for its end" in told.read_text())
    (repository / "end").touch()
    outputs = [process.communicate(timeout=60)[0] for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], told.read_text()
    assert (repository / "first").read_text() == ""
    assert ["installing" in output for output in outputs] == [True, False], "what is there is not made again"
