"""ChronoEdit: pairs of pictures as clips, cached, seen in training, and given to the pipeline alike."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ChronoEditPipeline
from diffusers.utils import load_image
from PIL import Image
from torch.utils.data import default_collate

from mhla_diffusion.autoencoders import VIDEO_AUTOENCODERS
from mhla_diffusion.files.videos import UnreadableVideoError, open_video
from mhla_diffusion.training import (
    LoraConfig,
    OptimizerConfig,
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
from mhla_diffusion.training.data import CachedLatents, VideoSamples, open_videos
from mhla_diffusion.training.data.latents import load_vae
from mhla_diffusion.training.data.pairs import PicturePairs
from tests.backbones.cases import CASES
from tests.weights import weights


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Five pairs, one of them upright, each with a caption beside its edit."""
    random = np.random.default_rng(0)
    for i, size in enumerate([(16, 32)] * 4 + [(32, 16)]):
        for side in ("before", "after"):
            path = tmp_path / "pairs" / side / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 255, (*size, 3), np.uint8)).save(path)
        path.with_suffix(".txt").write_text("abcde"[: i + 1])
    return tmp_path / "pairs"


@pytest.fixture
def cache(config: VideoLatentCacheConfig, pairs: Path, image_encoder: str) -> VideoLatentCacheConfig:
    return dataclasses.replace(
        config, clips=1, image_condition="edit", image_encoder=image_encoder,
        text=dataclasses.replace(config.text, pipeline="ChronoEditPipeline"),
        data=VideoDataConfig("pairs", path=str(pairs), frames=2, sizes=((16, 32), (32, 16))),
    )  # fmt: skip


def run_of(cache: VideoLatentCacheConfig, **changes: Any) -> VideoTrainingConfig:
    """Two steps of a model for these latents: 4 channels, 4 of a mask, 4 of what is known."""
    folder = Path(cache.output_dir).parent
    shape = {"in_channels": 12, "out_channels": 4, "text_dim": 16, "image_dim": 8, "added_kv_proj_dim": 24}
    if not (folder / "model").exists():
        CASES["ChronoEdit"].make(**shape).save_pretrained(folder / "model")
    settings: dict[str, Any] = {
        "model": VideoModelConfig(init_from=str(folder / "model")),
        "data": VideoDataConfig("latents", path=cache.output_dir),
        "text": cache.text,
        "trainer": TrainerConfig(
            batch_size=2, max_steps=2, num_workers=0, checkpoint_every=1,
            optimizer=OptimizerConfig(learning_rate=0.01),
        ),
        "output_dir": str(folder / "run"),
    }  # fmt: skip
    return VideoTrainingConfig(**(settings | changes))


def test_a_pair_is_a_clip_of_two_frames(pairs: Path) -> None:
    source = VideoDataConfig("pairs", path=str(pairs), frames=2, sizes=((16, 32), (32, 16)))
    samples = VideoSamples(open_videos(source), source, channels=3)
    assert len(samples) == 5
    assert samples.buckets == [0, 0, 0, 0, 1]
    sample = samples.load(2, seeded(0))
    assert sample["caption"] == "abc"
    for frame, side in enumerate(("before", "after")):
        pixels = np.asarray(Image.open(pairs / side / "2.png"))
        shown = ((sample["samples"][:, frame] + 1) * 127.5).round().byte()
        assert torch.equal(shown.movedim(0, -1), torch.from_numpy(pixels.copy()))


def test_pairs_that_are_none_are_named(pairs: Path) -> None:
    source = VideoDataConfig("pairs", path=str(pairs), frames=2)
    opened = open_videos(source)
    assert isinstance(opened, PicturePairs)
    (pairs / "before" / "0.png").unlink()
    Image.new("RGB", (8, 8)).save(pairs / "before" / "1.png")
    for index, message in enumerate(("picture before: .*before/0.png", "8 x 8 and 16 x 32 pixels: make")):
        with pytest.raises(UnreadableVideoError, match=rf"after/{index}\.png.*{message}"):
            opened.read(index, length=2, fps=None, start=0.0)
    with pytest.raises(ValueError, match=r"clips of 2 frames: set data\.frames to 2, got 16"):
        VideoDataConfig("pairs", path=str(pairs))


