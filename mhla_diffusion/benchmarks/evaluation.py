"""Scoring images beside clean-fid and torch-fidelity: one run, the same data and weights."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch

from ..evaluation import evaluate_images
from ..evaluation.networks.images import INCEPTION
from ..evaluation.sets.images import open_images
from ..optional import require
from .random_weights import write_random_inception
from .shared import check_at_least, race


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
    check_at_least(1, repeats=repeats, batch_size=batch_size)
    count = sum(len(open_images(folder).names) for folder in (real, generated))
    with tempfile.TemporaryDirectory() as folder:
        weights, script = Path(folder) / "inception.pth", Path(folder) / INCEPTION.file
        write_random_inception(weights, script)
        return race(
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
