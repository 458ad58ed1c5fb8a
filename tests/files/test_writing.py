"""Files and folders that are whole or not there."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mhla_diffusion.files.sums import SUMS, damaged_files, read_sums, record_sums
from mhla_diffusion.files.writing import remove_unfinished, require_new_folder, write_file, write_folder


def write(text: str) -> object:
    def into(folder: Path) -> None:
        (folder / "part").mkdir()
        (folder / "part" / "weights").write_text(text)

    return into


def test_a_write_that_fails_leaves_the_old_folder(tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    write_folder(folder, write("old"))

    def fail(path: Path) -> None:
        (path / "weights").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_folder(folder, fail)
    assert (folder / "part" / "weights").read_text() == "old"
    assert not (folder / "weights").exists()
    write_folder(folder, write("new"))
    assert (folder / "part" / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]


def test_the_working_folder_cannot_be_written_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in (".", tmp_path, f"../{tmp_path.name}"):
        with pytest.raises(ValueError, match="is the working folder: name a folder in it"):
            require_new_folder(folder)
    assert require_new_folder("out") == tmp_path.resolve() / "out"


def test_a_file_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 251 + ".txt")
    write_file(path, "old")

    def fail(temporary: Path) -> None:
        assert temporary.suffix == ".txt"
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_file(path, fail)
    assert path.read_text() == "old"
    write_file(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new"
    write_file(path, b"bytes")
    assert path.read_text() == "bytes"
    assert list(tmp_path.iterdir()) == [path]
    write_file(tmp_path / "a" / "b", "in new folders, readable as any other file")
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o666 & ~umask


def test_writers_side_by_side_and_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".writing").mkdir()
    (tmp_path / ".writing" / "mine").write_text("precious")

    def outer(folder: Path) -> None:
        assert folder.name == "one", "what is written may read its name off its folder"
        write_folder(tmp_path / "two", write("two"))
        write("one")(folder)  # type: ignore[operator]

    write_folder(tmp_path / "one", outer)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".writing", "one", "two"]
    assert (tmp_path / ".writing" / "mine").read_text() == "precious"


def test_a_process_killed_while_writing_leaves_the_old_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "run", write("old"))
    child = os.fork()
    if child == 0:

        def die(path: Path) -> None:
            (path / "weights").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

        write_folder(tmp_path / "run", die)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert (tmp_path / "run" / "part" / "weights").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2
    remove_unfinished(tmp_path, "other")
    assert len(list(tmp_path.iterdir())) == 2
    remove_unfinished(tmp_path, "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_is_written_can_be_read_as_the_umask_says(tmp_path: Path) -> None:
    """safetensors writes files that their owner alone may read."""
    before = os.umask(0o027)
    try:
        write_folder(tmp_path / "model", lambda path: save_file({"a": torch.ones(2)}, path / "a.safetensors"))
        write_file(tmp_path / "b.safetensors", lambda path: save_file({"b": torch.ones(2)}, path))
        write_file(tmp_path / "c.txt", "text")
    finally:
        os.umask(before)
    for name in ("model/a.safetensors", "b.safetensors", "c.txt"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o640, name


def test_a_record_that_was_cut_short_goes_on_in_a_line_of_its_own(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).write_text(name)
    record_sums(tmp_path, "ab")
    whole = read_sums(tmp_path)
    assert whole is not None
    assert set(whole) == {"a", "b"}
    record = tmp_path / SUMS
    record.write_text(record.read_text()[:-10])  # by a full disk, in the sum of b
    record_sums(tmp_path, "c")
    after = read_sums(tmp_path)
    assert after is not None
    assert set(after) == {"a", "c"}
    assert after["a"] == whole["a"]
    assert damaged_files(tmp_path) == ["b"]
