"""Sets of videos, in files and arrays."""

from __future__ import annotations

import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mhla_diffusion.evaluation.sets.videos import open_videos, rate_notes, read_clip
from mhla_diffusion.files.videos import UnreadableVideoError, write_video
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
            np.zeros((2, 3, 4, 4, 3), np.int16),
            r"is int16 \[2, 3, 4, 4, 3\]; uint8 \[N, F, H, W, 1 or 3\]",
        ),
        (np.zeros((2, 4, 4, 3), np.uint8), r"is uint8 \[2, 4, 4, 3\]"),
        (np.zeros((0, 3, 4, 4, 3), np.uint8), r"with N > 0"),
        (np.zeros((2, 3, 3, 4, 4), np.uint8), r"axes 1 and 2 may both be the channels"),
        (
            np.full((2, 3, 4, 4, 3), 255.0),
            r"values from 255 to 255; floating-point pixels must be in \[0, 1\]",
        ),
        (np.full((2, 3, 4, 4, 3), np.nan), r"values from nan to nan"),
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


@pytest.mark.parametrize(
    ("move", "convert"),
    [
        ((4, 2), lambda clips: clips),
        ((4, 1), lambda clips: clips),
        ((4, 4), lambda clips: (clips / 255).astype(np.float32)),
        ((4, 2), lambda clips: (clips / 127.5 - 1).astype(np.float16)),
    ],
    ids=["NFCHW", "NCFHW", "float_0_1", "half_-1_1_NFCHW"],
)
def test_clips_as_pipelines_give_them_are_taken(
    move: tuple[int, int], convert: Callable[[np.ndarray], np.ndarray], tmp_path: Path
) -> None:
    clips = moving_squares(3, 0)
    np.save(tmp_path / "clips.npy", np.moveaxis(convert(clips), *move))
    found = np.stack([read() for read in open_videos(tmp_path / "clips.npy", frames=12).readers()])
    assert np.abs(found.astype(int) - clips).max() <= 1
    assert found.dtype == np.uint8


def test_arrays_are_known_by_their_content(tmp_path: Path) -> None:
    clips = moving_squares(2, 0)
    np.save(tmp_path / "clips.npy", clips)
    (tmp_path / "clips.npy").rename(tmp_path / "clips.bin")
    assert len(open_videos(tmp_path / "clips.bin", frames=12).names) == 2
    (tmp_path / "page.npy").write_text("<html>not found</html>")
    with pytest.raises(ValueError, match="it is a web page"):
        open_videos(tmp_path / "page.npy")


def test_videos_in_archives_are_those_of_the_folder(write_videos: WriteVideos, tmp_path: Path) -> None:
    folder = write_videos("videos", moving_squares(3, 0))
    expected = [read() for read in open_videos(folder, frames=4).readers()]
    shutil.make_archive(str(tmp_path / "set"), "zip", folder)
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        tar.add(folder, arcname=".")
    for name in ("set.zip", "set.tar"):
        found = [read() for read in open_videos(tmp_path / name, frames=4).readers()]
        np.testing.assert_array_equal(found, expected)


def test_pictures_beside_videos_are_said_to_be_left_out(write_videos: WriteVideos) -> None:
    folder = write_videos("videos", moving_squares(2, 0))
    for index in range(3):
        (folder / f"{index}.png").touch()
    (folder / "captions.txt").touch()
    videos = open_videos(folder, frames=4)
    assert videos.left_out == {".png": 3}
    assert videos.notes == ["Files that are not read as videos are left out: 3 .png."]


def test_other_frame_rates_are_flagged(write_videos: WriteVideos, tmp_path: Path) -> None:
    folder, clip = write_videos("slow", moving_squares(1, 0)), moving_squares(1, 1)[0]
    for index in range(2):
        write_video(clip, tmp_path / "fast" / f"{index}.mp4", fps=24)
    slow, fast = (open_videos(place, frames=4).frame_rates for place in (folder, tmp_path / "fast"))
    assert (slow, fast) == ([8.0], [24.0])
    (note,) = rate_notes(slow, fast)
    assert "Real videos have 8 frames a second and generated ones 24" in note
    assert rate_notes(slow, slow) == rate_notes([], fast) == rate_notes([29.97], [30.0]) == []
    assert len(rate_notes([25.0], [25.0, 50.0])) == 1
    assert len(rate_notes([8.0, 30.0], [8.0, 30.0])) == 1, "as many of each are not said to be"


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_folders_of_frames_are_videos(suffix: str, tmp_path: Path) -> None:
    clips = moving_squares(4, 0)
    for index, clip in enumerate(clips):
        place = tmp_path / "set" / "ab"[index % 2] / f"video{index}"
        place.mkdir(parents=True)
        for number, frame in enumerate(clip):
            Image.fromarray(frame).save(place / f"{number:06d}.{suffix}")
    videos = open_videos(tmp_path / "set", frames=12)
    assert videos.names == ["a/video0", "a/video2", "b/video1", "b/video3"]
    assert videos.labels == [0, 0, 1, 1]
    np.testing.assert_array_equal([read() for read in videos.readers()], clips[[0, 2, 1, 3]])


def test_names_that_are_not_text_are_read(write_videos: WriteVideos) -> None:
    folder = write_videos("videos", moving_squares(1, 0))
    os.rename(os.fsencode(folder / "0000.mp4"), os.fsencode(folder) + b"/caf\xe9.mp4")
    (read,) = open_videos(folder, frames=4).readers()
    assert read().shape == (4, 32, 48, 3)


def test_a_rate_takes_the_place_of_a_stride(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="takes the place of stride, got 8 and 2"):
        open_videos(tmp_path, fps=8, stride=2)
