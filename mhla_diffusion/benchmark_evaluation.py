"""Speed of scoring images beside clean-fid and torch-fidelity: one run, the same folders and weights."""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .benchmark import interleaved, machine, spread
from .evaluation import evaluate_images
from .evaluation.features import INCEPTION_FILE
from .evaluation.files import open_images
from .evaluation.optional import require


def evaluation(real: Path, generated: Path, repeats: int = 1, batch_size: int = 16) -> str:
    """Seconds from two folders to a Frechet distance, with an Inception of random weights.

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
        weights, script = Path(folder) / "inception.pth", Path(folder) / INCEPTION_FILE
        write_random_inception(weights, script)
        scores: dict[str, float] = {}
        calls = {
            "mhla_diffusion, as ADM": lambda: _ours(real, generated, "inception_adm", weights, batch_size),
            "torch-fidelity": lambda: _torch_fidelity(real, generated, weights, batch_size),
            "mhla_diffusion, as clean-fid": lambda: _ours(real, generated, "inception", script, batch_size),
            "clean-fid": lambda: _clean_fid(real, generated, script, batch_size),
        }

        def timed(name: str, call: Callable[[], float]) -> Callable[[], None]:
            return lambda: scores.__setitem__(name, call())

        times = interleaved([timed(name, call) for name, call in calls.items()], "cpu", repeats)
    lines = [
        ["scored by", "seconds", "images per second", "spread", "distance", "times as fast"],
        ["---"] * 6,
    ]
    medians = [statistics.median(its) for its in times]
    for i, name in enumerate(calls):
        ratio = f"{medians[i + 1] / medians[i]:.2f} x" if i % 2 == 0 else ""
        lines.append(
            [
                name, f"{medians[i]:.1f}", f"{count / medians[i]:.1f}", f"{spread(times[i]) or 0:.0%}",
                f"{scores[name]:.6g}", ratio,
            ]
        )  # fmt: skip
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{machine('cpu')}, {count:,} images\n\n{table}"


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
        for module in inception.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    torch.save(inception.state_dict(), weights)
    # clean-fid resizes and normalises, and calls what is between that and the last layer.
    trunk = nn.Sequential(*list(inception.children())[:-1], nn.Flatten())
    layers = torch.jit.trace(trunk, torch.zeros(1, 3, 299, 299))
    torch.jit.script(_WithLayers(layers)).save(str(script))


class _WithLayers(nn.Module):
    def __init__(self, layers: Any) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def _ours(real: Path, generated: Path, extractor: str, weights: Path, batch_size: int) -> float:
    report = evaluate_images(
        real, generated, metrics="frechet", extractor=extractor, weights=weights, bootstrap=0,
        batch_size=batch_size, device="cpu",
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
