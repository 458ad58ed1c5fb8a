"""Networks that turn images or clips into features, with everything about them that changes a score."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from ...files.sums import file_sha256
from ..sets.samples import Pixels

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FeatureExtractor:
    """Network and what belongs to it. Own extractors can be given to ``evaluate_images`` or ``_videos``.

    Args:
        name: what statistics files and reports call it.
        score_name: what its Frechet distance is called. Only canonical weights give ``fid`` (ADM's) and
            ``fid_clean`` (clean-fid's). What follows the first underscore is part of the names of all scores.
        dimension: length ``d`` of a feature.
        prepare: maps the pixels of one sample, uint8 ``[H, W, 3]`` or ``[F, H, W, 3]``, to an array for the
            network; called in any thread. For images see ``clean_resize``.
        network: maps a batch of these ``[B, ...]`` to features ``[B, d]``, or to a dict with these under
            ``"features"`` and more: see ``outputs``.
        resize: what ``prepare`` does, in words.
        normalization: what the network does to its pixels, in words.
        weights: what the weights are called.
        weights_sha256: hash of the file of weights. A cache finds features by it, by ``name``, ``resize`` and
            ``normalization``: an own extractor that changes needs another of these.
        chosen: why ``auto`` took it; None when it was asked for.
        caution: a sentence that stands beside the score, when it does not compare with published ones.
        packages: packages whose versions belong into the report.
        device: where the network is.
        ddof: the covariance is divided by N - ddof.
        outputs: what the network gives: ``"features"``, ``"spatial"`` ``[B, 2023]`` for sFID, ``"logits"``
            ``[B, classes]`` for the Inception score.
        embed_texts: maps texts to vectors ``[n, d]`` that are compared with features, for the CLIP score, and
            the number of texts that were cut as they are too long.
    """

    name: str
    score_name: str
    dimension: int
    prepare: Callable[[Pixels], NDArray[Any]]
    network: Callable[[Tensor], Tensor | dict[str, Tensor]]
    resize: str
    normalization: str
    weights: str
    weights_sha256: str
    chosen: str | None = None
    caution: str | None = None
    packages: tuple[str, ...] = ()
    device: str = "cpu"
    ddof: int = 1
    outputs: tuple[str, ...] = ("features",)
    embed_texts: Callable[[Sequence[str]], tuple[NDArray[np.float32], int]] | None = None

    def __call__(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        """Return features ``[B, d]`` of prepared samples ``[B, ...]``."""
        return self.extract(batch)["features"]

    def extract(self, batch: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
        """Return every output for prepared samples ``[B, ...]``, by its name."""
        samples = torch.from_numpy(batch).to(self.device)
        if samples.shape[1] == 3:  # channels last make convolutions on a CPU faster
            last = {4: torch.channels_last, 5: torch.channels_last_3d}
            samples = samples.contiguous(memory_format=last.get(samples.ndim, torch.contiguous_format))
        # TF32 would round activations to 10 bits, and scores would depend on the GPU.
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            found = self.network(samples)
        outputs = found if isinstance(found, dict) else {"features": found}
        return {name: values.float().cpu().numpy() for name, values in outputs.items()}

    def full_name(self, metric: str) -> str:
        """Return the name of a score of this extractor: ``fid_clean``, ``kid_clean``, ..."""
        _, underscore, rest = self.score_name.partition("_")
        return self.score_name if metric == "frechet" else metric + underscore + rest


def load_extractors(
    names: str | FeatureExtractor | Sequence[str | FeatureExtractor],
    load: Callable[..., FeatureExtractor],
    *,
    weights: str | Path | None = None,
    **settings: Any,
) -> list[FeatureExtractor]:
    """Load one extractor or several with ``load``.

    Raises:
        ValueError: when there is none, one twice, or one file of weights for several.
    """
    names = [names] if isinstance(names, (str, FeatureExtractor)) else list(names)
    if weights is not None and len(names) > 1:
        raise ValueError(
            f"weights {weights} for {len(names)} extractors: write name=weights for each instead"
        )
    extractors = [load(name, weights=weights, **settings) for name in names]
    if not extractors or len({extractor.name for extractor in extractors}) < len(extractors):
        raise ValueError(f"extractors must be one or more, each once, got {names}")
    return extractors


def resolve_name(
    name: str,
    weights: str | Path | None,
    *,
    names: tuple[str, ...],
    packaged: str,
    choose: Callable[[str | Path | None], tuple[str, str]],
) -> tuple[str, str | Path | None, str | None]:
    """Return the extractor that a name means, its weights, and why ``auto`` chose it, if it did.

    ``"dinov2=folder"`` is the extractor dinov2 with the weights in folder, ``"auto"`` is what ``choose``
    says, with its reason.

    Raises:
        ValueError: for a name that is not one of ``names``, weights that are given in both ways, or weights
            for ``packaged``, which has its own.
    """
    name, equals, given = name.partition("=")
    if equals and weights is not None:
        raise ValueError(f"weights of {name} are given twice, {given} and {weights}: leave one out")
    weights = given or weights
    if name not in names:
        raise ValueError(f"extractor {name!r} is unknown; choose one of {', '.join(names)}")
    if name == packaged and weights is not None:
        raise ValueError(f"extractor {packaged} brings its own weights: leave weights out")
    if name != "auto":
        return name, weights, None
    name, reason = choose(weights)
    logger.info("Extractor: %s, because %s", name, reason)
    return name, weights, reason


@dataclass(frozen=True)
class PublishedWeights:
    """File of weights as its authors publish it.

    Args:
        network: what it holds, in words.
        file: what it is called.
        url: where it comes from.
        instead: extractor of the same samples that needs no download.
        sha256: its hash, or the start of it. Where none is published, loading shows that it is whole.
        folder: where it is kept; torch.hub's, when None.
        program: whether it is a torchscript, which runs what its author wrote.
    """

    network: str
    file: str
    url: str
    instead: str
    sha256: str = ""
    folder: Path | None = None
    program: bool = False

    @property
    def path(self) -> Path:
        """Path that it is kept at."""
        return (self.folder or Path(torch.hub.get_dir()) / "checkpoints") / self.file

    def get(
        self, given: str | Path | None, load: Callable[[Path], Any], *, trust: bool = False
    ) -> tuple[Path, str]:
        """Return the file that was given, else this one, downloaded when it is not there; and its hash.

        Args:
            given: another file.
            load: called with a new download; raises ValueError when it is not whole.
            trust: whether a program with another hash than the published one may be run.

        Raises:
            ValueError: when there is no such file, it cannot be downloaded, is not what it should be, or is a
                program that is not trusted.
        """
        path = self.path if given is None else Path(given)
        if given is None and not path.exists():
            self._download(load)
        if not path.is_file():
            raise ValueError(f"no file of weights of {self.network} at {path}")
        sha256 = file_sha256(path)
        known = bool(self.sha256) and sha256.startswith(self.sha256)
        if given is not None and self.program and not (known or trust):
            raise ValueError(
                f"{path} is not known to be {self.network} (sha256 {sha256[:12]}). A torchscript is a "
                "program: it can read and write files as you can. Set trust_weights (--trust_weights true) "
                "if you know where it comes from"
            )
        if given is None and self.sha256 and not known:
            raise ValueError(
                f"{path} is not {self.network} or only a part of it (sha256 {sha256[:12]}, expected "
                f"{self.sha256[:12]}): remove it, or give other weights or the extractor {self.instead}"
            )
        return path, sha256

    def _download(self, load: Callable[[Path], Any]) -> None:
        """Download beside the path, and put the file there once it is known to be whole."""
        logger.info("Downloading %s to %s", self.network, self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.path.parent) as folder:
            part = Path(folder) / self.file
            remedy = f"give its file as weights, or use the extractor {self.instead}"
            try:
                torch.hub.download_url_to_file(self.url, str(part))
                if not file_sha256(part).startswith(self.sha256):
                    raise ValueError("it has another hash")
                load(part)
            except OSError as error:
                raise ValueError(f"{self.network} could not be downloaded ({error}): {remedy}") from error
            except ValueError as error:
                raise ValueError(
                    f"the download of {self.network} is incomplete or another file: try again, {remedy}"
                ) from error
            os.replace(part, self.path)


def load_tensors(path: Path) -> dict[str, Any]:
    """Load a state dict of torch.save or safetensors, and nothing that could run code."""
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def load_pretrained(classes: Sequence[Any], source: str) -> tuple[list[Any], str]:
    """Load parts of transformers, and hash the weights.

    Raises:
        ValueError: when they are not there.
    """
    from transformers.utils import cached_file

    try:
        parts = [part.from_pretrained(source) for part in classes]
        return parts, file_sha256(cached_file(source, "model.safetensors"))
    except (OSError, ValueError) as error:
        raise ValueError(f"no {classes[0].__name__} could be loaded from {source}: {error}") from error


def fuse_norm(module: nn.Module, conv: str, norm: str) -> None:
    """Fold a batch norm into the convolution before it, when both are there: faster on a CPU."""
    if hasattr(module, conv) and hasattr(module, norm):
        setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
        setattr(module, norm, nn.Identity())
