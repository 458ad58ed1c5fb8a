"""Clips and captions encoded once, and a run on them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLWan, WanImageToVideoPipeline
from PIL import Image
from torch.utils.data import default_collate

from mhla_diffusion import MHLAConfig, MHLAPipeline
from mhla_diffusion.autoencoders import VIDEO_AUTOENCODERS
from mhla_diffusion.backbones.teacher import predict
from mhla_diffusion.conversion import DataCalls
from mhla_diffusion.files.videos import open_video
from mhla_diffusion.training import (
    TextConfig,
    TrainerConfig,
    VideoDataConfig,
    VideoLatentCacheConfig,
    VideoModelConfig,
    VideoSamplingConfig,
    VideoTrainingConfig,
    build_objective,
    cache_video_latents,
    train_video,
)
from mhla_diffusion.training.conditioning import Captions
from mhla_diffusion.training.data import VideoSamples, open_videos
from mhla_diffusion.training.data.clip_conditions import ImageConditions
from mhla_diffusion.training.data.encoding import readable
from mhla_diffusion.training.data.latents import CachedLatents, _draw_texts, load_vae
from mhla_diffusion.training.data.stream import is_of_disk
from mhla_diffusion.training.text import video_caption_encoder
from mhla_diffusion.training.video import build_parts
from tests.training.stock_runs import WAN


def training_config(cache: VideoLatentCacheConfig, **model: Any) -> VideoTrainingConfig:
    shape: dict[str, Any] = {
        "patch_size": (1, 2, 2), "in_channels": 4, "num_layers": 1, "num_attention_heads": 2,
        "attention_head_dim": 12, "ffn_dim": 16, "mhla": MHLAConfig(blocks=(1, 1, 2)),
    }  # fmt: skip
    return VideoTrainingConfig(
        model=VideoModelConfig(**{**shape, **model}),
        data=VideoDataConfig("latents", path=cache.output_dir),
        text=cache.text,
        trainer=TrainerConfig(batch_size=2, max_steps=2, num_workers=0),
        output_dir=f"{cache.output_dir}-run",
    )


@torch.no_grad()
def test_rows_are_the_scaled_latents_and_the_texts(config: VideoLatentCacheConfig) -> None:
    cache_video_latents(config)
    cached = CachedLatents(config.output_dir)
    assert (len(cached), cached.channels, cached.fps) == (10, 4, 8)
    assert cached.sizes == [(2, 2, 4), (2, 4, 2)]
    assert cached.buckets == [0] * 8 + [1] * 2
    vae = AutoencoderKLWan.from_pretrained(config.vae, subfolder="vae")
    videos = VideoSamples(open_videos(config.data), config.data, channels=3)
    for row in (0, 3, 9):
        sample = videos.load(row // 2, torch.Generator().manual_seed(row))
        latents = vae.encode(sample["samples"][None]).latent_dist.mode()[0]
        mean, std = (
            torch.tensor(values).view(4, 1, 1, 1) for values in ([0.1, 0.2, 0.3, 0.4], [0.5, 1, 2, 4])
        )
        loaded = cached.load(row, torch.Generator())
        torch.testing.assert_close(loaded["samples"], (latents - mean) / std, atol=5e-3, rtol=0)  # float16
        assert loaded["text"].shape == (8, 16)
    texts = [cached.load(row, torch.Generator())["text"] for row in (0, 8)]
    assert [int(text.any(dim=-1).sum()) for text in texts] == [3, 7], "the letters, a space and the end"


def test_cached_texts_are_those_that_the_pipeline_makes(config: VideoLatentCacheConfig) -> None:
    cache_video_latents(config)
    run = training_config(config)
    latents = CachedLatents(config.output_dir)
    parts = build_parts(run, build_objective(run.objective), latents)
    generators = [torch.Generator().manual_seed(seed) for seed in range(8)]
    rows = [latents.load(row, torch.Generator()) for row in range(8)]
    texts = torch.stack([row["text"] for row in rows])
    encoder = video_caption_encoder(parts)
    batch = {"text": texts, "tokens": torch.tensor([row["tokens"] for row in rows])}
    cached = Captions([encoder], 0.5, embedded=True).arguments(batch, generators)
    generators = [torch.Generator().manual_seed(seed) for seed in range(8)]
    captions = ["a", "a", "ab", "ab", "abc", "abc", "abcd", "abcd"]
    embedded = Captions([encoder], 0.5).arguments({"caption": captions}, generators)
    assert torch.equal(cached["encoder_hidden_states"], embedded["encoder_hidden_states"])
    assert len({tuple(text.flatten().tolist()) for text in cached["encoder_hidden_states"]}) > 2


def test_a_run_on_latents_leaves_a_pipeline_with_the_autoencoder(config: VideoLatentCacheConfig) -> None:
    cache_video_latents(config)
    run = training_config(config)
    assert train_video(run) == 0
    pipeline = MHLAPipeline.from_pretrained(Path(run.output_dir) / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.config.fps == 8
    assert pipeline("abc", num_inference_steps=2).frames.shape == (1, 5, 16, 32, 3)


def test_sheets_and_the_pipeline_have_the_size_that_is_listed_first(config: VideoLatentCacheConfig) -> None:
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sizes=((32, 16), (16, 32))))
    cache_video_latents(config)
    run = training_config(config)
    assert train_video(run) == 0
    pipeline = MHLAPipeline.from_pretrained(Path(run.output_dir) / "pipeline")
    assert tuple(pipeline.default_size) == (5, 32, 16)
    assert tuple(pipeline.transformer.config.sample_grid) == (2, 1, 2), (
        "that of runs of before, which are resumed"
    )
    latents = CachedLatents(config.output_dir)
    assert latents.sizes == [(2, 2, 4), (2, 4, 2)]
    assert latents.buckets == [0] * 8 + [1] * 2, "the order of batches is that of runs of before"


def test_sizes_that_the_pipeline_does_not_make_are_refused_before_encoding_and_before_training(
    config: VideoLatentCacheConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sizes=((16, 32), (24, 16))))
    said = r"multiples of 16, but the data are of 24 x 16 pixels"
    with pytest.raises(ValueError, match=said):
        cache_video_latents(config)
    monkeypatch.setattr("mhla_diffusion.training.data.encoding.require_cache", lambda *_, **__: None)
    cache_video_latents(config)  # as before there was that check
    with pytest.raises(ValueError, match=said):
        train_video(training_config(config, patch_size=(1, 1, 1)))


def test_a_broken_video_is_named_and_left_out(
    config: VideoLatentCacheConfig, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = (folder / "1.mp4").read_bytes()
    (folder / "1.mp4").write_bytes(b"no video")
    cache_video_latents(config)
    assert "1.mp4" in caplog.text
    assert "2 of 10 samples could not be read, and are not in" in caplog.text
    assert len(CachedLatents(config.output_dir)) == 8
    (folder / "1.mp4").write_bytes(whole)
    with pytest.raises(ValueError, match="data: other samples, captions or contents"):
        cache_video_latents(config)


def test_a_video_that_is_not_there_ends_the_run(config: VideoLatentCacheConfig, folder: Path) -> None:
    content = (folder / "1.mp4").read_bytes()
    (folder / "1.mp4").unlink()
    with pytest.raises(ValueError, match=r"1 of 5 files are not there, first .*1\.mp4: put them back"):
        cache_video_latents(config)
    assert not Path(config.output_dir).exists()
    videos = VideoSamples(open_videos(config.data), config.data, channels=3)
    with pytest.raises(ValueError, match=r"1\.mp4: no such file: put it back, and run the same again"):
        list(readable(videos, range(len(videos))))
    assert not is_of_disk(av.error.FileNotFoundError(2, "it is not the file that is missing"))
    (folder / "1.mp4").write_bytes(content)
    cache_video_latents(config)
    assert len(CachedLatents(config.output_dir)) == 10
    nowhere = dataclasses.replace(config.data, path=str(folder / "nowhere"))
    with pytest.raises(ValueError, match="nowhere does not exist"):
        cache_video_latents(dataclasses.replace(config, data=nowhere))


def test_wan_is_not_trained_on_latents_of_pictures(config: VideoLatentCacheConfig, tmp_path: Path) -> None:
    AutoencoderKL(block_out_channels=(4,), norm_num_groups=2).save_pretrained(tmp_path / "kl")
    config = dataclasses.replace(config, vae=str(tmp_path / "kl"))
    cache_video_latents(config)
    with pytest.raises(ValueError, match="a AutoencoderKL, but the autoencoder must be AutoencoderKLWan"):
        train_video(training_config(config))


def test_what_is_no_part_of_a_pipeline_is_named_with_its_option(
    config: VideoLatentCacheConfig, folder: Path
) -> None:
    other = str(folder)  # of clips
    text = dataclasses.replace(config.text, encoder=str(Path(config.vae) / "vae"))
    for change, said in (
        ({"vae": other}, r"holds no autoencoder \(vae\), here or on the hub"),
        ({"text": text}, r"text\.encoder .*vae holds no tokenizer that can be loaded"),
        ({"image_condition": "first", "image_encoder": other}, "image_encoder .* holds no CLIP vision model"),
    ):
        with pytest.raises(ValueError, match=said):
            cache_video_latents(dataclasses.replace(config, **change))
    weights = Path(config.vae) / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"text\.encoder .*wan holds no whole model, here or on the hub"):
        cache_video_latents(config)


@pytest.mark.parametrize("frames", ["first", "first_and_last"])
@pytest.mark.parametrize("encoded", [False, True], ids=["latents", "embeddings"])
def test_image_to_video_sees_the_known_frames(
    config: VideoLatentCacheConfig, image_encoder: str, frames: Any, encoded: bool
) -> None:
    config = dataclasses.replace(
        config, image_condition=frames, image_encoder=image_encoder if encoded else None, clips=1,
        data=dataclasses.replace(config.data, sizes=((16, 32),)),
    )  # fmt: skip
    cache_video_latents(config)
    run = training_config(config)
    objective = build_objective(run.objective)
    model, source, task = run.build(objective)
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter, -0.3, 0.3)
    assert (model.config.in_channels, model.config.out_channels) == (4 + 4 + 4, 4)
    assert model.config.image_dim == (8 if encoded else None)
    batch = default_collate([source.load(0, torch.Generator())])
    mask = batch["condition"][0, :4, :, 0, 0]
    assert mask.tolist() == [[1, 0]] * 3 + [[1, 1 if frames == "first_and_last" else 0]]

    calls = DataCalls(model, run)  # by which layers are aligned
    with torch.no_grad():
        assert predict(model, calls(0)).isfinite().all()

    def loss() -> torch.Tensor:
        arguments = task.conditioning.arguments(batch, [torch.Generator().manual_seed(3)])
        return objective.loss(model, batch["samples"], arguments, [torch.Generator().manual_seed(1)])

    whole = loss()
    assert torch.equal(loss(), whole)
    for name in ("condition", "image_embeds"):
        if name in batch:
            kept = batch[name].clone()
            batch[name][..., -1] += 1
            assert not torch.equal(loss(), whole), name
            batch[name] = kept
    assert ("image_embeds" in batch) == encoded
    names = ("images", "last_images")[: 1 if frames == "first" else 2]
    Image.new("RGB", (32, 16), "orange").save(f"{config.output_dir}.png")
    sheet: dict[str, Any] = {"every": 2, "prompts": ("a",), "num_inference_steps": 1}
    for missing in names:
        pictures = {name: (f"{config.output_dir}.png",) for name in names if name != missing}
        lacking = dataclasses.replace(run, sampling=VideoSamplingConfig(**sheet, **pictures))
        with pytest.raises(ValueError, match=rf"give sampling\.{missing} a picture for each prompt"):
            lacking.build(objective, model)
    pictures = dict.fromkeys(names, (f"{config.output_dir}.png",))
    run = dataclasses.replace(run, sampling=VideoSamplingConfig(**sheet, **pictures))
    assert train_video(run) == 0
    assert open_video(Path(run.output_dir) / "samples" / "step-00000002.mp4").num_frames == 5
    pipeline = MHLAPipeline.from_pretrained(Path(run.output_dir) / "pipeline")
    assert type(pipeline) is WanImageToVideoPipeline
    assert "| caption dropout | 0.1 |" in (Path(run.output_dir) / "pipeline" / "README.md").read_text()
    if encoded:
        plain = dataclasses.replace(config, image_encoder=None, output_dir=f"{config.output_dir}-plain")
        cache_video_latents(plain)
        wrong = dataclasses.replace(run, data=VideoDataConfig("latents", path=plain.output_dir))
        with pytest.raises(ValueError, match=r"takes embeddings of images of width 8, but .* holds None"):
            wrong.build(objective, model)


def test_the_condition_says_nothing_of_frames_that_are_not_known(
    config: VideoLatentCacheConfig, image_encoder: str
) -> None:
    conditions = ImageConditions(load_vae(config.vae, VIDEO_AUTOENCODERS), last=False)
    clip = torch.rand(3, 5, 16, 32) * 2 - 1
    found = conditions(clip)["condition"]
    clip[:, 1:] = 0
    assert torch.equal(conditions(clip)["condition"], found)
    clip[:, 0] = 0
    assert not torch.equal(conditions(clip)["condition"], found)
    with pytest.raises(ValueError, match="image_encoder needs image_condition first"):
        dataclasses.replace(config, image_encoder=image_encoder)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"frames": 6}, r"one more than a multiple of 4 .*, got 6; the nearest are 5 and 9"),
        ({"sizes": ((16, 30),)}, r"must be multiples of 8 .*, got \(16, 30\); the nearest is \(16, 32\)"),
    ],
)
def test_sizes_that_the_autoencoder_does_not_take_are_refused(
    config: VideoLatentCacheConfig, data: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        cache_video_latents(dataclasses.replace(config, data=dataclasses.replace(config.data, **data)))
    assert not Path(config.output_dir).exists()


def test_a_cache_that_does_not_fit_the_run_is_refused(config: VideoLatentCacheConfig) -> None:
    cache_video_latents(config)
    with pytest.raises(ValueError, match=r"latents of 4 channels, but model.in_channels is 16"):
        train_video(training_config(config, in_channels=16))
    with pytest.raises(ValueError, match=r"multiples of the patch \(1, 2, 8\) .*nearest are \(2, 2, 8\)"):
        train_video(training_config(config, patch_size=(1, 2, 8)))
    run = dataclasses.replace(training_config(config), text=TextConfig(encoder="minilm", max_length=8))
    with pytest.raises(ValueError, match=r"\(BertModel\) that lay in .*wan, and minilm has another"):
        train_video(run)
    with pytest.raises(ValueError, match=r"holds another latent cache; .* made of:\n  clips: 2 -> 3\n"):
        cache_video_latents(dataclasses.replace(config, clips=3))
    vae = load_vae(config.vae, VIDEO_AUTOENCODERS)
    torch.nn.init.ones_(vae.decoder.conv_out.bias)
    vae.save_pretrained(Path(config.vae) / "vae")
    with pytest.raises(ValueError, match=r"made of:\n  vae: not the one that it was made with$"):
        cache_video_latents(config)


@pytest.mark.parametrize(
    "setting", [{"frames": 5}, {"sizes": ((8, 8),)}, {"fps": 8.0}, {"decoder": "decord"}]
)
def test_settings_that_latents_bring_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"data\.{next(iter(setting))} is for data.source folder or films"):
        VideoDataConfig("latents", path="x", **setting)


def test_of_two_known_frames_the_first_comes_first() -> None:
    conditions = ImageConditions(AutoencoderKLWan(**WAN).eval(), last=True)
    clip = torch.rand(3, 5, 16, 32) * 2 - 1
    found = conditions(clip)["condition"]
    clip[:, -1] = 0
    other = conditions(clip)["condition"]
    assert torch.equal(other[:, 0], found[:, 0])
    assert not torch.equal(other[:, -1], found[:, -1])


def test_a_drawn_caption_has_its_own_number_of_tokens() -> None:
    row = {"text": torch.ones(5, 4), "tokens": torch.tensor([2, 3]), "weights": torch.ones(2)}
    seen = set()
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        drawn = _draw_texts(row, TextConfig("x", max_length=8), generator)
        assert drawn["text"].shape == (8, 4)
        assert drawn["tokens"] == drawn["text"].any(1).sum()
        seen.add(int(drawn["tokens"]))
    assert seen == {2, 3}
