"""The script for the day that there is a GPU: here on a CPU, on tiny shapes."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parents[2]
# Checks that each stage has, at least.
NUMBERS = {"correct": 20, "forms": 72, "runtime": 8, "speed": 2, "form_times": 24, "models": 3}


def run(*arguments: object, blocked: str = "") -> subprocess.CompletedProcess[str]:
    """The script in a process of its own, in which the blocked packages are not there."""
    code = (
        "import runpy, sys; sys.path.insert(0, 'scripts'); sys.argv[0] = 'scripts/gpu_validate.py'\n"
        f"sys.modules.update(dict.fromkeys({blocked.split()}))\n"
        "runpy.run_path('scripts/gpu_validate.py', run_name='__main__')"
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.setenv("MHLA_KERNELS", "auto")
    yield importlib.import_module("gpu_validate")
    for name in ("gpu_validate", "gpu_checks", "gpu_forms"):
        del sys.modules[name]


@pytest.mark.parametrize("stage", list(NUMBERS))
def test_every_check_of_a_stage_runs_and_passes(script: Any, stage: str) -> None:
    results = {name: check() for name, check in script.STAGES[stage](script.Machine("cpu"))}
    assert len(results) >= NUMBERS[stage]
    assert all(good for _, good in results.values()), results


def test_rows_are_written(tmp_path: Path) -> None:
    result = run("--device", "cpu", "--stages", "machine", "--out", tmp_path / "out")
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads((tmp_path / "out" / "gpu_validate.json").read_text())
    assert [(row["stage"], row["check"], row["ok"]) for row in rows] == [
        ("machine", "versions", True),
        ("machine", "rates", True),
    ]
    assert (tmp_path / "out" / "gpu_validate.md").read_text().startswith("| stage | check | ok |")


def test_a_process_that_dies_is_a_row(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script.sys, "executable", "/bin/false")
    rows = script.run_in_processes("machine", "cpu")
    assert [(row["check"], row["ok"]) for row in rows] == [("process", False)]
    assert "exit 1" in rows[0]["result"]


def test_all_stages_together_have_a_limit(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "MOST", 0)
    monkeypatch.setattr(script.sys, "argv", ["gpu_validate.py", "--device", "cpu", "--stages", "runtime"])
    assert script.main() == 1
    assert "| runtime | process | NO | stopped at the limit of 0 s |" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [1.01, float("nan")])
def test_a_form_with_a_wrong_parameter_fails(script: Any, wrong: float) -> None:
    forms, at = sys.modules["gpu_forms"], script.Machine("cpu")
    for form, name in (("mixing from content", "strength"), ("window, gate", "local")):
        module, tensors, arguments = forms._make(at, forms.TINY["image"], forms.FORMS[form], "float32")
        expected = forms._dense(module, arguments, None, *tensors)
        getattr(module, name).data *= wrong
        _, good = forms.verdict([module(*tensors, **arguments)], [expected], forms.LIMIT["float32"])
        assert not good


class Copies(TorchDispatchMode):
    """Operators that read or write tensors of more than one device; numbers to fill with are no tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        self.seen += any(x.is_cuda for x in tensors)
        if len({x.device for x in tensors}) > 1 and func is not torch.ops.aten.fill_.Tensor:
            self.found.append(str(func))
        return out


def test_no_form_copies_between_processor_and_gpu(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph may hold no such copy. On tensors of a GPU that is not there, and holds no numbers."""
    monkeypatch.setenv("MHLA_KERNELS", "torch")
    forms, at = sys.modules["gpu_forms"], script.Machine("cpu")
    for shape in forms.TINY.values():
        for form, settings in forms.FORMS.items():
            module, tensors, arguments = forms._make(at, shape, settings, "bfloat16")
            here = module.state_dict()
            with FakeTensorMode():

                def there(x: torch.Tensor) -> torch.Tensor:
                    return torch.empty(x.shape, dtype=x.dtype, device="cuda")

                state = {name: there(x) for name, x in here.items()}
                inputs = tuple(there(x) for x in tensors)
                rotary = arguments["rotary_emb"]
                arguments["rotary_emb"] = rotary and tuple(there(x) for x in rotary)
                with Copies() as copies:
                    torch.func.functional_call(module, state, inputs, arguments)
            assert copies.seen > 5
            assert not copies.found, form


def test_it_needs_the_operator_alone() -> None:
    result = run("--device", "cpu", "--stage", "models", blocked="diffusers jsonargparse transformers")
    assert "not installed: not checked" in result.stdout, result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_it_says_that_no_gpu_is_there() -> None:
    result = run()
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith("error: no GPU is there; --device cpu")
