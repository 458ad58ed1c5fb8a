"""Reading and writing videos, and every kind of broken file."""

from __future__ import annotations

import multiprocessing
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from mhla_diffusion.files import videos
from mhla_diffusion.files.videos import (
    Decoder,
    UnreadableVideoError,
    VideoReader,
    open_video,
    write_video,
)

imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")


def counting_frames(count: int = 20, height: int = 32, width: int = 48) -> np.ndarray:
    """Frame i has the gray value 10 i."""
    return np.broadcast_to(
        10 * np.arange(count, dtype=np.uint8)[:, None, None], (count, height, width)
    ).copy()


@pytest.fixture
def video(tmp_path: Path) -> Path:
    path = tmp_path / "video.mp4"
    write_video(counting_frames(), path, fps=10)
    return path


def ffmpeg(*arguments: str) -> None:
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", *arguments], check=True)


def read_whole(path: Path) -> np.ndarray:
    reader = open_video(path)
    return reader.read(range(reader.num_frames))


def _missing(path: Path) -> None:
    pass


def _empty(path: Path) -> None:
    path.touch()


def _text(path: Path) -> None:
    path.write_text("no video" * 100)


def _cut_short(path: Path) -> None:
    write_video(counting_frames(), path, fps=10)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _cut_in_the_middle(path: Path) -> None:
    # With its index in front, so that the file opens and fails later.
    whole = path.with_name("whole.mp4")
    write_video(np.random.default_rng(0).integers(0, 255, (30, 64, 64, 3), dtype=np.uint8), whole, fps=10)
    ffmpeg("-i", str(whole), "-c", "copy", "-movflags", "faststart", str(path))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 4])


def _audio(path: Path) -> None:
    ffmpeg("-f", "lavfi", "-i", "sine=duration=1", str(path))


def _song_with_a_cover(path: Path) -> None:
    picture = path.with_name("cover.png")
    Image.new("RGB", (32, 32)).save(picture)
    inputs = ("-f", "lavfi", "-i", "sine=duration=1", "-i", str(picture))
    ffmpeg(*inputs, "-map", "0", "-map", "1", "-c:v", "copy", "-disposition:v", "attached_pic", str(path))


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _list_of_other_files(path: Path) -> None:
    write_video(counting_frames(), path.with_name("other.mp4"), fps=10)
    path.write_text("ffconcat version 1.0\nfile other.mp4\n")


def test_what_is_written_is_read_again(video: Path) -> None:
    reader = open_video(video)
    assert (reader.num_frames, reader.fps) == (20, 10)
    frames = reader.read([3, 0, 19])
    assert (frames.shape, frames.dtype) == ((3, 32, 48, 3), np.uint8)
    assert frames.mean(axis=(1, 2, 3)) == pytest.approx([30, 0, 190], abs=3)
    assert [path.name for path in video.parent.iterdir()] == ["video.mp4"]


def test_odd_sizes_are_enlarged_by_one(tmp_path: Path) -> None:
    write_video(np.zeros((2, 33, 35, 3), np.uint8), tmp_path / "odd.mp4", fps=8)
    assert open_video(tmp_path / "odd.mp4").read([0]).shape == (1, 34, 36, 3)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_missing, "no such file"),
        (_empty, "the file is empty"),
        (_text, "is no video, or only the beginning of one"),
        (_cut_short, "is no video, or only the beginning of one"),
        (_cut_in_the_middle, "only the beginning"),
        (_audio, "holds no video: audio alone"),
        (_song_with_a_cover, "holds no video: audio alone"),
        (_pipe, "is not a regular file"),
        (_device, "is not a regular file"),
        (_list_of_other_files, "is no video|cannot be decoded"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_broken_file_is_named_with_the_reason(
    tmp_path: Path, make: Callable[[Path], None], reason: str
) -> None:
    path = tmp_path / "broken.mp4"
    make(path)
    with pytest.raises(UnreadableVideoError, match=rf"broken\.mp4.*({reason})"):
        read_whole(path)


class _Opened(torch.utils.data.Dataset):
    def __init__(self, path: Path) -> None:
        self.path = path

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> float:
        return float(open_video(self.path).read([index]).mean())


def test_workers_open_their_own_readers(video: Path) -> None:
    values = [float(value) for value in DataLoader(_Opened(video), batch_size=None, num_workers=2)]
    assert values == pytest.approx([0, 10, 20, 30], abs=3)


def test_frames_of_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"frames must be uint8 \[F, H, W, 3\] or \[F, H, W\], got float64"):
        write_video(np.zeros((2, 8, 8)), tmp_path / "out.mp4", fps=8)


def test_what_is_needed_and_not_installed_is_named(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mhla_diffusion.files.videos.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"reading videos needs PyAV: .* pip install .*av"):
        open_video(video)
    with pytest.raises(ImportError, match=r"written with imageio-ffmpeg: .* pip install "):
        write_video(counting_frames(), video, fps=10)


def test_an_unknown_decoder_is_refused(video: Path) -> None:
    with pytest.raises(ValueError, match="decoder must be one of auto, pyav, decord, torchcodec, got 'cv2'"):
        open_video(video, decoder=cast(Decoder, "cv2"))


