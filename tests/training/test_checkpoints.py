"""Which checkpoints there are."""

from __future__ import annotations

from pathlib import Path

from mhla_diffusion.files.writing import start_writing, write_folder
from mhla_diffusion.training import checkpoints


def write(folder: Path) -> None:
    (folder / "weights").write_text("x")


def test_what_is_still_written_is_no_checkpoint(tmp_path: Path) -> None:
    first = checkpoints.checkpoint_folder(tmp_path, 1)
    write_folder(first, write)
    write(start_writing(checkpoints.checkpoint_folder(tmp_path, 2)))
    assert checkpoints.list_checkpoints(tmp_path) == [first]


def test_rotation_keeps_the_latest(tmp_path: Path) -> None:
    folders = [checkpoints.checkpoint_folder(tmp_path, step) for step in (5, 10, 100, 1000)]
    for folder in reversed(folders):
        write_folder(folder, write)
    checkpoints.keep_latest(tmp_path, 2)
    assert checkpoints.list_checkpoints(tmp_path) == folders[2:]
    checkpoints.keep_latest(tmp_path, 5)
    assert checkpoints.list_checkpoints(tmp_path) == folders[2:]
