"""Reading and writing videos, and every kind of broken file."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from mhla_diffusion.files.videos import UnreadableVideoError, clip_indices, open_video, write_video

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


def _av1(path: Path) -> None:
    source = "testsrc=size=64x64:rate=10:duration=1"
    ffmpeg("-f", "lavfi", "-i", source, "-c:v", "libaom-av1", "-cpu-used", "8", str(path))


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
        (_cut_in_the_middle, "cannot be decoded|only the beginning"),
        (_audio, "audio alone, or AV1"),
        (_av1, "audio alone, or AV1, which the decoder torchcodec reads"),
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


@pytest.mark.parametrize(
    ("num_frames", "length", "step", "start", "expected"),
    [
        (20, 4, 1.0, 0.0, [0, 1, 2, 3]),
        (20, 4, 1.0, 1.0, [16, 17, 18, 19]),
        (20, 4, 2.0, 0.0, [0, 2, 4, 6]),
        (20, 4, 2.5, 0.0, [0, 2, 5, 7]),
        (3, 4, 0.5, 0.0, [0, 0, 1, 1]),
        (1, 1, 1.0, 0.5, [0]),
    ],
)
def test_frames_of_a_clip(
    num_frames: int, length: int, step: float, start: float, expected: list[int]
) -> None:
    assert clip_indices(num_frames, length=length, step=step, start=start) == expected


def test_a_video_shorter_than_the_clip_is_refused() -> None:
    with pytest.raises(UnreadableVideoError, match=r"16 frames, each 2 after .* need 31, and there are 20"):
        clip_indices(20, length=16, step=2)


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


def test_a_decoder_that_is_not_installed_is_named(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mhla_diffusion.files.videos.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install torchcodec"):
        open_video(video, decoder="torchcodec")
    with pytest.raises(ImportError, match="reading videos needs decord"):
        open_video(video)
