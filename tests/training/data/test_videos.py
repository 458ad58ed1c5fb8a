"""Captioned clips: their sizes, and what cannot be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mhla_diffusion.files.videos import write_video
from mhla_diffusion.training import MovingDigitsConfig, VideoDataConfig
from mhla_diffusion.training.data import open_videos
from mhla_diffusion.training.data.stream import BatchShare, SampleStream
from mhla_diffusion.training.data.videos import VideoFile, VideoFiles, VideoSamples, prepare_clip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two wide videos and a tall one, 12 frames each at 8 a second, and one of 3 frames."""
    sizes = {"wide-0": (12, 32, 64), "wide-1": (12, 32, 64), "tall": (12, 64, 32), "short": (3, 32, 64)}
    lines = ["path,caption"]
    for value, (name, (frames, *size)) in enumerate(sizes.items(), start=1):
        write_video(np.full((frames, *size), 40 * value, np.uint8), tmp_path / f"{name}.mp4", fps=8)
        lines.append(f"{name}.mp4,a {name} video")
    (tmp_path / "captions.csv").write_text("\n".join(lines))
    return tmp_path


def samples(folder: Path, channels: int = 3, **kwargs: Any) -> VideoSamples:
    config = VideoDataConfig(source="folder", path=str(folder), frames=8, **kwargs)
    return VideoSamples(open_videos(config), config, channels=channels)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_sample_is_a_clip_with_its_caption(folder: Path, channels: int) -> None:
    sample = samples(folder, channels, sizes=((16, 24),)).load(1, torch.Generator())
    assert sample["caption"] == "a wide-1 video"
    assert sample["samples"].shape == (channels, 8, 16, 24)
    assert sample["samples"].mean() == pytest.approx(80 / 127.5 - 1, abs=0.02)


def test_clips_begin_at_random_frames(tmp_path: Path) -> None:
    frames = np.broadcast_to(20 * np.arange(12, dtype=np.uint8)[:, None, None], (12, 32, 32))
    write_video(frames, tmp_path / "a.mp4", fps=8)
    (tmp_path / "captions.jsonl").write_text('{"path": "a.mp4", "caption": "brighter"}\n')
    source = samples(tmp_path, 1, sizes=((32, 32),))
    firsts = {
        round(
            float(source.load(0, torch.Generator().manual_seed(seed))["samples"][0, 0].mean() + 1)
            * 127.5
            / 20
        )
        for seed in range(30)
    }
    assert firsts == {0, 1, 2, 3, 4}


def test_clips_without_a_rate_are_told_of_where_it_is_lost(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    samples(folder, sizes=((32, 64),)).warn_of_rates()
    assert "the rates of their files, the first 8 frames a second, and what a model learns" in caplog.text
    caplog.clear()
    samples(folder, sizes=((32, 64),), fps=8.0).warn_of_rates()
    digits = VideoDataConfig("moving_mnist", frames=8, sizes=((32, 32),))
    VideoSamples(open_videos(digits), digits, channels=1).warn_of_rates()
    (folder / "wide-0.mp4").write_bytes(b"")
    samples(folder, sizes=((32, 64),)).warn_of_rates()
    assert not caplog.text


def test_clips_of_a_varying_rate_are_even_in_time(tmp_path: Path) -> None:
    pictures = [Image.new("L", (32, 32), 10 * i) for i in range(20)]
    durations = [100] * 10 + [400] * 10
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=durations)
    (tmp_path / "captions.jsonl").write_text('{"path": "a.gif", "caption": "slower and slower"}\n')
    videos = open_videos(VideoDataConfig(source="folder", path=str(tmp_path)))
    clip = videos.read(0, length=8, fps=2.5, start=0.0)
    assert (clip.mean(axis=(1, 2, 3)) / 10).round().tolist() == [0, 4, 8, 10, 11, 12, 13, 14]
    every = videos.read(0, length=8, fps=None, start=0.0)
    assert (every.mean(axis=(1, 2, 3)) / 10).round().tolist() == list(range(8))
    part = VideoFiles([VideoFile(tmp_path / "a.gif", "a part", first=2, last=9)])
    for start, first in ((0.0, 2), (1.0, 6)):
        clip = part.read(0, length=4, fps=None, start=start)
        assert (clip.mean(axis=(1, 2, 3)) / 10).round().tolist() == list(range(first, first + 4))


def test_clips_go_to_the_nearest_size_and_batches_have_one(folder: Path) -> None:
    source = samples(folder, 1, sizes=((32, 16), (16, 32)))
    assert source.buckets == [1, 1, 0, 1]
    stream = SampleStream(source, BatchShare(2), range(6), seed=0)
    shapes = []
    for _, batch in stream:
        shapes.append(tuple(batch["samples"].shape[-2:]))
        tall = [caption == "a tall video" for caption in batch["caption"]]
        assert all(tall) or not any(tall)
    assert set(shapes) == {(32, 16), (16, 32)}
    (message,) = stream.unreadable.values()
    assert "short.mp4: the clip is shorter than asked: 8 frames" in message
    assert "need 8, and there are 3" in message


def test_workers_serve_the_same_clips(folder: Path) -> None:
    source = samples(folder, 1, sizes=((16, 32),))
    own, workers = (
        [
            batch["samples"]
            for _, batch in SampleStream(source, BatchShare(2), range(3), seed=1, num_workers=n)
        ]
        for n in (0, 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(own, workers, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "folder"}, "folder needs data.path"),
        ({"source": "films", "path": "x"}, "data.path is for data.source folder or pairs or latents alone"),
        ({"source": "films", "frames": 0}, "must be positive"),
        ({"source": "films", "sizes": ((0, 8),)}, "pairs of height and width"),
        ({"source": "films", "captions": "x.csv"}, "data.captions is for data.source folder or pairs alone"),
        ({"source": "moving_mnist", "fps": 8.0}, "data.fps is for data.source folder or films alone"),
        (
            {
                "source": "moving_mnist",
                "moving_digits": MovingDigitsConfig(digits=1, bounce=False, speed=0.1),
            },
            r"for data.frames 16 with data.moving_digits.speed at most 0.0667, got 0.1",
        ),
        (
            {"source": "films", "moving_digits": MovingDigitsConfig(digits=1)},
            "data.moving_digits is for data.source moving_mnist alone; remove it",
        ),
        ({"source": "moving_mnist", "sizes": ((16, 16),)}, "at least data.moving_digits.digit_size 28"),
    ],
)
def test_settings_that_do_not_fit_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VideoDataConfig(**arguments)


def test_latent_channels_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"videos have 1 or 3 channels, but model.in_channels is 16"):
        samples(folder, channels=16)


@pytest.mark.parametrize("shape", [(2, 40, 30, 3), (2, 9, 100, 3), (2, 16, 24)], ids=str)
def test_clips_cover_their_size(shape: tuple[int, ...]) -> None:
    clip = prepare_clip(np.full(shape, 100, np.uint8), size=(16, 24), channels=3)
    assert clip.shape == (2, 3, 16, 24)
    assert torch.equal(clip, torch.full_like(clip, 100))


def test_a_missing_video_is_named_when_its_turn_comes(folder: Path) -> None:
    with (folder / "captions.csv").open("a") as file:
        file.write("\nnowhere.mp4,nothing\n")
    stream = SampleStream(samples(folder, 1), BatchShare(5), range(2), seed=0)
    assert len(list(stream)) == 2
    assert any("nowhere.mp4: no such file" in message for message in stream.unreadable.values())
