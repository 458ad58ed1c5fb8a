"""Frames of a clip: by counting, and by the time at which they are shown."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from mhla_diffusion.evaluation.sets.videos import open_videos, read_clip
from mhla_diffusion.files.clips import choose_clip, clip_at_rate, clip_indices
from mhla_diffusion.files.videos import UnreadableVideoError, open_video, write_video
from mhla_diffusion.training import VideoDataConfig
from mhla_diffusion.training.data import open_videos as open_training

imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")


@pytest.mark.parametrize(
    ("num_frames", "length", "stride", "start", "expected"),
    [
        (20, 4, 1, 0.0, [0, 1, 2, 3]),
        (20, 4, 1, 1.0, [16, 17, 18, 19]),
        (20, 4, 2, 0.0, [0, 2, 4, 6]),
        (1, 1, 1, 0.5, [0]),
    ],
)
def test_frames_by_count(
    num_frames: int, length: int, stride: int, start: float, expected: list[int]
) -> None:
    assert clip_indices(num_frames, length=length, stride=stride, start=start) == expected


def test_each_place_is_as_likely_as_another() -> None:
    starts = np.random.default_rng(0).random(4000)
    places = [clip_indices(4, length=1, start=start)[0] for start in starts]
    assert np.bincount(places) == pytest.approx(1000, abs=120)


def test_a_video_shorter_than_the_clip_is_refused() -> None:
    with pytest.raises(UnreadableVideoError, match=r"16 frames, each 2 after .* need 31, and there are 20"):
        clip_indices(20, length=16, stride=2)
    with pytest.raises(
        UnreadableVideoError, match=r"16 frames at 5 a second need 3 seconds .* there are 1\.9"
    ):
        clip_at_rate(np.arange(20) / 10, length=16, fps=5)


@pytest.mark.parametrize(("rate", "asked"), [(24000 / 1001, 24), (30000 / 1001, 30), (60000 / 1001, 30)])
@pytest.mark.parametrize("digits", [3, 9], ids=["milliseconds", "exact"])
def test_broadcast_rates_are_the_round_ones(rate: float, asked: int, digits: int) -> None:
    times, step = np.round(np.arange(1000) / rate, digits), round(rate / asked)
    assert clip_at_rate(times, length=200, fps=asked) == list(range(0, 200 * step, step))
    if step == 1:
        assert clip_at_rate(times, length=1000, fps=asked) == list(range(1000)), "every frame, however long"
    last = clip_at_rate(times, length=200, fps=asked, start=1.0)
    assert last == list(range(1000 - 199 * step - 1, 1000, step))


@pytest.mark.parametrize("rate", [24.0, 25.0, 29.97, 60.0])
@pytest.mark.parametrize("asked", [5.0, 8.0, 12.0, 15.0, 16.0, 24.0])
def test_a_frame_is_off_by_half_a_frame_of_the_file_at_most_and_never_twice(
    rate: float, asked: float
) -> None:
    times = np.arange(400) / rate
    for start in (0.0, 0.4, 1.0):
        chosen = clip_at_rate(times, length=20, fps=asked, start=start)
        late = times[chosen] - times[chosen[0]] - np.arange(20) / asked
        assert np.abs(late).max() <= 0.5 / rate + 1e-6
        assert len(set(chosen)) == 20


def test_times_that_jitter_choose_the_frames_of_even_ones() -> None:
    even = np.arange(100) / 30
    times = even + np.random.default_rng(0).uniform(-0.01, 0.01, 100)
    times[0], times[-1] = even[0], even[-1]
    assert clip_at_rate(times, length=16, fps=5)[:4] == [0, 6, 12, 18]
    assert clip_at_rate(times, length=16, fps=5) == clip_at_rate(even, length=16, fps=5)


def test_more_frames_a_second_than_there_are_is_refused() -> None:
    with pytest.raises(UnreadableVideoError, match="it has 12 frames a second, and a clip of 24 would show"):
        clip_at_rate(np.arange(100) / 12, length=8, fps=24)


@pytest.fixture
def film(tmp_path: Path) -> Path:
    """40 frames of 24000 / 1001 a second, frame i of the gray value 6 i, and one of the half of it."""
    frames = np.broadcast_to(6 * np.arange(40, dtype=np.uint8)[:, None, None], (40, 32, 48))
    write_video(frames, tmp_path / "film.mp4", fps=24000 / 1001)
    write_video(frames, tmp_path / "slow.mp4", fps=12)
    (tmp_path / "captions.csv").write_text("path,caption\nfilm.mp4,a film\nslow.mp4,a slow one\n")
    return tmp_path


def test_training_and_scoring_take_the_same_frames(film: Path) -> None:
    training = open_training(VideoDataConfig(source="folder", path=str(film), fps=24.0))
    trained = training.read(0, length=8, fps=24.0, start=0.0)
    assert (trained.mean(axis=(1, 2, 3)) / 6).round().tolist() == list(range(8))
    scored = read_clip(film / "film.mp4", frames=8, fps=24, seed=0)
    first = round(float(scored[0].mean()) / 6)
    reader = open_video(film / "film.mp4")
    np.testing.assert_array_equal(scored, reader.read(range(first, first + 8)))
    said = r"it has 12 frames a second, and a clip of 24"
    with pytest.raises(UnreadableVideoError, match=rf"slow\.mp4: {said}"):
        training.read(1, length=8, fps=24.0, start=0.0)
    with pytest.raises(UnreadableVideoError, match=said):
        read_clip(film / "slow.mp4", frames=8, fps=24, seed=0)


def test_sets_of_other_rates_are_scored_by_time(film: Path, tmp_path: Path) -> None:
    videos = open_videos(film, frames=4, fps=6)
    assert videos.kind.sampling is not None
    assert videos.kind.sampling.startswith("one clip a video, 4 frames at 6 a second, from")
    assert videos.frame_rates == [6]
    steps = {}
    for name, read in zip(videos.names, videos.readers(), strict=True):
        values = (read().mean(axis=(1, 2, 3)) / 6).round()
        steps[name] = np.diff(values).tolist()
    assert steps == {"film.mp4": [4, 4, 4], "slow.mp4": [2, 2, 2]}
    np.save(tmp_path / "clips.npy", np.zeros((2, 8, 4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match="do not say their frames a second: leave fps out"):
        next(iter(open_videos(tmp_path / "clips.npy", frames=4, fps=6).readers()))()
    with pytest.raises(ValueError, match="takes the place of stride, got 6 and 2"):
        open_videos(film, frames=4, fps=6, stride=2)


@pytest.mark.parametrize(("aspect", "shape"), [("16/15", (48, 68)), ("8/9", (54, 64)), ("1/1", (48, 64))])
def test_pixels_that_are_not_square_become_so(aspect: str, shape: tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / "video.mp4"
    source = ("-f", "lavfi", "-i", "testsrc=size=64x48:duration=1:rate=10", "-vf", f"setsar={aspect}")
    command = [
        imageio_ffmpeg.get_ffmpeg_exe(),
        "-loglevel",
        "error",
        *source,
        "-pix_fmt",
        "yuv420p",
        str(path),
    ]
    subprocess.run(command, check=True)
    assert open_video(path).read([0, 5]).shape == (2, *shape, 3)
    if aspect != "1/1":
        with pytest.raises(UnreadableVideoError, match=rf"its pixels are not square \({aspect}\)"):
            open_video(path, decoder="decord")


def test_transparent_frames_show_the_background(tmp_path: Path) -> None:
    path = tmp_path / "video.mov"
    source = (
        "-f",
        "lavfi",
        "-i",
        "color=red:size=32x32:duration=1:rate=5,format=rgba,colorchannelmixer=aa=0.5",
    )
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", *source, "-c:v", "qtrle", str(path)]
    subprocess.run(command, check=True)
    for background, expected in (("white", [255, 127, 127]), ("black", [127, 0, 0])):
        frame = open_video(path, background=background).read([3])[0]
        np.testing.assert_allclose(frame[5, 5], expected, atol=4)


def test_a_frame_that_was_dropped_leaves_its_moment_to_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "video.mp4"
    source = ("-f", "lavfi", "-i", "testsrc=size=64x48:duration=4:rate=25", "-fps_mode", "vfr")
    dropped = ("-vf", "select='not(between(n,50,50))'", "-pix_fmt", "yuv420p")
    subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", *source, *dropped, str(path)], check=True
    )
    reader = open_video(path)
    assert reader.num_frames == 99
    assert choose_clip(reader, length=9, fps=2.5) == [0, 10, 20, 30, 40, 49, 59, 69, 79]


def test_a_rate_is_held_by_every_part_of_a_file(film: Path) -> None:
    reader = open_video(film / "film.mp4")
    assert choose_clip(reader, length=4, fps=12, first=10, last=17) == [10, 12, 14, 16]
