"""Networks of clips: TransNetV2 with its weights, I3D with a stand-in of its interface, a VideoMAE."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import VideoMAEConfig, VideoMAEImageProcessor, VideoMAEModel

from mhla_diffusion.evaluation import (
    evaluate_videos,
    frechet_distance,
    load_video_extractor,
)
from mhla_diffusion.evaluation.sets.videos import read_clip
from tests.evaluation.clips import moving_squares

WriteVideos = Callable[..., Path]


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
    report = evaluate_videos(folder, folder, weights=tmp_path / "i3d.pt", frames=12, trust_weights=True)
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
            load_video_extractor("i3d", weights=tmp_path / name, trust_weights=True)
        with pytest.raises(ValueError, match="A torchscript is a program"):
            load_video_extractor("i3d", weights=tmp_path / name)


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
