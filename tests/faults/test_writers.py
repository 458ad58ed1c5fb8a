"""Two writers, full disks, kills and signals."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mhla_diffusion.files.locking import new_folder, only_writer
from mhla_diffusion.files.writing import disk_errors, write_file, write_folder
from mhla_diffusion.training import ImageTrainingConfig, train_image
from mhla_diffusion.training.progress import MetricsFile, StopRequest
from tests.processes import run_script

Run = Callable[..., subprocess.CompletedProcess[str]]


@contextmanager
def child(work: Callable[[], None]) -> Iterator[int]:
    """A fork that does something, and is killed at the end."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os.write(writer, b"done")
            time.sleep(60)
        finally:
            os._exit(0)
    os.close(writer)
    try:
        assert os.read(reader, 4) == b"done"
        yield pid
    finally:
        os.close(reader)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_second_writer_is_refused_until_the_first_ends_however_it_ends(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "run"
    held = only_writer(folder)
    with child(held.__enter__), pytest.raises(ValueError, match=f"another process is writing to {folder}"):
        only_writer(folder).__enter__()
    with only_writer(folder):
        assert list(folder.iterdir()) == []
        with pytest.raises(ValueError, match="another process is writing to"):
            only_writer(folder).__enter__()
        (folder / "file").touch()
    with only_writer(folder):
        pass
    assert (folder / "file").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file; a folder is needed"):
        only_writer(tmp_path / "file").__enter__()


def test_a_folder_in_which_nothing_was_written_goes_again(tmp_path: Path) -> None:
    with only_writer(tmp_path / "new"):
        assert (tmp_path / "new").is_dir()
    assert not (tmp_path / "new").exists()
    (tmp_path / "mine").mkdir()
    with only_writer(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").is_dir()


def nothing() -> None:
    pass


def test_a_lock_does_not_live_on_in_a_worker(tmp_path: Path) -> None:
    lock = only_writer(tmp_path)
    lock.__enter__()
    with child(nothing):  # as a worker that reads data outlives a trainer that was killed
        lock.__exit__(None, None, None)
        with only_writer(tmp_path):
            pass


def test_training_in_a_folder_that_another_process_trains_in_is_refused(run: Run, tmp_path: Path) -> None:
    with only_writer(tmp_path / "run"):
        result = run("--output_dir", str(tmp_path / "run"))
    assert result.returncode == 1
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("error")]
    assert line.startswith(f"error: another process is writing to {tmp_path / 'run'}")


def test_two_conversions_exports_or_reports_at_once_in_one_folder_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    images = tmp_path / "images"
    images.mkdir()
    commands: dict[str, tuple[object, ...]] = {
        "convert": ("--model", "nowhere", "--out", out),
        "export_images": ("--data.source", "mnist", "--num", "1", "--out", out),
        "export_videos": ("--data.source", "moving_mnist", "--num", "1", "--out", out),
        "evaluate": ("image", "--real", images, "--generated", images, "--out", out),
    }
    with only_writer(out):
        for name, arguments in commands.items():
            result = run_script(name, *arguments)
            assert result.returncode == 1
            assert f"error: another process is writing to {out}" in result.stderr
    succeeded = run_script("export_images", *commands["export_images"])
    assert succeeded.returncode == 0, succeeded.stderr


def test_a_folder_that_was_made_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as target:
        write_folder(target, lambda path: (path / "mine").touch())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    with pytest.raises(ValueError, match="is there already"), new_folder(tmp_path / "out"):
        pass
    with pytest.raises(RuntimeError), new_folder(tmp_path / "failed"):
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_there_is_no_moment_without_the_old_or_the_new_folder(tmp_path: Path) -> None:
    folder, missing, done = tmp_path / "pipeline", [], threading.Event()
    write_folder(folder, lambda path: (path / "weights").touch())

    def look() -> None:
        while not done.is_set():
            try:
                os.stat(folder / "weights")
            except FileNotFoundError:
                missing.append(time.time())

    with ThreadPool(1) as pool:
        looking = pool.apply_async(look)
        for _ in range(100):
            write_folder(folder, lambda path: (path / "weights").touch())
        done.set()
        looking.get()
    assert not missing
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """No file may grow beyond a size, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "bytes": lambda path: path.write_bytes(bytes(100_000)),
    "safetensors": lambda path: save_file({"weights": torch.zeros(100_000)}, path),
    "torch": lambda path: torch.save({"weights": torch.zeros(100_000)}, path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_an_os_error_and_leaves_nothing_half_written(name: str, tmp_path: Path) -> None:
    with disk_of(20_000):
        with pytest.raises(OSError, match=r"File too large|Input/output error") as caught:
            write_file(tmp_path / "weights", WRITERS[name])
        assert caught.value.errno in (errno.EFBIG, errno.EIO)
        with pytest.raises(OSError, match=r"File too large|Input/output error"):
            write_folder(tmp_path / "folder", lambda path: WRITERS[name](path / "weights"))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    def fill(path: Path) -> None:
        path.unlink(missing_ok=True)
        path.symlink_to("/dev/full")
        path.write_bytes(bytes(100_000))

    said = r"No space left on device \(the disk at /.* has [\d.]+ of [\d.]+ GB left\)"
    with pytest.raises(OSError, match=said) as caught:
        write_file(tmp_path / "weights", fill)
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match=said):
        write_folder(tmp_path / "folder", lambda folder: fill(folder / "weights"))
    full = sqlite3.connect(tmp_path / "full.sqlite")
    full.execute("PRAGMA max_page_count = 2")
    full.execute("CREATE TABLE rows (data BLOB)")
    with pytest.raises(OSError, match=said), disk_errors(tmp_path):
        full.execute("INSERT INTO rows VALUES (zeroblob(100000))")


def test_a_disk_that_is_full_at_a_checkpoint_leaves_no_half_of_one(config: ImageTrainingConfig) -> None:
    with disk_of(40_000), pytest.raises(OSError, match=r"File too large: .*step-00000003"):
        train_image(config)
    assert list((Path(config.output_dir) / "checkpoints").iterdir()) == []
    assert train_image(config) == 0


def signalled(numbers: list[signal.Signals]) -> int:
    """The status of a process in which a stop is asked for by these signals, one after the other."""
    pid = os.fork()
    if pid == 0:
        with StopRequest() as request:
            for number in numbers:
                os.kill(os.getpid(), number)
                time.sleep(0.05)
            os._exit(request.signal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_damaged_lines_of_metrics_are_dropped_and_the_others_kept(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        metrics.append({"step": step, "loss": math.nan if step == 2 else 0.5})
    whole = metrics.path.read_text().splitlines(keepends=True)
    assert json.loads(whole[1]) == {"step": 2, "loss": None}, "JSON has no NaN"
    damaged = b"\0\0" + whole[0].encode() + b'{"step": \xff}\n[1]\n{"loss": 1}\n'
    metrics.path.write_bytes(damaged + "".join(whole).encode() + whole[0][:9].encode())
    metrics.forget_after(2)
    assert metrics.path.read_text() == "".join(whole[:2])


def test_ctrl_c_twice_stops_at_once_and_sigterm_twice_is_still_one_request() -> None:
    interrupt, terminate = signal.SIGINT, signal.SIGTERM
    assert signalled([interrupt]) == interrupt
    assert signalled([interrupt, interrupt]) == -interrupt
    assert signalled([terminate, terminate]) == terminate
    assert signalled([interrupt, terminate]) == terminate


def test_a_signal_cuts_short_what_can_be_left_out() -> None:
    with StopRequest() as request:
        assert request.interruptible(lambda: "samples") == "samples"
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        started = time.perf_counter()
        assert request.interruptible(lambda: time.sleep(30)) is None
        assert time.perf_counter() - started < 10
        assert request.interruptible(lambda: "another") is None
        assert request.signal == signal.SIGTERM