@torch.no_grad()
def test_a_cache_has_the_picture_and_its_edit_as_two_frames_of_latents(cache: VideoLatentCacheConfig) -> None:
    cache_video_latents(cache)
    cached = CachedLatents(cache.output_dir)
    assert (cached.given, cached.sizes) == ("edit", [(2, 2, 4), (2, 4, 2)])
    vae = load_vae(cache.vae, VIDEO_AUTOENCODERS)
    clip = VideoSamples(open_videos(cache.data), cache.data, channels=3).load(0, seeded(0))["samples"]
    latents = vae.encode(clip[None, :, [0, 1, 1, 1, 1]]).latent_dist.mode()[0]
    mean, std = (torch.tensor(v).view(4, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    row = cached.load(0, seeded(0))
    torch.testing.assert_close(row["samples"], (latents - mean) / std, atol=5e-3, rtol=0)  # float16
    assert row["condition"][:4, :, 0, 0].tolist() == [[1, 0]] * 4


def test_a_run_sees_the_picture_and_leaves_a_pipeline_that_is_given_the_same(
    cache: VideoLatentCacheConfig, pairs: Path
) -> None:
    cache_video_latents(cache)
    picture = str(pairs / "before" / "0.png")
    sampling = VideoSamplingConfig(every=2, prompts=("a",), images=(picture,), num_inference_steps=1)
    run = run_of(cache, sampling=sampling, trainable="attention")
    objective = build_objective(run.objective)
    model, source, task = run.build(objective)
    batch = default_collate([source.load(0, seeded(0))])

    def loss() -> torch.Tensor:
        arguments = task.conditioning.arguments(batch, [seeded(3)])
        return objective.loss(model, batch["samples"], arguments, [seeded(1)])

    whole = loss()
    assert torch.equal(loss(), whole)
    for name in ("condition", "image_embeds"):
        kept = batch[name].clone()
        batch[name][..., -1] += 1
        assert not torch.equal(loss(), whole), name
        batch[name] = kept

    assert train_video(run) == 0
    assert open_video(Path(run.output_dir) / "samples" / "step-00000002.mp4").num_frames == 5
    before, after = weights(run.model.init_from or ""), weights(run.output_dir)
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert "blocks.0.attn1.processor.mixing" in changed
    assert all(".attn1." in name for name in changed)

    pipeline = ChronoEditPipeline.from_pretrained(Path(run.output_dir) / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    given: list[dict[str, Any]] = []
    pipeline.transformer.register_forward_pre_hook(
        lambda model, args, kwargs: given.append(kwargs), with_kwargs=True
    )
    made = pipeline(
        image=load_image(picture), prompt="a", num_inference_steps=1, output_type="pt", **task.call
    ).frames
    assert made.shape == (1, 5, 3, 16, 32)
    assert made.isfinite().all()
    torch.testing.assert_close(given[-1]["hidden_states"][:, 4:], batch["condition"], atol=5e-3, rtol=5e-3)
    torch.testing.assert_close(given[-1]["encoder_hidden_states_image"], batch["image_embeds"].flatten(0, 1))


def test_adapters_are_trained_on_ends_of_clips_and_a_run_goes_on_to_the_bit(
    cache: VideoLatentCacheConfig, config: VideoLatentCacheConfig
) -> None:
    cache = dataclasses.replace(cache, data=dataclasses.replace(config.data, frames=7))
    cache_video_latents(cache)
    run = run_of(cache, lora=LoraConfig(rank=2))
    assert train_video(run) == 0
    again = dataclasses.replace(run, output_dir=f"{run.output_dir}-again")
    assert train_video(again, resume=f"{run.output_dir}/checkpoints/step-00000001") == 0
    whole, resumed = weights(run.output_dir), weights(again.output_dir)
    assert all(torch.equal(weight, resumed[name]) for name, weight in whole.items())
    before = weights(run.model.init_from or "")
    assert not torch.equal(before["blocks.0.ffn.net.2.weight"], whole["blocks.0.ffn.net.2.weight"])


def test_what_does_not_fit_is_refused(cache: VideoLatentCacheConfig, config: VideoLatentCacheConfig) -> None:
    with pytest.raises(ValueError, match=r"edit is for ChronoEdit, .* give image_encoder"):
        dataclasses.replace(cache, image_encoder=None)
    single = dataclasses.replace(config.data, frames=1)
    with pytest.raises(ValueError, match=r"data\.frames must be 2 or more, got 1"):
        cache_video_latents(dataclasses.replace(cache, data=single))
    first = dataclasses.replace(cache, image_condition="first", data=config.data)
    with pytest.raises(ValueError, match=r"models of ChronoEditPipeline .* --image_condition edit, and set"):
        cache_video_latents(first)
    assert not Path(cache.output_dir).exists()
