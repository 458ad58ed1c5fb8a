"""Extractors with random weights, against the libraries that define their scores, on the same files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch_fidelity
from cleanfid import fid as cleanfid
from cleanfid.inception_torchscript import InceptionV3W
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
)

from mhla_diffusion.benchmarks.random_weights import write_random_inception
from mhla_diffusion.evaluation import compute_statistics, evaluate_images, load_extractor
from mhla_diffusion.evaluation.networks.extractor import load_extractors
from mhla_diffusion.evaluation.networks.images import INCEPTION, INCEPTION_ADM, _clip_prepare

MakePixels = Callable[..., np.ndarray]
WriteFolder = Callable[..., Path]


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole Inception of torch-fidelity with random weights."""
    folder = tmp_path_factory.mktemp("weights")
    write_random_inception(folder / "inception.pth", folder / INCEPTION.file)
    return folder / "inception.pth"


def test_the_adm_suite_equals_torch_fidelity(
    inception_weights: Path, make_pixels: MakePixels, write_folder: WriteFolder
) -> None:
    real = write_folder("real", make_pixels(14))
    generated = write_folder("generated", make_pixels(12, seed=1, brightness=40))
    report = evaluate_images(
        real, generated, extractor="inception_adm", weights=inception_weights, bootstrap=0, batch_size=7
    )
    ours = {score.metric: score.value for score in report.scores}
    theirs = torch_fidelity.calculate_metrics(
        input1=str(generated), input2=str(real), cuda=False, isc=True, fid=True, kid=True, prc=True,
        feature_extractor_weights_path=str(inception_weights), feature_layer_prc="2048",
        feature_extractor="inception-v3-compat", batch_size=7, kid_subset_size=12, isc_splits=1,
        samples_shuffle=False, cache=False, verbose=False, save_cpu_ram=False,
    )  # fmt: skip
    assert ours["frechet"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert ours["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    assert ours["inception_score"] == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert ours["precision"] == pytest.approx(theirs["precision"], rel=1e-6)
    assert ours["recall"] == pytest.approx(theirs["recall"], rel=1e-6)
    assert ours["sfid"] > 0
    assert {score.name for score in report.scores} >= {"fd_inception_adm_custom", "kid_inception_adm_custom"}
    assert "does not compare with published" in report.scores[0].flags[-1]


def test_spatial_features_are_those_of_the_graph(inception_weights: Path, make_pixels: MakePixels) -> None:
    extractor = load_extractor("inception_adm", weights=inception_weights, device="cpu")
    batch = np.stack([extractor.prepare(pixels) for pixels in make_pixels(2)])
    found = extractor.extract(batch)
    assert {name: values.shape[1] for name, values in found.items()} == {
        "features": 2048, "spatial": 17 * 17 * 7, "logits": 1008,
    }  # fmt: skip
    caught: list[Tensor] = []
    inception = extractor.network.inception  # type: ignore[attr-defined]
    inception.Mixed_6d.branch1x1.register_forward_hook(lambda *call: caught.append(call[2]))
    with torch.inference_mode():
        inception(torch.from_numpy(batch))
    expected = caught[0].numpy().transpose(0, 2, 3, 1)[..., :7].reshape(2, -1)
    np.testing.assert_array_equal(found["spatial"], expected)


def test_statistics_hold_the_spatial_ones(
    inception_weights: Path, make_pixels: MakePixels, write_folder: WriteFolder, tmp_path: Path
) -> None:
    real, generated = write_folder("real", make_pixels(4)), write_folder("generated", make_pixels(3, seed=1))
    settings = {"extractor": "inception_adm", "weights": inception_weights, "bootstrap": 0}
    first = evaluate_images(real, generated, metrics=["frechet", "sfid"], **settings)
    first.real_statistics.save(tmp_path / "real.npz")
    with np.load(tmp_path / "real.npz") as saved:
        assert saved["mu_s"].shape == (2023,)
        assert saved["sigma_s"].shape == (2023, 2023)
    again = evaluate_images(tmp_path / "real.npz", generated, **settings)
    scores = {score.metric: score.value for score in again.scores}
    assert {score.metric: score.value for score in first.scores} == {
        m: scores[m] for m in ("frechet", "sfid")
    }


def test_weights_of_another_network_or_half_a_file_are_refused(
    inception_weights: Path, tmp_path: Path
) -> None:
    half = tmp_path / "half.pth"
    half.write_bytes(inception_weights.read_bytes()[:100_000])
    other = tmp_path / "other.pth"
    torch.save(nn.Linear(2, 2).state_dict(), other)
    for path in (half, other):
        with pytest.raises(
            ValueError, match=rf"{path.name} is not torch-fidelity's Inception or only a part"
        ):
            load_extractor("inception_adm", weights=path, device="cpu")


def test_a_damaged_download_is_never_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / INCEPTION_ADM.file).write_bytes(b"half")
    with pytest.raises(ValueError, match=r"only a part of it \(sha256 .*expected 6726825d\): remove it"):
        load_extractor("inception_adm", device="cpu")


def test_clean_fid_has_the_same_features_on_the_same_folder_and_weights(
    inception_weights: Path, make_pixels: MakePixels, write_folder: WriteFolder
) -> None:
    """The distance of equal features is equal: see test_metrics. Its matrix root would take a minute here."""
    folder = write_folder("images", make_pixels(5))
    Image.fromarray(make_pixels(1)[0]).resize((310, 200)).save(folder / "large.jpg")
    weights = inception_weights.with_name(INCEPTION.file)
    found = compute_statistics(
        folder, extractor="inception", weights=weights, device="cpu", trust_weights=True
    )
    expected = cleanfid.get_folder_features(
        str(folder), InceptionV3W(str(weights.parent), download=False), num_workers=0, batch_size=3,
        device=torch.device("cpu"), mode="clean", verbose=False,
    )  # fmt: skip
    scale = float(np.abs(expected).max())
    np.testing.assert_allclose(found.mu, expected.mean(axis=0), atol=1e-4 * scale)
    covariance = np.cov(expected, rowvar=False)
    np.testing.assert_allclose(found.sigma, covariance, atol=1e-4 * float(np.abs(covariance).max()))


def test_dinov2_comes_from_transformers(make_pixels: MakePixels, tmp_path: Path) -> None:
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14, mlp_ratio=2
    )
    Dinov2Model(config).save_pretrained(tmp_path)
    BitImageProcessor(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4]).save_pretrained(tmp_path)
    extractor = load_extractor(f"dinov2={tmp_path}", device="cpu")
    pixels = make_pixels(1)[0]
    prepared = extractor.prepare(pixels)
    mean, std = np.array([0.5, 0.4, 0.3]), np.array([0.2, 0.3, 0.4])
    normalised = (prepared / 255 - mean[:, None, None]) / std[:, None, None]
    model = Dinov2Model.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = model(torch.from_numpy(normalised[None]).float()).last_hidden_state[:, 0]
    np.testing.assert_allclose(extractor(prepared[None]), expected.numpy(), atol=1e-5)
    assert (extractor.score_name, extractor.dimension) == ("fd_dinov2", 24)
    assert "facebook/dinov2-large" in str(extractor.caution)