def test_the_decoder_of_older_configs_is_said_to_be_another(
    video: Path, caplog: pytest.LogCaptureFixture
) -> None:
    videos._say_that_torchcodec_is_not_used.cache_clear()
    for _ in range(2):
        frames = open_video(video, decoder="torchcodec").read([3])
    assert np.array_equal(frames, open_video(video).read([3]))
    assert caplog.messages == ["The decoder torchcodec is no longer used; videos are read with PyAV."]


def test_decord_that_is_not_installed_is_named(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "decord", None)
    with pytest.raises(ImportError, match="package decord is not installed: pip install decord"):
        open_video(video, decoder="decord")
    assert open_video(video).num_frames == 20


def _write_with_files_limited_to(limit: int, path: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    noise = np.random.default_rng(0).integers(0, 255, (30, 64, 64, 3), dtype=np.uint8)
    said = f"{path} could not be written.*is the disk full, or a limit of files reached"
    try:
        write_video(noise, path, fps=10)
    except OSError as error:
        os._exit(7 if re.search(said, str(error)) else 8)
    os._exit(0)


@pytest.mark.parametrize(("limit", "code"), [(4_000, 7), (100_000, 7), (10_000_000, 0)])
def test_a_video_that_could_not_be_written_whole_gets_no_name(tmp_path: Path, limit: int, code: int) -> None:
    path = tmp_path / "video.mp4"
    path.write_bytes(b"what was there")
    process = multiprocessing.get_context("fork").Process(
        target=_write_with_files_limited_to, args=(limit, path)
    )
    process.start()
    process.join()
    assert process.exitcode == code
    assert [file.name for file in tmp_path.iterdir()] == ["video.mp4"]
    assert (path.read_bytes() == b"what was there") == (code == 7)


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_workers_read_after_this_process_did(video: Path, decoder: Decoder) -> None:
    if decoder == "decord":
        pytest.importorskip("decord")
    reader = open_video(video, decoder=decoder)
    assert len(reader.read([0, 19])) == 2
    loader = DataLoader(_Read(reader), batch_size=None, num_workers=2, timeout=60)
    assert [float(value) for value in loader] == pytest.approx([0, 10, 20, 30], abs=3)


class _Read(_Opened):
    """Reads through a reader that was opened in another process."""

    def __init__(self, reader: VideoReader) -> None:
        self.reader = reader

    def __getitem__(self, index: int) -> float:
        return float(self.reader.read([index]).mean())


def _picture_folder(folder: Path, names: Sequence[str]) -> Path:
    folder.mkdir()
    for i, name in enumerate(names):
        Image.new("RGB", (8, 6), (10 * i, 0, 5)).save(folder / name)
    return folder


def test_a_folder_of_pictures_is_a_video(tmp_path: Path) -> None:
    folder = _picture_folder(
        tmp_path / "clip", ["frame_1.png", "frame_2.png", "frame_10.png", "frame_11.bmp"]
    )
    (folder / "notes.txt").touch()
    (folder / "._frame_3.png").touch()
    reader = open_video(folder)
    assert (reader.num_frames, reader.fps, reader.times) == (4, 25.0, None)
    frames = reader.read([3, 0, 2, 0])
    assert (frames.shape, frames.dtype) == ((4, 6, 8, 3), np.uint8)
    assert frames[:, 0, 0].tolist() == [[30, 0, 5], [0, 0, 5], [20, 0, 5], [0, 0, 5]]


def test_a_folder_that_is_no_video_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(UnreadableVideoError, match=r"a folder without pictures \(.bmp"):
        open_video(tmp_path)
    folder = _picture_folder(tmp_path / "clip", ["1.png", "2.png", "3.png", "4.png"])
    with pytest.raises(UnreadableVideoError, match="has the frames 0 to 3, asked were"):
        open_video(folder).read([4])
    Image.new("RGB", (9, 6)).save(folder / "2.png")
    with pytest.raises(UnreadableVideoError, match=r"of one size, got .*1\.png 6 x 8, .*2\.png 6 x 9"):
        open_video(folder).read([0, 1])
    Image.fromarray(np.full((6, 8), 4000, np.uint16)).save(folder / "3.png")
    with pytest.raises(
        UnreadableVideoError, match=r"3\.png cannot be read \(integer pixels from 4000 to 4000 would"
    ):
        open_video(folder).read([2])
    (folder / "4.png").write_bytes((folder / "1.png").read_bytes()[:40])
    with pytest.raises(UnreadableVideoError, match=r"4\.png cannot be read"):
        open_video(folder).read([3])


def test_names_that_ffmpeg_would_take_for_something_else_are_names(tmp_path: Path) -> None:
    for name in ("concat:a|b.mp4", "100%.mp4", "frame%03d.mp4", "http:x.mp4", b"caf\xe9.mp4"):
        path = tmp_path / os.fsdecode(name)
        write_video(counting_frames(4), tmp_path / "plain.mp4", fps=10)
        (tmp_path / "plain.mp4").rename(path)
        assert open_video(path).num_frames == 4
