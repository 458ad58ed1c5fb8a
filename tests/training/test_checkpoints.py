"""Folders that are whole or not there."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from mhla_diffusion.training import checkpoints


def write(text: str) -> object:
    def into(folder: Path) -> None:
        (folder / "part").mkdir()
        (folder / "part" / "weights").write_text(text)

    return into


def test_a_write_that_fails_leaves_the_old_folder(tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    checkpoints.write_atomically(folder, write("old"))

    def fail(path: Path) -> None:
        (path / "weights").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        checkpoints.write_atomically(folder, fail)
    assert (folder / "part" / "weights").read_text() == "old"
    assert not (folder / "weights").exists()
    checkpoints.write_atomically(folder, write("new"))
    assert (folder / "part" / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]


def test_a_process_killed_while_writing_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    first = checkpoints.checkpoint_folder(tmp_path, 1)
    checkpoints.write_atomically(first, write("one"))
    child = os.fork()
    if child == 0:

        def die(path: Path) -> None:
            (path / "weights").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

        checkpoints.write_atomically(checkpoints.checkpoint_folder(tmp_path, 2), die)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert checkpoints.list_checkpoints(tmp_path) == [first]
    second = checkpoints.checkpoint_folder(tmp_path, 2)
    checkpoints.write_atomically(second, write("two"))
    assert checkpoints.list_checkpoints(tmp_path) == [first, second]
    assert sorted(path.name for path in second.iterdir()) == ["part"]


def test_rotation_keeps_the_latest(tmp_path: Path) -> None:
    folders = [checkpoints.checkpoint_folder(tmp_path, step) for step in (5, 10, 100, 1000)]
    for folder in reversed(folders):
        checkpoints.write_atomically(folder, write("x"))
    checkpoints.keep_latest(tmp_path, 2)
    assert checkpoints.list_checkpoints(tmp_path) == folders[2:]
    checkpoints.keep_latest(tmp_path, 5)
    assert checkpoints.list_checkpoints(tmp_path) == folders[2:]
