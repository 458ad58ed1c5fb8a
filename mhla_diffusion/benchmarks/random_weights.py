"""Networks of scoring with random weights, in the files that each program reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..optional import require


def write_random_inception(weights: Path, script: Path) -> None:
    """Write an Inception of random weights, as torch-fidelity's state dict and as clean-fid's torchscript."""
    port = require("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3

    class Random(port):  # type: ignore[misc,valid-type]
        def load_state_dict(self, *arguments: Any, **settings: Any) -> None:
            """Keep what it was made with."""

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
    """Write an I3D of random weights, as cd-fvd's state dict."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        i3d = require("cdfvd.third_party.i3d.pytorch_i3d").InceptionI3d(400, in_channels=3)
        _draw_weights(i3d)
    torch.save(i3d.state_dict(), weights)


def _draw_weights(network: nn.Module) -> None:
    """Draw weights with which what differs in images still differs in features."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")


class _WithLayers(nn.Module):
    def __init__(self, layers: Any) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)
