from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from mhla_diffusion.training import DataConfig, LatentCacheConfig, cache_latents
from mhla_diffusion.training.data import ImageSamples, open_images, shards
from mhla_diffusion.training.data.encoding import readable
from mhla_diffusion.training.data.latents import CachedLatents
from tests.processes import run_script


@pytest.fixture
def vae(tmp_path: Path) -> AutoencoderKL:
    """2 latent channels, images of twice the size, saved in ``vae``; its shift and scale are not 0 and 1."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8), latent_channels=2, norm_num_groups=2, sample_size=8,
        scaling_factor=0.5, shift_factor=0.25,
    ).eval()  # fmt: skip
    vae.save_pretrained(tmp_path / "vae")
    return vae


@pytest.fixture
def config(tmp_path: Path, image_folder: Path, vae: AutoencoderKL) -> LatentCacheConfig:
    data = DataConfig("folder", path=str(image_folder), flip=True)
    return LatentCacheConfig(
        output_dir=str(tmp_path / "cache"), vae=str(tmp_path / "vae"), data=data, size=8, batch_size=3,
        shard_size=8,
    )  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@torch.no_grad()
def test_latents_are_drawn_from_the_posterior_of_each_image_and_its_mirror(
    config: LatentCacheConfig, vae: AutoencoderKL
) -> None:
    cache_latents(config)
    latents = CachedLatents(config.output_dir)
    assert len(latents) == 40
    assert (latents.channels, latents.sizes) == (2, [(4, 4)])
    assert latents.class_names == ["cat", "dog"]
    images = ImageSamples(open_images(config.data), channels=3, sizes=[(8, 8)])
    for index in (0, 1, 17, 38):
        image = images.load(index // 2, torch.Generator())
        pixels = image["samples"].flip(-1) if index % 2 else image["samples"]
        posterior = vae.encode(pixels[None]).latent_dist
        noise = torch.randn((2, 4, 4), generator=torch.Generator().manual_seed(index))
        expected = (posterior.mean[0] + posterior.std[0] * noise - 0.25) * 0.5
        sample = latents.load(index, torch.Generator().manual_seed(index))
        torch.testing.assert_close(sample["samples"], expected, atol=5e-3, rtol=0)  # stored in float16
        assert sample["class_labels"] == image["class_labels"]


def test_an_unfinished_cache_is_refused_and_finished_by_another_run(config: LatentCacheConfig) -> None:
    cache_latents(config)
    folder = Path(config.output_dir)
    whole = contents(folder)
    assert len(whole) == 4
    (folder / "latents-00001.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of 3 files; run mhla cache-latents again"):
        CachedLatents(folder)
    kept = (folder / "latents-00000.safetensors").stat().st_mtime_ns
    cache_latents(config)
    assert contents(folder) == whole
    assert (folder / "latents-00000.safetensors").stat().st_mtime_ns == kept


def test_a_cache_of_nothing_is_refused_and_leaves_no_files(
    config: LatentCacheConfig, image_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = sorted(image_folder.rglob("*.png"))
    whole = [path.read_bytes() for path in images]
    for path in images:
        path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"not one of 20 samples could be read"):
        cache_latents(config)
    assert not Path(config.output_dir).exists()
    for path, content in zip(images[:-1], whole, strict=False):
        path.write_bytes(content)
    cache_latents(config)
    assert f"skipped: {images[-1]}" in caplog.text
    assert "1 of 20 samples could not be read, and are not in" in caplog.text
    assert len(CachedLatents(config.output_dir)) == 38


def test_a_cache_of_nothing_that_an_earlier_version_left_is_named(
    config: LatentCacheConfig, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in image_folder.rglob("*.png"):
        path.write_bytes(b"")
    monkeypatch.setattr(shards, "_require_samples", lambda *_: None)
    cache_latents(config)
    with pytest.raises(ValueError, match="is empty: none of its files could be read"):
        CachedLatents(config.output_dir)


def test_a_pipeline_without_an_autoencoder_is_named(config: LatentCacheConfig, tmp_path: Path) -> None:
    (tmp_path / "pixels").mkdir()
    index = {"_class_name": "MHLADiTPipeline", "transformer": ["mhla_diffusion", "A"], "vae": [None, None]}
    (tmp_path / "pixels" / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="pixels is a pipeline without an autoencoder"):
        cache_latents(dataclasses.replace(config, vae=str(tmp_path / "pixels")))


def test_a_cache_has_no_option_to_resume() -> None:
    for words in (("--resume", "latest"), ("--resume=latest",)):
        result = run_script("cache_latents", "image", *words)
        assert "what was interrupted goes on by itself: leave --resume out" in result.stderr


def test_a_cache_from_before_a_setting_came_is_the_same(config: LatentCacheConfig) -> None:
    cache_latents(config)
    path = Path(config.output_dir) / "cache.json"
    record = json.loads(path.read_text())
    assert record["config"].keys() == {"vae", "data", "text", "size", "shard_size"}
    del record["config"]["data"]["split"]
    path.write_text(json.dumps(record))
    cache_latents(config)
    with pytest.raises(ValueError, match="holds another latent cache"):
        cache_latents(dataclasses.replace(config, shard_size=9))


def test_a_cache_of_other_data_is_not_gone_on_with(config: LatentCacheConfig, image_folder: Path) -> None:
    cache_latents(config)
    folder = Path(config.output_dir)
    (folder / "latents-00001.safetensors").unlink()
    before = contents(folder)
    picture = image_folder / "cat" / "0.png"
    content = picture.read_bytes()
    other = "data: other samples, captions or contents than those that it was made of"
    for change, said in (
        (lambda: picture.with_name("100.png").write_bytes(content), "num_samples: 20 -> 21"),
        (lambda: picture.rename(picture.with_name("100.png")), other),
        (lambda: picture.write_bytes((image_folder / "dog" / "1.png").read_bytes()), other),
    ):
        change()
        with pytest.raises(ValueError, match=said):
            cache_latents(config)
        assert contents(folder) == before
        picture.with_name("100.png").unlink(missing_ok=True)
        picture.write_bytes(content)
    cache_latents(config)
    assert len(CachedLatents(folder)) == 40


def test_a_cache_from_before_its_data_were_noted_is_gone_on_with(config: LatentCacheConfig) -> None:
    cache_latents(config)
    path = Path(config.output_dir) / "cache.json"
    record = json.loads(path.read_text())
    assert (record.pop("num_samples"), len(record.pop("data"))) == (20, 64)
    path.write_text(json.dumps(record))
    (path.parent / "latents-00001.safetensors").unlink()
    cache_latents(config)
    assert len(CachedLatents(config.output_dir)) == 40


def test_files_that_are_not_there_end_the_run_and_what_is_encoded_stays(
    config: LatentCacheConfig, image_folder: Path
) -> None:
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, flip=False))
    images = ImageSamples(open_images(config.data), channels=3, sizes=[(8, 8)])
    picture = Path(images.name(3))
    content = picture.read_bytes()
    picture.unlink()
    found = readable(images, range(20))
    assert [next(found)[0] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match=f"{picture.name}.*: put it back, and run the same again"):
        next(found)
    picture.write_bytes(content[:40])
    assert [index for index, *_ in readable(images, range(5))] == [0, 1, 2, 4], "broken, not gone"


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_loaded(
    config: LatentCacheConfig, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    config = dataclasses.replace(config, output_dir=str(tmp_path / "file" / "cache"), vae="not there")
    with pytest.raises(ValueError, match=r"nothing can be written to .*choose another place"):
        cache_latents(config)


def test_another_cache_or_other_files_are_not_touched(config: LatentCacheConfig, tmp_path: Path) -> None:
    cache_latents(config)
    before = contents(Path(config.output_dir))
    with pytest.raises(ValueError, match="holds another latent cache"):
        cache_latents(dataclasses.replace(config, size=16))
    assert contents(Path(config.output_dir)) == before
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").touch()
    with pytest.raises(ValueError, match="is not empty and holds no latent cache"):
        cache_latents(dataclasses.replace(config, output_dir=str(other)))
    with pytest.raises(ValueError, match="holds no latent cache; make one"):
        CachedLatents(other)


def test_images_that_cannot_be_read_are_named_and_left_out(
    config: LatentCacheConfig, image_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = image_folder / "dog" / "4.png"
    broken.write_bytes(broken.read_bytes()[:40])
    with caplog.at_level(logging.WARNING):
        cache_latents(config)
    assert str(broken) in caplog.text
    assert len(CachedLatents(config.output_dir)) == 38


def test_the_autoencoder_may_lie_in_a_pipeline(config: LatentCacheConfig, tmp_path: Path) -> None:
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text('{"_class_name": "DiTPipeline"}')
    (tmp_path / "vae").rename(tmp_path / "pipeline" / "vae")
    cache_latents(dataclasses.replace(config, vae=str(tmp_path / "pipeline")))
    assert CachedLatents(config.output_dir).load_vae().config.latent_channels == 2


def test_two_processes_write_the_files_of_one(config: LatentCacheConfig, tmp_path: Path) -> None:
    cache_latents(config)
    result = run_script(
        *("cache_latents", "image", "--vae", config.vae, "--size", "8"),
        *("--batch_size", "3", "--shard_size", "8", "--output_dir", str(tmp_path / "two")),
        *("--data.source", "folder", "--data.path", str(config.data.path), "--data.flip", "true"),
        num_processes=2,
    )
    assert result.returncode == 0, result.stderr
    assert "2 processes share the work" in result.stderr
    assert contents(tmp_path / "two") == contents(Path(config.output_dir))
