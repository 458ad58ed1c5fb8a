"""Checkpoints that are no longer what was written, and runs that have none."""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint
from safetensors.torch import load_file

from mhla_diffusion.files.sums import SUMS
from mhla_diffusion.training import ImageTrainingConfig
from mhla_diffusion.training.checkpoints import find_checkpoint, list_checkpoints, require_loadable
from mhla_diffusion.training.pickles import require_known_names

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def whole(run: Run, tmp_path: Path) -> Path:
    """A run with checkpoints after steps 3 and 6, its last."""
    result = run("--output_dir", str(tmp_path / "whole"))
    assert result.returncode == 0, result.stdout
    return tmp_path / "whole"


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def weights(output_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(output_dir / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")


def test_auto_is_the_latest_or_a_new_run(whole: Path, config: ImageTrainingConfig, tmp_path: Path) -> None:
    assert find_checkpoint(whole, "auto", config) == list_checkpoints(whole)[-1]
    assert find_checkpoint(tmp_path / "new", "auto", config) is None
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.pdf").touch()
    for resume in ("auto", "latest", None):
        with pytest.raises(ValueError, match=r"holds no checkpoint of a run \(thesis\.pdf\): choose another"):
            find_checkpoint(tmp_path / "mine", resume, config)


def test_a_bit_flipped_anywhere_is_found_and_the_file_named(
    whole: Path, config: ImageTrainingConfig, caplog: pytest.LogCaptureFixture
) -> None:
    before, last = list_checkpoints(whole)
    assert find_checkpoint(whole, "latest", config) == last
    names = sorted(path.name for path in last.iterdir())
    assert len(names) == 8
    for name in names:
        path = last / name
        content = path.read_bytes()
        for position in (0, len(content) // 2, len(content) - 2):
            flip(path, position)
            caplog.clear()
            assert find_checkpoint(whole, "latest", config) == before
            # A record that is damaged itself names the file whose line it was.
            assert f"{last} is damaged: " in caplog.text
            assert name == SUMS or name in caplog.text
            with pytest.raises(ValueError, match=r"is damaged: .*; --resume latest goes on from"):
                find_checkpoint(whole, str(last), config)
            path.write_bytes(content)
        for damaged in (b"", content[: len(content) // 2], None):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            if name != SUMS or damaged is not None:
                assert find_checkpoint(whole, "latest", config) == before
            path.write_bytes(content)
    assert find_checkpoint(whole, "latest", config) == last
    for checkpoint in (before, last):
        flip(checkpoint / "model.safetensors", 3000)
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole"):
        find_checkpoint(whole, "latest", config)


def test_resume_latest_goes_on_before_a_damaged_checkpoint_to_the_same_end(whole: Path, run: Run) -> None:
    expected = weights(whole)
    shutil.rmtree(whole / "pipeline")
    flip(whole / "checkpoints" / "step-00000006" / "optimizer.bin", 5000)
    result = run("--output_dir", str(whole), "--resume", "latest")
    assert result.returncode == 0, result.stdout
    assert "step-00000006 is damaged: optimizer.bin; trying the one before" in result.stdout
    names = sorted(path.name for path in (whole / "checkpoints").iterdir())
    assert names == ["damaged-step-00000006", "step-00000003", "step-00000006"]
    assert all(torch.equal(value, expected[name]) for name, value in weights(whole).items())


def test_what_no_hash_covers_is_said(
    whole: Path, config: ImageTrainingConfig, caplog: pytest.LogCaptureFixture
) -> None:
    last = list_checkpoints(whole)[-1]
    require_loadable(last, 0)
    assert not caplog.text
    (last / SUMS).unlink()
    (last / "random_states_0.pkl").write_bytes(b"")
    assert find_checkpoint(whole, "latest", config) == last
    assert f"{last} has no SHA256SUMS" in caplog.text
    require_loadable(last, 0)
    assert "random_states_0.pkl cannot be read" in caplog.text
    assert "not as the uninterrupted one to the bit" in caplog.text


def test_a_pickle_that_runs_code_is_refused(whole: Path, run: Run, tmp_path: Path) -> None:
    last = whole / "checkpoints" / "step-00000006"
    (last / SUMS).unlink()
    for name in ("custom_checkpoint_1.pkl", "optimizer.bin"):
        content = (last / name).read_bytes()
        torch.save(Runs(tmp_path / "ran"), last / name)
        result = run("--output_dir", str(tmp_path / "branch"), "--resume", str(last))
        assert result.returncode == 1
        assert "cannot be loaded: Weights only load failed" in result.stdout
        assert "Traceback" not in result.stdout
        (last / name).write_bytes(content)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "branch").exists()


class Runs:
    """Leaves a file behind where it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.file}",)


def test_what_deepspeed_and_fsdp_would_unpickle_is_looked_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("deepspeed.runtime.fp16.loss_scaler")
    scaler = type("LossScaler", (), {"__module__": module.__name__})
    module.LossScaler = scaler  # type: ignore[attr-defined]
    for name in ("deepspeed", "deepspeed.runtime", "deepspeed.runtime.fp16", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    model = torch.nn.Linear(2, 2)
    states = {"module": model.state_dict(), "scaler": scaler(), "half": torch.ones(2).bfloat16()}
    torch.save(states, tmp_path / "mp_rank_00_model_states.pt")
    torch.distributed.checkpoint.save(states["module"], checkpoint_id=tmp_path / "fsdp", no_dist=True)
    known = [tmp_path / "mp_rank_00_model_states.pt", tmp_path / "fsdp" / ".metadata"]
    for path in known:
        require_known_names(path)
    torch.save({**states, "more": Runs(tmp_path / "ran")}, known[0])
    known[1].write_bytes(pickle.dumps({"more": Runs(tmp_path / "ran")}))
    for path in known:
        with pytest.raises(ValueError, match=r"would call posix\.system when it is loaded"):
            require_known_names(path)
        path.write_bytes(path.read_bytes()[:40])
        with pytest.raises(ValueError, match=r"cannot be read .*: go on from another checkpoint"):
            require_known_names(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("arguments", [(), ("--resume", "latest")], ids=["started again", "resumed"])
def test_a_run_killed_before_its_first_checkpoint_begins_anew(
    arguments: tuple[str, ...], whole: Path, run: Run
) -> None:
    expected = weights(whole)
    shutil.rmtree(whole / "checkpoints")
    shutil.rmtree(whole / "pipeline")
    unfinished = [whole / "checkpoints" / ".writing-1", whole / ".writing-2", whole / ".writing-3"]
    for folder, name in zip(unfinished, ("step-00000003", "pipeline", "lora"), strict=True):
        (folder / name).mkdir(parents=True)
    with (whole / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    result = run("--output_dir", str(whole), *arguments)
    assert result.returncode == 0, result.stdout
    assert "was stopped before its first checkpoint: it begins anew" in result.stdout
    assert len((whole / "metrics.jsonl").read_text().splitlines()) == 6
    assert all(torch.equal(value, expected[name]) for name, value in weights(whole).items())
    assert not any(folder.exists() for folder in unfinished)


def test_a_folder_with_files_of_the_users_is_no_run_that_was_killed(
    tmp_path: Path, config: ImageTrainingConfig, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    assert find_checkpoint(tmp_path / "run", None, config) is None
    (tmp_path / "run" / "thesis.tex").touch()
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match="is not empty"):
        find_checkpoint(tmp_path / "run", None, config)
