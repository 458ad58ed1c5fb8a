"""Speed of scoring beside clean-fid, torch-fidelity, cd-fvd and sqrtm: one run, the same data and weights."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .benchmark import interleaved, machine, markdown_table, spread
from .evaluation import evaluate_images, evaluate_videos, frechet_distance
from .evaluation.networks.images import INCEPTION
from .evaluation.sets.images import open_images
from .optional import require


def evaluation(real: Path, generated: Path, repeats: int = 1, batch_size: int = 16) -> str:
    """Seconds from two folders of images to a Frechet distance, with an Inception of random weights.

    Args:
        real, generated: folders of images.
        repeats: interleaved runs, of which the median counts.
        batch_size: images in one forward pass, for all.

    Returns:
        A table in Markdown.

    Raises:
        ValueError: when a folder holds no images.
        ImportError: without the ``eval`` extra.
    """
    count = sum(len(open_images(folder).names) for folder in (real, generated))
    with tempfile.TemporaryDirectory() as folder:
        weights, script = Path(folder) / "inception.pth", Path(folder) / INCEPTION.file
        write_random_inception(weights, script)
        return _race(
            {
                "mhla_diffusion, as ADM": lambda: _ours(
                    real, generated, "inception_adm", weights, batch_size
                ),
                "torch-fidelity": lambda: _torch_fidelity(real, generated, weights, batch_size),
                "mhla_diffusion, as clean-fid": lambda: _ours(
                    real, generated, "inception", script, batch_size
                ),
                "clean-fid": lambda: _clean_fid(real, generated, script, batch_size),
            },
            count, "images", repeats,
        )  # fmt: skip


def evaluation_video(
    clips: int = 32, size: tuple[int, int] = (128, 128), repeats: int = 3, batch_size: int = 8
) -> str:
    """Seconds from two arrays of clips of 16 frames to an FVD, with cd-fvd's I3D of random weights.

    Args:
        clips: of noise, in each of the two sets.
        size: height and width in pixels.
        repeats: interleaved runs, of which the median counts.
        batch_size: clips in one forward pass of ours; cd-fvd has 16.

    Returns:
        A table in Markdown.

    Raises:
        ImportError: without the ``eval`` extra.
    """
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "i3d.pt"
        write_random_i3d(weights)
        arrays = []
        for name in ("real", "generated"):
            brightness = generator.uniform(0.2, 1, (clips, 1, 1, 1, 3))
            noise = generator.integers(0, 256, (clips, 16, *size, 3)) * brightness
            arrays.append(Path(folder) / f"{name}.npy")
            np.save(arrays[-1], noise.astype(np.uint8))

        def ours() -> float:
            report = evaluate_videos(
                *arrays, metrics="frechet", extractor="cdfvd_i3d", weights=weights, bootstrap=0,
                batch_size=batch_size, device="cpu",
            )  # fmt: skip
            return report.scores[0].value

        def theirs() -> float:
            evaluator = require("cdfvd.fvd").cdfvd("i3d", ckpt_path=str(weights), device="cpu", n_fake="full")
            return float(evaluator.compute_fvd(*map(np.load, arrays)))

        return _race({"mhla_diffusion": ours, "cd-fvd": theirs}, 2 * clips, "clips", repeats)


def frechet(dimension: int = 2048, samples: int = 10_000) -> str:
    """Seconds for a Frechet distance beside scipy's sqrtm, on covariances of different kinds.

    Args:
        dimension: of the features.
        samples: of each Gaussian; a quarter of ``dimension`` where the covariance is to be singular.

    Returns:
        A table in Markdown.
    """
    generator = np.random.default_rng(0)
    flat, decaying = np.ones(dimension), np.logspace(0, -3, dimension)
    cases = {
        f"equal variances, {samples:,} samples": (flat, samples),
        f"variances over six decades, {samples:,} samples": (decaying, samples),
        f"singular, {dimension // 4:,} samples": (flat, dimension // 4),
    }
    lines = [["covariances", "seconds", "sqrtm, seconds", "times as fast", "relative difference"]]
    for name, (scale, count) in cases.items():
        moments: list[NDArray[np.float64]] = []
        for _ in range(2):
            features = generator.standard_normal((count, dimension)) * scale
            moments += [features.mean(axis=0), np.cov(features, rowvar=False)]
        start = time.perf_counter()
        value = frechet_distance(*moments)
        middle = time.perf_counter()
        expected = _by_sqrtm(*moments)
        ours, theirs = middle - start, time.perf_counter() - middle
        lines.append(
            [
                name, f"{ours:.2f}", f"{theirs:.2f}", f"{theirs / ours:.1f} x",
                f"{abs(value - expected) / expected:.0e}",
            ]
        )  # fmt: skip
    return f"{machine('cpu')}, {dimension:,} dimensions\n\n{markdown_table(lines)}"


def _by_sqrtm(mu1: Any, sigma1: Any, mu2: Any, sigma2: Any) -> float:
    root = require("scipy.linalg").sqrtm(sigma1 @ sigma2)
    return float(np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root).real)


def _race(calls: dict[str, Callable[[], float]], count: int, unit: str, repeats: int) -> str:
    """A table of calls that return a distance, each of ours before its alternative."""
    scores: dict[str, float] = {}

    def timed(name: str, call: Callable[[], float]) -> Callable[[], None]:
        return lambda: scores.__setitem__(name, call())

    times = interleaved([timed(name, call) for name, call in calls.items()], "cpu", repeats)
    medians = [statistics.median(its) for its in times]
    lines = [["scored by", "seconds", f"{unit} per second", "spread", "distance", "times as fast"]]
    for i, name in enumerate(calls):
        ratio = f"{medians[i + 1] / medians[i]:.2f} x" if i % 2 == 0 else ""
        lines.append(
            [
                name, f"{medians[i]:.1f}", f"{count / medians[i]:.1f}", f"{spread(times[i]) or 0:.0%}",
                f"{scores[name]:.6g}", ratio,
            ]
        )  # fmt: skip
    return f"{machine('cpu')}, {count:,} {unit}\n\n{markdown_table(lines)}"


def write_random_inception(weights: Path, script: Path) -> None:
    """An Inception of random weights, as torch-fidelity's state dict and as clean-fid's torchscript."""
    port = require("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3

    class Random(port):  # type: ignore[misc,valid-type]
        def load_state_dict(self, *arguments: Any, **settings: Any) -> None:
            """Nothing: what it was made with stays."""

    torch.save({}, weights)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inception = Random("random", ["2048"], feature_extractor_weights_path=str(weights))
        _draw_weights(inception)
    torch.save(inception.state_dict(), weights)
    # clean-fid resizes and normalises, and calls what is between that and the last layer.
    trunk = nn.Sequential(*list(inception.children())[:-1], nn.Flatten())
    layers = torch.jit.trace(trunk, torch.zeros(1, 3, 299, 299))
    torch.jit.script(_WithLayers(layers)).save(str(script))


def write_random_i3d(weights: Path) -> None:
    """An I3D of random weights, as cd-fvd's state dict."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        i3d = require("cdfvd.third_party.i3d.pytorch_i3d").InceptionI3d(400, in_channels=3)
        _draw_weights(i3d)
    torch.save(i3d.state_dict(), weights)


