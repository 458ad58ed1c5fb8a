"""The environment that the scripts make for themselves, but for what is installed into it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
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
    # Installing takes a second, in which nobody else may be installing.
    python.write_text(
        '#!/bin/sh\n[ "$3" = install ] || exit 0\nmkdir installing || exit 9\nsleep 0.5\nrmdir installing\n'
    )
    python.chmod(0o755)
    command = ["bash", "-euo", "pipefail", "-c", "source scripts/environment.sh test; echo done"]
    both = [
        subprocess.Popen(command, cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sorted("waiting for its end" in errors for _, errors in said) == [False, True]
    assert sorted("installing" in output for output, _ in said) == [False, True], (
        "what is there is not made again"
    )
