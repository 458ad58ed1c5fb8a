"""Sets of videos, in files and arrays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mhla_diffusion.evaluation.sets.videos import open_videos, read_clip
from mhla_diffusion.files.videos import UnreadableVideoError
from tests.evaluation.clips import moving_squares

WriteVideos = Callable[..., Path]


def test_a_clip_depends_on_the_seed_and_the_name_alone(write_videos: WriteVideos) -> None:
    counting = np.broadcast_to(10 * np.arange(24, dtype=np.uint8)[:, None, None, None], (24, 32, 48, 3))
    folder = write_videos("videos", np.stack([counting] * 8))

    def starts(seed: int) -> list[int]:
        reads = open_videos(folder, frames=4, seed=seed).readers()
        return [round(float(read()[0].mean()) / 10) for read in reads]

    first = starts(0)
    assert len(set(first)) > 3
    assert first == starts(0)
    assert first != starts(1)
    (folder / "0000.mp4").unlink()
    assert starts(0) == first[1:]


def test_reading_a_clip_of_a_short_video_says_how_many_frames_it_has(write_videos: WriteVideos) -> None:
    folder = write_videos("videos", moving_squares(1, 0))
    with pytest.raises(UnreadableVideoError, match=r"need 31, and there are 12"):
        read_clip(folder / "0000.mp4", frames=16, stride=2, seed=0)


def test_videos_of_an_array_are_those_of_files(tmp_path: Path) -> None:
    clips = moving_squares(3, 0)
    np.save(tmp_path / "clips.npy", clips)
    np.save(tmp_path / "gray.npy", clips[..., :1])
    videos = open_videos(tmp_path / "clips.npy", frames=12)
    np.testing.assert_array_equal([read() for read in videos.readers()], clips)
    gray = [read() for read in open_videos(tmp_path / "gray.npy", frames=12).readers()]
    np.testing.assert_array_equal(gray, np.repeat(clips[..., :1], 3, axis=-1))
    starts = {
        int(np.flatnonzero((clips[i] == read()[0]).all(axis=(1, 2, 3)))[0])
        for i, read in enumerate(open_videos(tmp_path / "clips.npy", frames=4, seed=1).readers())
    }
    assert len(starts) > 1  # clips begin somewhere
    with pytest.raises(UnreadableVideoError, match="there are 12"):
        next(iter(open_videos(tmp_path / "clips.npy", frames=13).readers()))()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (
            np.zeros((2, 3, 4, 4, 3), np.float32),
            r"is float32 \[2, 3, 4, 4, 3\]; uint8 \[N, F, H, W, 1 or 3\]",
        ),
        (np.zeros((2, 4, 4, 3), np.uint8), r"is uint8 \[2, 4, 4, 3\]"),
        (np.zeros((0, 3, 4, 4, 3), np.uint8), r"with N > 0"),
    ],
)
def test_arrays_that_are_not_videos_are_refused(array: np.ndarray, message: str, tmp_path: Path) -> None:
    np.save(tmp_path / "array.npy", array)
    with pytest.raises(ValueError, match=message):
        open_videos(tmp_path / "array.npy")
    content = (tmp_path / "array.npy").read_bytes()
    (tmp_path / "part.npy").write_bytes(content[:60])
    with pytest.raises(ValueError, match="not a whole npy file"):
        open_videos(tmp_path / "part.npy")
