"""Two sets of videos in, a report out."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import random
import re
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import VideoMAEConfig, VideoMAEImageProcessor, VideoMAEModel

from mhla_diffusion.evaluation import (
    FeatureExtractor,
    FeatureStatistics,
    evaluate_videos,
    frechet_distance,
    load_video_extractor,
)
from mhla_diffusion.evaluation.sets.vbench import export_vbench
from mhla_diffusion.evaluation.sets.videos import open_videos, read_clip
from mhla_diffusion.files.videos import UnreadableVideoError, write_video
from tests.processes import run_script

WriteVideos = Callable[..., Path]


def moving_squares(
    count: int, seed: int, *, frames: int = 12, size: tuple[int, int] = (32, 48)
) -> np.ndarray:
    """Bright squares that move straight on, uint8 ``[count, F, H, W, 3]``."""
    generator = np.random.default_rng(seed)
    clips = np.zeros((count, frames, *size, 3), np.uint8)
    for clip in clips:
        start, step = generator.integers(0, 12, 2), generator.integers(0, 2, 2)
        colour = generator.integers(80, 256, 3)
        for number, frame in enumerate(clip):
            top, left = start + number * step
            frame[top : top + 8, left : left + 8] = colour
    return clips


@pytest.fixture
def write_videos(tmp_path: Path) -> WriteVideos:
    def write(name: str, clips: np.ndarray) -> Path:
        for index, clip in enumerate(clips):
            write_video(clip, tmp_path / name / f"{index:04d}.mp4", fps=8)
        return tmp_path / name

    return write


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
    with pytest.raises(ValueError, match=r"none holds no video \(\.mp4, \.webm"):
        evaluate_videos(folder, tmp_path / "none")
    with pytest.raises(ValueError, match=r"nowhere is neither a folder of videos nor an \.npy file"):
        evaluate_videos(folder, tmp_path / "nowhere")


def test_transnetv2_sees_motion(write_videos: WriteVideos) -> None:
    extractor = load_video_extractor("transnetv2")

    def moments(clips: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        features = extractor(np.stack([extractor.prepare(clip) for clip in clips]))
        return features.mean(axis=0), np.cov(features, rowvar=False)

    clips, other = moving_squares(20, 0), moving_squares(20, 1)
    shuffled = np.stack([clip[np.random.default_rng(i).permutation(12)] for i, clip in enumerate(other)])
    real = moments(clips)
    assert frechet_distance(*real, *moments(shuffled)) > 3 * frechet_distance(*real, *moments(other))


def test_loading_transnetv2_leaves_generators_and_flags_alone() -> None:
    torch.manual_seed(3), np.random.seed(3), random.seed(3)

    def draw() -> tuple[float, float, float]:
        return torch.rand(()).item(), np.random.rand(), random.random()

    expected = draw()
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    load_video_extractor("transnetv2")
    assert draw() == expected
    assert not torch.are_deterministic_algorithms_enabled()


class _SmallI3D(nn.Module):
    """Takes what StyleGAN-V's I3D takes: the last frame's 20 x 20 means over colours."""

    def forward(self, x: Tensor, rescale: bool, resize: bool, return_features: bool) -> Tensor:
        assert x.dtype == torch.uint8
        assert return_features
        x = x.float()
        if rescale:
            x = x / 127.5 - 1
        if resize:
            x = torch.nn.functional.interpolate(x[:, :, -1], size=(20, 20), mode="bilinear")
        return x.mean(dim=1).flatten(1)


def test_i3d_is_called_as_stylegan_v_does(write_videos: WriteVideos, tmp_path: Path) -> None:
    torch.jit.script(_SmallI3D()).save(str(tmp_path / "i3d.pt"))
    folder = write_videos("videos", moving_squares(3, 0))
    report = evaluate_videos(folder, folder, weights=tmp_path / "i3d.pt", frames=12)
    assert report.scores[0].name == "fvd_i3d"
    assert "only if the weights given are StyleGAN-V's I3D" in report.scores[0].flags[-1]
    statistics = report.real_statistics
    clips = np.stack([read_clip(path, frames=12, stride=1, seed=0) for path in sorted(folder.iterdir())])
    features = _SmallI3D()(torch.from_numpy(clips.transpose(0, 4, 1, 2, 3)), True, True, True).numpy()
    np.testing.assert_allclose(statistics.mu, features.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(statistics.sigma, np.cov(features, rowvar=False, ddof=0), atol=1e-6)


def test_other_files_are_not_taken_for_i3d(tmp_path: Path) -> None:
    torch.jit.script(nn.Conv3d(3, 2, 1)).save(str(tmp_path / "conv.pt"))
    (tmp_path / "part.pt").write_bytes((tmp_path / "conv.pt").read_bytes()[:100])
    for name in ("conv.pt", "part.pt"):
        with pytest.raises(ValueError, match=rf"{name} is not StyleGAN-V's I3D or only a part of it"):
            load_video_extractor("i3d", weights=tmp_path / name)


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


def test_videomae_comes_from_transformers(tmp_path: Path) -> None:
    config = VideoMAEConfig(
        image_size=32, patch_size=16, num_frames=4, hidden_size=24, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=32,
    )  # fmt: skip
    VideoMAEModel(config).save_pretrained(tmp_path / "videomae")
    processor = VideoMAEImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path / "videomae")
    extractor = load_video_extractor("videomae", weights=tmp_path / "videomae", frames=4)
    clip = moving_squares(1, 0, frames=4, size=(32, 32))[0]
    features = extractor(extractor.prepare(clip)[None])
    model = VideoMAEModel.from_pretrained(tmp_path / "videomae").eval()
    with torch.no_grad():
        expected = model(processor(list(clip), return_tensors="pt")["pixel_values"]).last_hidden_state.mean(1)
    np.testing.assert_allclose(features, expected.numpy(), atol=1e-5)
    assert (extractor.score_name, extractor.dimension) == ("fd_videomae", 24)
    with pytest.raises(ValueError, match="takes clips of 4 frames, got 16"):
        load_video_extractor("videomae", weights=tmp_path / "videomae")


def test_export_for_vbench(write_videos: WriteVideos, tmp_path: Path) -> None:
    generated = write_videos("made", moving_squares(3, 1))
    prompts = ["a red/blue  square", "a dot", "a dot"]
    rows = [{"file": f"{i:04d}.mp4", "prompt": prompt} for i, prompt in enumerate(prompts)]
    (generated / "manifest.json").write_text(json.dumps({"videos": rows}))
    assert export_vbench(generated, tmp_path / "vbench") == 3
    names = ["a dot-0.mp4", "a dot-1.mp4", "a red blue square-0.mp4", "prompts.json"]
    assert sorted(path.name for path in (tmp_path / "vbench").iterdir()) == names
    assert (tmp_path / "vbench" / "a dot-1.mp4").read_bytes() == (generated / "0002.mp4").read_bytes()
    assert json.loads((tmp_path / "vbench" / "prompts.json").read_text())["a dot-1.mp4"] == "a dot"
    with pytest.raises(ValueError, match="vbench is already there"):
        export_vbench(generated, tmp_path / "vbench")
    rows[0] = {"file": "0000.mp4"}
    (generated / "manifest.json").write_text(json.dumps({"videos": rows}))
    with pytest.raises(ValueError, match=r"0000\.mp4 has no prompt"):
        export_vbench(generated, tmp_path / "second")
    assert not (tmp_path / "second").exists()


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
    assert "<figcaption>square &lt;1&gt;</figcaption>" in page
    assert "Generated videos against real videos" in page
    assert FeatureStatistics.load(tmp_path / "real.npz").sampling == content["protocol"]["clips"]


def test_reading_a_clip_of_a_short_video_says_how_many_frames_it_has(write_videos: WriteVideos) -> None:
    folder = write_videos("videos", moving_squares(1, 0))
    with pytest.raises(UnreadableVideoError, match=r"need 31, and there are 12"):
        read_clip(folder / "0000.mp4", frames=16, stride=2, seed=0)
