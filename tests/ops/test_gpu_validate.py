"""The script for the day that there is a GPU: here on a CPU, on tiny shapes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def run(*arguments: object, blocked: str = "") -> subprocess.CompletedProcess[str]:
    """The script in a process of its own, in which the blocked packages are not there."""
    code = (
        "import runpy, sys; sys.path.insert(0, 'scripts'); sys.argv[0] = 'scripts/gpu_validate.py'\n"
        f"sys.modules.update(dict.fromkeys({blocked.split()}))\n"
        "runpy.run_path('scripts/gpu_validate.py', run_name='__main__')"
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_every_check_runs_and_passes(tmp_path: Path) -> None:
    result = run("--device", "cpu", "--out", tmp_path / "out")
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads((tmp_path / "out" / "gpu_validate.json").read_text())
    assert {row["stage"] for row in rows} == {"machine", "correct", "runtime", "speed", "models"}
    assert all(row["ok"] for row in rows)
    assert len(rows) >= 35
    assert (tmp_path / "out" / "gpu_validate.md").read_text().startswith("| stage | check | ok |")


def test_it_needs_the_operator_alone() -> None:
    result = run("--device", "cpu", "--stage", "models", blocked="diffusers jsonargparse transformers")
    assert "not installed: not checked" in result.stdout, result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_it_says_that_no_gpu_is_there() -> None:
    result = run()
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith("error: no GPU is there; --device cpu")