@pytest.fixture
def clip_folder(tmp_path: Path) -> Path:
    """A tiny random CLIP whose tokenizer knows single letters."""
    folder = tmp_path / "clip"
    config = CLIPConfig(
        text_config={
            "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": 16, "eos_token_id": 1, "bos_token_id": 0,
        },
        vision_config={
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 32, "patch_size": 16,
        },
        projection_dim=8,
    )  # fmt: skip
    CLIPModel(config).save_pretrained(folder)
    size = {"shortest_edge": 32}
    CLIPImageProcessor(size=size, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")).save_pretrained(folder)
    return folder


def test_clip_scores_images_by_their_prompts(
    clip_folder: Path, make_pixels: MakePixels, write_folder: WriteFolder
) -> None:
    pixels = make_pixels(3)
    generated = write_folder("generated", pixels)
    prompts = ["a b c", "d", "e f"]
    rows = [{"file": f"{i:04d}.png", "prompt": prompt} for i, prompt in enumerate(prompts)]
    (generated / "manifest.json").write_text(json.dumps({"images": rows}))
    report = evaluate_images(
        generated, generated, extractor=f"clip={clip_folder}", metrics=["clip_score"], bootstrap=5
    )
    model = CLIPModel.from_pretrained(clip_folder).eval()
    processor, tokenizer = (
        CLIPImageProcessor.from_pretrained(clip_folder),
        CLIPTokenizer.from_pretrained(clip_folder),
    )
    values = []
    for image, prompt in zip(pixels, prompts, strict=True):
        with torch.no_grad():
            inputs = processor(images=image, return_tensors="pt") | tokenizer(prompt, return_tensors="pt")
            values.append(
                100 * max(0.0, model(**inputs).logits_per_image.item() / model.logit_scale.exp().item())
            )
    (score,) = report.scores
    assert score.name == "clip_score_clip"
    assert not any("prompts are longer" in flag for flag in score.flags)
    assert score.value == pytest.approx(np.mean(values), abs=1e-3)
    assert score.interval is not None


def test_clip_says_when_prompts_are_too_long(
    clip_folder: Path, make_pixels: MakePixels, write_folder: WriteFolder
) -> None:
    generated = write_folder("generated", make_pixels(3))
    prompts = ["a b c", " ".join("abcdefghijklmnopqrst"), "e f"]
    rows = [{"file": f"{i:04d}.png", "prompt": prompt} for i, prompt in enumerate(prompts)]
    (generated / "manifest.json").write_text(json.dumps({"images": rows}))
    settings = {"extractor": f"clip={clip_folder}", "metrics": ["clip_score"], "bootstrap": 0}
    (score,) = evaluate_images(generated, generated, **settings).scores
    assert "1 of 3 prompts are longer than the text encoder takes: they were cut." in score.flags


def test_missing_models_and_doubled_weights_are_explained(tmp_path: Path, inception_weights: Path) -> None:
    os.makedirs(tmp_path / "empty")
    for name in ("dinov2", "clip"):
        with pytest.raises(ValueError, match=r"could be loaded from .*empty"):
            load_extractor(name, weights=tmp_path / "empty", device="cpu")
    with pytest.raises(ValueError, match="weights of inception_adm are given twice"):
        load_extractor(f"inception_adm={inception_weights}", weights=inception_weights)
    with pytest.raises(ValueError, match="for 2 extractors: write name=weights"):
        load_extractors(["inception", "dinov2"], load_extractor, weights=inception_weights)
    with pytest.raises(ValueError, match="each once"):
        load_extractors(["efficientnet_lite0", "efficientnet_lite0"], load_extractor)


def test_weights_are_numbers_and_run_no_code(inception_weights: Path, tmp_path: Path) -> None:
    class Planted:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "code-has-run",)

    state = torch.load(inception_weights, weights_only=True)
    torch.save({**state, "more": Planted()}, tmp_path / "planted.pth")
    with pytest.raises(ValueError, match=r"planted\.pth is not torch-fidelity's Inception"):
        load_extractor("inception_adm", weights=tmp_path / "planted.pth", device="cpu")
    assert not (tmp_path / "code-has-run").exists()
    save_file(state, tmp_path / "port.safetensors")
    extractor = load_extractor("inception_adm", weights=tmp_path / "port.safetensors", device="cpu")
    assert extractor.outputs == ("features", "spatial", "logits")


def test_thin_pictures_are_prepared_for_clip_by_their_own_channels() -> None:
    processor = CLIPImageProcessor(
        size={"shortest_edge": 8},
        crop_size={"height": 8, "width": 8},
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
    )
    red = np.zeros((3, 40, 3), np.uint8)
    red[..., 0] = 255
    for pixels in (red, red[:1], red.transpose(1, 0, 2), red[:1].repeat(100, axis=1)):
        prepared = _clip_prepare(pixels, processor=processor)
        assert prepared.shape == (3, 8, 8)
        np.testing.assert_allclose(prepared.mean(axis=(1, 2)), [1, 0, 0], atol=1e-6)