def _draw_weights(network: nn.Module) -> None:
    """Such that what differs in images still differs in features."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")


class _WithLayers(nn.Module):
    def __init__(self, layers: Any) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def _ours(real: Path, generated: Path, extractor: str, weights: Path, batch_size: int) -> float:
    report = evaluate_images(
        real, generated, metrics="frechet", extractor=extractor, weights=weights, bootstrap=0,
        batch_size=batch_size, device="cpu", trust_weights=True,
    )  # fmt: skip
    return report.scores[0].value


def _torch_fidelity(real: Path, generated: Path, weights: Path, batch_size: int) -> float:
    scores = require("torch_fidelity").calculate_metrics(
        input1=str(generated), input2=str(real), fid=True, cuda=False, cache=False, verbose=False,
        feature_extractor_weights_path=str(weights), batch_size=batch_size, samples_find_deep=True,
    )  # fmt: skip
    return float(scores["frechet_inception_distance"])


def _clean_fid(real: Path, generated: Path, script: Path, batch_size: int) -> float:
    cleanfid, device = require("cleanfid.fid"), torch.device("cpu")
    wrapper = require("cleanfid.inception_torchscript").InceptionV3W
    network = wrapper(str(script.parent), download=False)
    features = [
        cleanfid.get_folder_features(
            str(folder), network, num_workers=os.cpu_count() or 1, batch_size=batch_size, device=device,
            mode="clean", verbose=False,
        )
        for folder in (real, generated)
    ]  # fmt: skip
    return float(cleanfid.fid_from_feats(*features))
