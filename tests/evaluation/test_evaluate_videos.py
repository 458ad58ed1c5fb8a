"""Two sets of videos in, a report out."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from mhla_diffusion.evaluation import (
    FeatureExtractor,
    FeatureStatistics,
    evaluate_videos,
    frechet_distance,
)
from mhla_diffusion.evaluation.sets.videos import read_clip
from mhla_diffusion.files.videos import write_video
from tests.evaluation.clips import moving_squares
from tests.processes import run_script

WriteVideos = Callable[..., Path]


@pytest.fixture
def extractor() -> FeatureExtractor:
    """Mean colour of the first and the last frame: 6 dimensions."""
    return FeatureExtractor(
        name="end_colours",
        score_name="fd_end_colours",
        dimension=6,
        prepare=lambda pixels: pixels[[0, -1]].mean(axis=(1, 2)).astype(np.float32),
        network=lambda batch: batch.flatten(1),
        resize="none",
        normalization="none",
        weights="none",
        weights_sha256="0" * 64,
        ddof=0,
    )


def test_score_is_the_distance_of_the_features_of_the_clips(
    extractor: FeatureExtractor, write_videos: WriteVideos
) -> None:
    folders = write_videos("real", moving_squares(9, 0)), write_videos("generated", moving_squares(7, 1))
    report = evaluate_videos(*folders, extractor=extractor, frames=5, stride=2, batch_size=4)
    moments = []
    for folder in folders:
        clips = [read_clip(path, frames=5, stride=2, seed=0) for path in sorted(folder.iterdir())]
        features = np.stack([clip[[0, -1]].mean(axis=(1, 2)).ravel() for clip in clips])
        moments += [features.mean(axis=0), np.cov(features, rowvar=False, ddof=0)]
    assert report.scores[0].name == "fd_end_colours"
    assert report.scores[0].value == pytest.approx(frechet_distance(*moments), rel=1e-5)
    assert (report.real.count, report.generated.count) == (9, 7)
    assert (
        report.protocol["clips"] == "one clip a video, 5 frames with stride 2, from a random frame (seed 0)"
    )
    assert report.protocol["extractors"]["end_colours"]["statistics"] == (
        "mean and covariance in float64, divided by N"
    )
    assert "Only 9 real videos for 6-dimensional features" in report.scores[0].flags[0]
    assert "papers use 2,048" in report.scores[0].flags[0]


def test_frames_are_scored_as_images(write_videos: WriteVideos) -> None:
    real, generated = write_videos("real", moving_squares(3, 0)), write_videos("made", moving_squares(2, 1))
    colours = FeatureExtractor(
        name="colours",
        score_name="fd_colours",
        dimension=3,
        prepare=lambda pixels: pixels.mean(axis=(0, 1)).astype(np.float32),
        network=lambda batch: batch,
        resize="none",
        normalization="none",
        weights="none",
        weights_sha256="0" * 64,
    )
    report = evaluate_videos(real, generated, extractor=colours, frames=5, frame_wise=True)
    moments = []
    for folder in (real, generated):
        clips = [read_clip(path, frames=5, stride=1, seed=0) for path in sorted(folder.iterdir())]
        features = np.concatenate(clips).mean(axis=(1, 2))
        moments += [features.mean(axis=0), np.cov(features, rowvar=False)]
    assert report.scores[0].value == pytest.approx(frechet_distance(*moments), rel=1e-5)
    assert (report.kind, report.real.count, report.generated.count) == ("image", 15, 10)
    assert report.protocol["clips"].startswith("every frame of one clip a video, 5 frames")
    assert report.pictures[0].real[0].name == "0000.mp4#0"


def test_short_and_broken_videos_are_named_skipped_and_counted(
    extractor: FeatureExtractor, write_videos: WriteVideos
) -> None:
    real, generated = write_videos("real", moving_squares(4, 0)), write_videos("made", moving_squares(4, 1))
    write_video(moving_squares(1, 2, frames=7)[0], generated / "short.mp4", fps=8)
    whole = (generated / "0000.mp4").read_bytes()
    (generated / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (generated / "empty.mp4").touch()
    (generated / "notes.txt").write_text("no video")
    report = evaluate_videos(real, generated, extractor=extractor, frames=8, max_skipped=0.5)
    skipped = {file.file: file.reason for file in report.generated.skipped}
    assert report.generated.count == 4
    assert skipped.keys() == {"cut.mp4", "empty.mp4", "short.mp4"}
    assert "8 frames, each 1 after the one before, need 8, and there are 7" in skipped["short.mp4"]
    with pytest.raises(ValueError, match=r"has 0 readable video\(s\) of 4 .*12\); a covariance"):
        evaluate_videos(real, generated, extractor=extractor, frames=13)


def test_gray_odd_and_mixed_sizes_are_taken(write_videos: WriteVideos) -> None:
    folder = write_videos("mixed", moving_squares(2, 0))
    write_video(moving_squares(1, 1, size=(33, 41))[0][..., 0], folder / "gray.mp4", fps=8)
    report = evaluate_videos(folder, folder, extractor="transnetv2", frames=8, batch_size=3)
    assert (report.real.count, report.real.skipped) == (3, [])
    assert report.scores[0].value == 0.0
    assert [picture.height for picture in report.pictures[0].real] == [32, 32, 34]


def test_statistics_are_of_their_clips(
    extractor: FeatureExtractor, write_videos: WriteVideos, tmp_path: Path
) -> None:
    real, generated = write_videos("real", moving_squares(5, 0)), write_videos("made", moving_squares(5, 1))
    report = evaluate_videos(real, generated, extractor=extractor, frames=6)
    report.real_statistics.save(tmp_path / "real.npz")
    again = evaluate_videos(tmp_path / "real.npz", generated, extractor=extractor, frames=6)
    assert again.scores[0].value == report.scores[0].value
    assert again.real.fingerprint == report.real.fingerprint
    with pytest.raises(ValueError, match=r"6 frames with stride 1, .*not of .* 7 frames with stride 1"):
        evaluate_videos(tmp_path / "real.npz", generated, extractor=extractor, frames=7)
    of_images = dataclasses.replace(report.real_statistics, sampling=None)
    of_images.save(tmp_path / "images.npz")
    with pytest.raises(ValueError, match=r"images\.npz is of images, not of one clip a video"):
        evaluate_videos(tmp_path / "images.npz", generated, extractor=extractor, frames=6)


def test_clips_stream_through(extractor: FeatureExtractor, write_videos: WriteVideos) -> None:
    folder = write_videos("videos", moving_squares(40, 0, frames=4))
    lock, waiting, most = threading.Lock(), 0, 0

    def prepare(pixels: np.ndarray) -> np.ndarray:
        nonlocal waiting, most
        with lock:
            waiting += 1
            most = max(most, waiting)
        return extractor.prepare(pixels)

    def network(batch: Tensor) -> Tensor:
        nonlocal waiting
        with lock:
            waiting -= len(batch)
        return extractor.network(batch)

    counting = dataclasses.replace(extractor, prepare=prepare, network=network)
    evaluate_videos(folder, folder, extractor=counting, frames=4, batch_size=2, num_workers=4)
    assert waiting == 0
    assert 2 <= most <= 3 * 2  # a batch in use, and two that are being prepared


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frames": 0}, "frames and stride must be at least 1, got 0 and 1"),
        ({"stride": 0}, "frames and stride must be at least 1, got 16 and 0"),
        (
            {"extractor": "c3d"},
            "extractor 'c3d' is unknown; choose one of auto, i3d, cdfvd_i3d",
        ),
        ({"extractor": "transnetv2", "weights": "w.pt"}, "brings its own weights: leave weights out"),
        ({"extractor": "i3d", "frames": 8}, "I3D takes clips of 10 frames or more, got 8"),
        ({"weights": "nowhere.pt"}, "no file of weights of StyleGAN-V's I3D at nowhere.pt"),
    ],
)
def test_bad_settings_are_explained(
    settings: dict[str, object], message: str, write_videos: WriteVideos
) -> None:
    folder = write_videos("videos", moving_squares(2, 0))
    with pytest.raises(ValueError, match=re.escape(message)):
        evaluate_videos(folder, folder, **settings)


def test_a_folder_without_videos_is_refused(write_videos: WriteVideos, tmp_path: Path) -> None:
    folder = write_videos("videos", moving_squares(2, 0))
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"none holds no video \(\.mp4, \.m4v"):
        evaluate_videos(folder, tmp_path / "none")
    with pytest.raises(ValueError, match=r"nowhere is neither a folder of videos nor an \.npy file"):
        evaluate_videos(folder, tmp_path / "nowhere")


def test_script_writes_a_page_with_clips_that_play(write_videos: WriteVideos, tmp_path: Path) -> None:
    real, generated = write_videos("real", moving_squares(3, 0)), write_videos("made", moving_squares(2, 1))
    rows = [{"file": f"{i:04d}.mp4", "prompt": f"square <{i}>", "seed": i} for i in range(2)]
    (generated / "manifest.json").write_text(json.dumps({"model": "runs/squares", "videos": rows}))
    result = run_script(
        *("evaluate", "video", "--real", real, "--generated", generated, "--out", tmp_path / "out"),
        *("--frames", "6", "--save_stats", tmp_path / "real.npz", "--extractor", "transnetv2"),
    )
    assert result.returncode == 0, result.stderr
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (content["kind"], content["scores"][0]["name"]) == ("video", "fd_transnetv2")
    assert "does not compare with published FVD" in content["scores"][0]["flags"][-1]
    page = (tmp_path / "out" / "report.html").read_text()
    clips = re.findall(r"data:image/webp;base64,([^\"]+)", page)
    assert len(clips) == 5
    for clip in clips:
        with Image.open(io.BytesIO(base64.b64decode(clip))) as animation:
            assert (animation.n_frames, animation.info["loop"]) == (6, 0)
    assert ">square &lt;1&gt;</figcaption>" in page
    assert "Generated videos against real videos" in page
    assert FeatureStatistics.load(tmp_path / "real.npz").sampling == content["protocol"]["clips"]


def test_other_frame_rates_and_pictures_beside_videos_are_flagged(
    extractor: FeatureExtractor, write_videos: WriteVideos, tmp_path: Path
) -> None:
    real = write_videos("real", moving_squares(3, 0))
    (real / "poster.png").touch()
    for index, clip in enumerate(moving_squares(3, 1)):
        write_video(clip, tmp_path / "made" / f"{index}.mp4", fps=24)
    report = evaluate_videos(real, tmp_path / "made", extractor=extractor, frames=4, bootstrap=0)
    assert report.real.left_out == {".png": 1}
    assert (report.real.frame_rates, report.generated.frame_rates) == ([8.0], [24.0])
    flags = report.scores[0].flags
    assert "Real set: Files that are not read as videos are left out: 1 .png." in flags
    assert any("Real videos have 8 frames a second and generated ones 24" in flag for flag in flags)
