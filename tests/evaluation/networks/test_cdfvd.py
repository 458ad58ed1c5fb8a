"""The networks of cd-fvd, against cd-fvd itself on the same arrays, with random weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from cdfvd.fvd import cdfvd
from cdfvd.third_party.VideoMAEv2 import utils as cdfvd_videomae
from cdfvd.third_party.VideoMAEv2 import videomaev2_finetune
from torch import nn

from mhla_diffusion.benchmarks.random_weights import write_random_i3d
from mhla_diffusion.evaluation import evaluate_videos, frechet_distance, load_video_extractor


def make_clips(count: int, seed: int) -> np.ndarray:
    """Noise whose brightness and grain differ from clip to clip, uint8 ``[count, 16, 40, 56, 3]``."""
    generator = np.random.default_rng(seed)
    scale = generator.uniform(0.2, 1, (count, 1, 1, 1, 3))
    return (
        (generator.integers(0, 256, (count, 16, 10, 14, 3)) * scale)
        .astype(np.uint8)
        .repeat(4, 2)
        .repeat(4, 3)
    )


@pytest.fixture
def cdfvd_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """cd-fvd's networks with random weights, its VideoMAE a small one."""
    small = partial(
        videomaev2_finetune.VisionTransformer,
        patch_size=14,
        embed_dim=24,
        depth=2,
        num_heads=2,
        init_values=0.0,
        qkv_bias=True,
    )
    monkeypatch.setattr(videomaev2_finetune, "vit_giant_patch14_224", small)
    monkeypatch.setattr(cdfvd_videomae, "vit_giant_patch14_224", lambda pretrained, **kwargs: small(**kwargs))
    write_random_i3d(tmp_path / "i3d.pt")
    torch.manual_seed(0)
    videomae = small(
        img_size=224, num_classes=174, all_frames=16, tubelet_size=2, use_mean_pooling=True
    ).state_dict()
    torch.save({"module": videomae}, tmp_path / "videomae.pth")
    return {"i3d": tmp_path / "i3d.pt", "videomae": tmp_path / "videomae.pth"}


@pytest.mark.parametrize("network", ["i3d", "videomae"])
def test_cdfvd_scores_the_same_arrays_alike(
    network: str, cdfvd_weights: dict[str, Path], tmp_path: Path
) -> None:
    real, generated = (make_clips(2, seed) for seed in (0, 1))
    np.save(tmp_path / "real.npy", real)
    np.save(tmp_path / "generated.npy", generated)
    report = evaluate_videos(
        tmp_path / "real.npy", tmp_path / "generated.npy", metrics="frechet", bootstrap=0,
        extractor=f"cdfvd_{network}={cdfvd_weights[network]}",
    )  # fmt: skip
    theirs = cdfvd(network, ckpt_path=str(cdfvd_weights[network]), device="cpu", n_fake="full")
    theirs.compute_fvd(real, generated)
    mean, covariance = theirs.real_stats.get_mean_cov()
    assert report.real_statistics is not None
    scale = np.abs(mean).max()
    np.testing.assert_allclose(report.real_statistics.mu, mean, atol=1e-4 * scale)
    np.testing.assert_allclose(report.real_statistics.sigma, covariance, atol=1e-4 * np.abs(covariance).max())
    expected = frechet_distance(mean, covariance, *theirs.fake_stats.get_mean_cov())
    (score,) = report.scores
    assert score.name == f"fvd_cdfvd_{network}"
    assert score.value == pytest.approx(expected, rel=1e-3)
    assert "only if the weights given are cd-fvd's" in score.flags[-1]


def test_other_files_are_not_taken_for_weights_of_cdfvd(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "linear.pt")
    (tmp_path / "part.pt").write_bytes((tmp_path / "linear.pt").read_bytes()[:100])
    for name in ("linear.pt", "part.pt"):
        with pytest.raises(ValueError, match=rf"{name} is not cd-fvd's I3D or only a part of it"):
            load_video_extractor(f"cdfvd_i3d={tmp_path / name}")
    with pytest.raises(ValueError, match=r"an even number of frames, got 15"):
        load_video_extractor("cdfvd_videomae", frames=15)


def test_a_download_is_kept_when_it_is_whole_only(
    cdfvd_weights: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    kept = tmp_path / "hub" / "checkpoints" / "i3d_pretrained_400.pt"
    whole = cdfvd_weights["i3d"].read_bytes()
    for content in (whole[: len(whole) // 2], whole):
        monkeypatch.setattr(
            torch.hub,
            "download_url_to_file",
            lambda url, path, content=content: Path(path).write_bytes(content),
        )
        if content == whole:
            assert load_video_extractor("cdfvd_i3d").caution is None
            assert kept.read_bytes() == whole
        else:
            with pytest.raises(
                ValueError, match="the download of cd-fvd's I3D is incomplete or another file: try"
            ):
                load_video_extractor("cdfvd_i3d")
            assert list(kept.parent.iterdir()) == []
    kept.unlink()
    monkeypatch.setattr(torch.hub, "download_url_to_file", _no_network)
    with pytest.raises(ValueError, match=r"I3D could not be downloaded \(no network\): give its file"):
        load_video_extractor("cdfvd_i3d")


def _no_network(url: str, path: str) -> None:
    raise OSError("no network")
