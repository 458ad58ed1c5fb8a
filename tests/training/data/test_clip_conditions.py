"""Wan VACE: what is known of a clip, drawn, cached, seen in training, and given to the pipeline alike."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from diffusers import AutoencoderKL, WanVACEPipeline
from PIL import Image
from torch.utils.data import default_collate

from mhla_diffusion import MHLAPipeline
from mhla_diffusion.autoencoders import VIDEO_AUTOENCODERS
from mhla_diffusion.files.videos import open_video
from mhla_diffusion.pipelines.generation import generate_videos
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
from mhla_diffusion.training.data.clip_conditions import Controls, ControlTask, draw_control, read_control
from mhla_diffusion.training.data.latents import load_vae
from tests.backbones.cases import CASES
from tests.weights import weights


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def cache(config: VideoLatentCacheConfig) -> VideoLatentCacheConfig:
    """Of two tasks, and captions as the pipeline of VACE embeds them."""
    text = dataclasses.replace(config.text, pipeline="WanVACEPipeline")
    return dataclasses.replace(config, text=text, control=("first", "inpainting"))


def run_of(cache: VideoLatentCacheConfig, **changes: Any) -> VideoTrainingConfig:
    """Two steps of a model for these latents: 2 x 4 channels of a control, and 8 x 8 of its mask."""
    folder = Path(cache.output_dir)
    channels = {"in_channels": 4, "out_channels": 4, "vace_in_channels": 72, "text_dim": 16}
    if not (folder.parent / "model").exists():
        CASES["WanVACE"].make(**channels).save_pretrained(folder.parent / "model")
    settings: dict[str, Any] = {
        "model": VideoModelConfig(init_from=str(folder.parent / "model")),
        "data": VideoDataConfig("latents", path=cache.output_dir),
        "text": cache.text,
        "trainer": TrainerConfig(
            batch_size=2, max_steps=2, num_workers=0, checkpoint_every=1,
            optimizer=OptimizerConfig(learning_rate=0.01),
        ),
        "output_dir": str(folder.parent / "run"),
    }  # fmt: skip
    return VideoTrainingConfig(**(settings | changes))


@pytest.mark.parametrize("task", get_args(ControlTask))
def test_a_control_is_gray_where_nothing_is_known(task: ControlTask) -> None:
    clip = torch.rand(3, 5, 16, 32) * 0.9 + 0.1
    (video, mask), (_, other) = (draw_control(clip, task, seeded(seed)) for seed in (0, 1))
    if task == "gray":
        assert mask.all()
        assert torch.equal(video[0], video[1])
        luma = torch.einsum("cfhw,c", clip, torch.tensor([0.2989, 0.587, 0.114]))  # ITU-R BT.601
        torch.testing.assert_close(video[0], luma)
        return
    assert torch.equal(video, clip * (1 - mask))
    if task in ("first", "first_and_last"):
        assert mask.mean(dim=(1, 2)).tolist() == [0, 1, 1, 1, 1 if task == "first" else 0]
        return
    box = mask if task == "inpainting" else 1 - mask
    rows, columns = box[0].amax(dim=1), box[0].amax(dim=0)
    assert torch.equal(box, torch.outer(rows, columns).expand_as(box)), "a box, the same in all frames"
    assert 4 <= rows.sum() <= 12
    assert 8 <= columns.sum() <= 24
    assert not torch.equal(mask, other)


def test_a_cache_has_the_control_of_each_clip(
    cache: VideoLatentCacheConfig, caplog: pytest.LogCaptureFixture
) -> None:
    cache = dataclasses.replace(cache, data=dataclasses.replace(cache.data, fps=None))
    cache_video_latents(cache)
    assert "clips have the rates of their files" in caplog.text
    cached = CachedLatents(cache.output_dir)
    assert (cached.given, cached.control, cached.tasks) == ("control", (72, 2, 2, 4), cache.control)
    masks = [cached.load(row, seeded(0))["control"][8:] for row in range(10)]
    # Of five frames the pipeline takes the masks of the second and the fourth.
    first = [bool(mask.all()) for mask in masks]
    assert 0 < sum(first) < 10, "both tasks"
    videos = VideoSamples(open_videos(cache.data), cache.data, channels=3)
    for row in (0, 9):  # of both sizes
        generator = seeded(row)
        clip = videos.load(row // 2, generator)["samples"]
        made = Controls(load_vae(cache.vae, VIDEO_AUTOENCODERS), cache.control)(clip, generator)
        torch.testing.assert_close(made["control"].float(), cached.load(row, seeded(0))["control"])


def test_the_loss_sees_the_control(cache: VideoLatentCacheConfig) -> None:
    cache_video_latents(cache)
    run = run_of(cache)
    objective = build_objective(run.objective)
    model, source, task = run.build(objective)
    batch = default_collate([source.load(0, seeded(0)), source.load(1, seeded(0))])

    def loss() -> torch.Tensor:
        arguments = task.conditioning.arguments(batch, [seeded(3), seeded(4)])
        return objective.loss(model, batch["samples"], arguments, [seeded(1), seeded(2)])

    whole, control = loss(), batch["control"]
    assert torch.equal(loss(), whole)
    for part in (slice(0, 4), slice(4, 8), slice(8, 72)):
        batch["control"] = control.clone()
        batch["control"][:1, part] += 1
        other = loss()
        assert not torch.equal(other[0], whole[0]), part
        assert torch.equal(other[1], whole[1])


def test_a_run_leaves_a_pipeline_that_is_given_the_control_of_training(
    cache: VideoLatentCacheConfig, folder: Path
) -> None:
    cache_video_latents(cache)
    clips = (str(folder / "0.mp4"), str(folder / "1.mp4"))
    sampling = VideoSamplingConfig(every=2, prompts=("a", "b"), videos=clips, num_inference_steps=1)
    run = run_of(cache, sampling=sampling, trainable="attention")
    assert train_video(run) == 0
    assert open_video(Path(run.output_dir) / "samples" / "step-00000002.mp4").num_frames == 5
    before, after = weights(run.model.init_from or ""), weights(run.output_dir)
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert all(".attn1." in name for name in changed)
    assert "vace_blocks.0.attn1.processor.mixing" in changed
    card = (Path(run.output_dir) / "pipeline" / "README.md").read_text()
    assert "| control | first, inpainting |" in card
    assert "5 frames of 16 x 32 pixels" in card

    pipeline = WanVACEPipeline.from_pretrained(Path(run.output_dir) / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    given: list[torch.Tensor] = []
    pipeline.transformer.register_forward_pre_hook(
        lambda model, args, kwargs: given.append(kwargs["control_hidden_states"]), with_kwargs=True
    )
    task = run.build(build_objective(run.objective))[2]
    assert task.prepare is not None
    for number, row in enumerate(run.sampling.rows()):
        asked = task.prepare(number, row)
        made = pipeline(**asked, **task.call, num_inference_steps=1, output_type="pt").frames
        assert made.shape == (1, 5, 3, 16, 32)
        assert made.isfinite().all()
        clip = asked["video"][0].transpose(0, 1) * 2 - 1
        same = read_control(
            row["video"], cache.control[number], size=(5, 16, 32), fps=8, generator=seeded(number)
        )
        assert torch.equal(asked["mask"], same["mask"])
        vae = load_vae(cache.vae, VIDEO_AUTOENCODERS)
        known = Controls(vae, [cache.control[number]])(clip, seeded(number))["control"]
        torch.testing.assert_close(given[-1][0], known.float(), atol=5e-3, rtol=5e-3)  # float16


def test_videos_are_generated_from_texts_and_from_a_first_frame(
    cache: VideoLatentCacheConfig, tmp_path: Path
) -> None:
    cache_video_latents(cache)
    run = run_of(cache)
    assert train_video(run) == 0
    pipeline = MHLAPipeline.from_pretrained(Path(run.output_dir) / "pipeline")
    given: list[torch.Tensor] = []
    pipeline.transformer.register_forward_pre_hook(
        lambda model, args, kwargs: given.append(kwargs["control_hidden_states"]), with_kwargs=True
    )
    pixels = torch.randint(256, (16, 32, 3), dtype=torch.uint8)
    (tmp_path / "pictures").mkdir()
    Image.fromarray(pixels.numpy()).save(tmp_path / "pictures" / "a.png")
    for images in (None, tmp_path / "pictures"):
        out = tmp_path / ("texts" if images is None else "frames")
        generate_videos(pipeline, out, prompts=["a", "b"], num_inference_steps=1, images=images)
        reader = open_video(out / "000001.mp4")
        assert (reader.num_frames, reader.fps) == (5, 8)
        assert reader.read([0]).shape[1:3] == (16, 32)
    clip = torch.zeros(3, 5, 16, 32)
    clip[:, 0] = pixels.movedim(-1, 0) / 127.5 - 1
    vae = load_vae(cache.vae, VIDEO_AUTOENCODERS)
    known = Controls(vae, ["first"])(clip, seeded(0))["control"]
    torch.testing.assert_close(given[-1][0], known.float(), atol=5e-3, rtol=5e-3)  # float16
    assert not torch.allclose(given[0], given[-1], atol=1e-2)


def test_adapters_are_trained_and_a_run_goes_on_to_the_bit(cache: VideoLatentCacheConfig) -> None:
    cache_video_latents(cache)
    run = run_of(cache, lora=LoraConfig(rank=2))
    assert train_video(run) == 0
    again = dataclasses.replace(run, output_dir=f"{run.output_dir}-again")
    assert train_video(again, resume=f"{run.output_dir}/checkpoints/step-00000001") == 0
    whole, resumed = weights(run.output_dir), weights(again.output_dir)
    assert all(torch.equal(weight, resumed[name]) for name, weight in whole.items())
    before = weights(run.model.init_from or "")
    assert not torch.equal(before["vace_blocks.0.ffn.net.2.weight"], whole["vace_blocks.0.ffn.net.2.weight"])


def test_runs_that_do_not_fit_the_control_are_refused(
    cache: VideoLatentCacheConfig, folder: Path, tmp_path: Path
) -> None:
    cache_video_latents(cache)
    objective = build_objective(run_of(cache).objective)
    sheet: dict[str, Any] = {"every": 1, "prompts": ("a",), "num_inference_steps": 1}
    with pytest.raises(ValueError, match=r"the model is given a video: give sampling\.videos a video for"):
        run_of(cache, sampling=VideoSamplingConfig(**sheet)).build(objective)
    with pytest.raises(ValueError, match=r"sampling\.videos must name a video for each of the 1 prompts"):
        VideoSamplingConfig(**sheet, videos=(str(folder / "0.mp4"),) * 2)
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"broken\.mp4"):
        run_of(cache, sampling=VideoSamplingConfig(**sheet, videos=(str(broken),))).build(objective)
    CASES["WanVACE"].make(in_channels=4, out_channels=4, vace_in_channels=96, text_dim=16).save_pretrained(
        tmp_path / "wide"
    )
    with pytest.raises(ValueError, match=r"takes 96 channels of a control, but .* holds 72"):
        run_of(cache, model=VideoModelConfig(init_from=str(tmp_path / "wide"))).build(objective)


def test_caches_of_a_control_that_no_model_takes_are_refused(
    cache: VideoLatentCacheConfig, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"control \['first', 'inpainting'\] is for Wan VACE, and image"):
        dataclasses.replace(cache, image_condition="first")
    plain = dataclasses.replace(cache, control=())
    with pytest.raises(ValueError, match=r"models of WanVACEPipeline .* --control, such as '\[first, "):
        cache_video_latents(plain)
    other = dataclasses.replace(cache, text=dataclasses.replace(cache.text, pipeline=""))
    with pytest.raises(ValueError, match=r"is for WanVACEPipeline alone: set text\.pipeline to that, got ''"):
        cache_video_latents(other)
    AutoencoderKL(norm_num_groups=2, block_out_channels=(4,)).save_pretrained(tmp_path / "kl")
    with pytest.raises(ValueError, match="decodes by an AutoencoderKLWan, got an AutoencoderKL: give"):
        cache_video_latents(dataclasses.replace(cache, vae=str(tmp_path / "kl")))
    assert not Path(cache.output_dir).exists()


def test_boxes_of_inpainting_lie_in_the_frame() -> None:
    clip = torch.zeros(3, 2, 16, 32)
    for seed in range(50):
        _, mask = draw_control(clip, "inpainting", torch.Generator().manual_seed(seed))
        assert 4 <= mask[0].amax(1).sum() <= 12
        assert 8 <= mask[0].amax(0).sum() <= 24
