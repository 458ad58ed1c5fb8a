"""Wan pipelines with MHLA, of tiny real parts."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaVideoPipeline,
    SanaVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)  # fmt: skip
from PIL import Image
from torch import Tensor

from mhla_diffusion import (
    MHLAPipeline,
    MHLASanaVideoTransformer3DModel,
    MHLAWanPipeline,
    MHLAWanTransformer3DModel,
)
from mhla_diffusion.files.videos import open_video
from mhla_diffusion.pipelines.generation import generate_videos, save_strips

MakePipeline = Callable[..., WanPipeline]

SCHEDULERS: list[Any] = [
    UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    FlowMatchEulerDiscreteScheduler(shift=3.0),
]


@pytest.fixture
def make_pipeline(text_parts: dict[str, Any], video_vae: AutoencoderKLWan) -> Callable[..., WanPipeline]:
    """``make_pipeline(**components)``: a stock pipeline, some of its parts replaced."""
    transformer: dict[str, Any] = {
        "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
        "num_layers": 2, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32,
    }  # fmt: skip

    def make(**components: Any) -> WanPipeline:
        stock = WanTransformer3DModel(**transformer).eval()
        defaults = {**text_parts, "vae": video_vae, "scheduler": SCHEDULERS[0], "transformer": stock}
        return WanPipeline(**{**defaults, **components})

    return make


@pytest.fixture
def pixel_pipeline(text_parts: dict[str, Any]) -> MHLAWanPipeline:
    """As training leaves it: on gray pixels, 4 frames of 8 x 12."""
    transformer = MHLAWanTransformer3DModel(
        patch_size=(2, 4, 4), num_attention_heads=2, attention_head_dim=12, in_channels=1, out_channels=1,
        num_layers=1, text_dim=16, freq_dim=16, ffn_dim=32, mhla_config={"blocks": [1, 1, 2]},
        sample_grid=(2, 2, 3),
    ).eval()  # fmt: skip
    # A new model answers zero, which would prove nothing.
    torch.nn.init.normal_(transformer.proj_out.weight)
    return MHLAWanPipeline(
        **text_parts, transformer=transformer, scheduler=SCHEDULERS[2], max_sequence_length=8, fps=8.0
    )


def generate(pipeline: Any, **arguments: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    settings = {
        "height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 2, "guidance_scale": 3.0,
        "output_type": "pt", "generator": torch.Generator().manual_seed(0),
    }  # fmt: skip
    return pipeline("a cat", **{**settings, **arguments}).frames


def test_a_stock_pipeline_is_converted_on_loading_and_survives_saving(
    make_pipeline: MakePipeline, tmp_path: Path
) -> None:
    make_pipeline().save_pretrained(tmp_path / "stock")
    config = {"blocks": [1, 1, 3], "layers": [1], "gate": True}
    pipeline = MHLAPipeline.from_pretrained(tmp_path / "stock", mhla_config=config)
    assert type(pipeline) is WanPipeline
    assert isinstance(pipeline.transformer, MHLAWanTransformer3DModel)
    assert pipeline.transformer.layer_attention == ["softmax", "mhla"]
    frames = generate(pipeline)
    assert frames.shape == (1, 9, 3, 32, 48)
    assert frames.isfinite().all()
    pipeline.save_pretrained(tmp_path / "mhla")
    again = MHLAPipeline.from_pretrained(tmp_path / "mhla")
    assert isinstance(again.transformer, MHLAWanTransformer3DModel)
    torch.testing.assert_close(generate(again), frames)


def test_a_sana_video_pipeline_is_converted_too(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    parts = make_pipeline().components
    transformer = SanaVideoTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=16,
    )  # fmt: skip
    kept = {name: parts[name] for name in ("tokenizer", "text_encoder", "vae")}
    stock = SanaVideoPipeline(**kept, transformer=transformer, scheduler=SCHEDULERS[1])
    stock.save_pretrained(tmp_path / "stock")
    config = {"blocks": [1, 1, 3], "layers": [1], "gate": True}
    pipeline = MHLAPipeline.from_pretrained(tmp_path / "stock", mhla_config=config)
    assert type(pipeline) is SanaVideoPipeline
    assert isinstance(pipeline.transformer, MHLASanaVideoTransformer3DModel)
    assert pipeline.transformer.layer_attention == ["linear", "mhla"]

    def frames(pipeline: Any) -> Tensor:
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(
            "a cat", height=32, width=64, frames=9, num_inference_steps=2, output_type="pt",
            max_sequence_length=8, complex_human_instruction=None, use_resolution_binning=False,
            generator=torch.Generator().manual_seed(0),
        ).frames  # fmt: skip

    made = frames(pipeline)
    assert made.shape == (1, 9, 3, 32, 64)
    assert made.isfinite().all()
    pipeline.save_pretrained(tmp_path / "mhla")
    again = MHLAPipeline.from_pretrained(tmp_path / "mhla")
    assert isinstance(again.transformer, MHLASanaVideoTransformer3DModel)
    torch.testing.assert_close(frames(again), made)


def test_a_stock_pipeline_stays_itself_without_a_config(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    stock = make_pipeline()
    stock.save_pretrained(tmp_path)
    pipeline = MHLAPipeline.from_pretrained(tmp_path)
    assert type(pipeline.transformer) is WanTransformer3DModel
    torch.testing.assert_close(generate(pipeline), generate(stock))


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda s: type(s).__name__)
def test_flow_matching_schedulers_and_any_size(make_pipeline: MakePipeline, scheduler: Any) -> None:
    transformer = MHLAWanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, num_layers=2,
        text_dim=16, freq_dim=16, ffn_dim=32, mhla_config={"blocks": [1, 2, 2]}, sample_grid=(3, 2, 3),
    ).eval()  # fmt: skip
    pipeline = make_pipeline(transformer=transformer, scheduler=scheduler)
    for frames, height, width in ((1, 32, 32), (5, 48, 80)):
        video = generate(pipeline, num_frames=frames, height=height, width=width)
        assert video.shape == (1, frames, 3, height, width)
        assert video.isfinite().all()


def pixels(pipeline: MHLAWanPipeline, prompt: Any = "a cat", **arguments: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "pt"}
    return pipeline(prompt, **{**settings, **arguments}).frames


def test_a_pipeline_on_pixels_has_the_size_it_was_trained_at(pixel_pipeline: MHLAWanPipeline) -> None:
    video = pixels(pixel_pipeline)
    assert video.shape == (1, 4, 1, 8, 12)
    assert 0 <= video.min() < video.max() <= 1
    assert pixels(pixel_pipeline, num_frames=2, height=16, width=4).shape == (1, 2, 1, 16, 4)
    assert pixels(pixel_pipeline, ["a", "b"], num_videos_per_prompt=2).shape[0] == 4
    assert not torch.equal(video, pixels(pixel_pipeline, guidance_scale=9.0))
    latents = pixels(pixel_pipeline, output_type="latent")
    torch.testing.assert_close(video, (latents.transpose(1, 2) / 2 + 0.5).clamp(0, 1))
    frames = pixels(pixel_pipeline, output_type="pil")[0]
    assert (len(frames), frames[0].size) == (4, (12, 8))


def test_prompt_embeds_and_noise_stand_in_for_what_they_are_made_of(pixel_pipeline: MHLAWanPipeline) -> None:
    embeds, negative = pixel_pipeline.encode_prompt("a cat", max_sequence_length=8)
    noise = torch.randn(1, 1, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    expected = pixels(pixel_pipeline)
    torch.testing.assert_close(pixels(pixel_pipeline, None, prompt_embeds=embeds), expected)
    torch.testing.assert_close(pixels(pixel_pipeline, latents=noise, generator=None), expected)
    pixel_pipeline.register_modules(tokenizer=None, text_encoder=None)  # to save their memory
    texts = {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
    torch.testing.assert_close(pixels(pixel_pipeline, None, **texts), expected)


def test_prompts_that_are_cut_are_named(
    pixel_pipeline: MHLAWanPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    short, long = "a cat", "a cat on a mat"
    with caplog.at_level("WARNING", logger="mhla_diffusion.pipelines.video"):
        pixels(pixel_pipeline, short)
        assert not caplog.records
        pixels(pixel_pipeline, [short, long], negative_prompt=["rain and wind", ""])
    assert [record.getMessage() for record in caplog.records] == [
        f"cut after max_sequence_length 8 tokens: {text!r}" for text in (long, "rain and wind")
    ]
    caplog.clear()
    pixels(pixel_pipeline, long, max_sequence_length=64)
    assert not caplog.records


def test_callbacks_see_every_step(pixel_pipeline: MHLAWanPipeline) -> None:
    seen = []

    def note(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append((step, tensors["latents"].shape))
        return tensors

    pixels(pixel_pipeline, callback_on_step_end=note)
    assert seen == [(0, (1, 1, 4, 8, 12)), (1, (1, 1, 4, 8, 12))]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_frames": 3}, r"must be multiples of \(2, 4, 4\), got \(3, 8, 12\)"),
        ({"height": 10}, r"got \(4, 10, 12\)"),
        ({"max_sequence_length": -1}, "max_sequence_length must be at least 1, got -1"),
        ({"latents": torch.zeros(1, 1, 4, 8, 8)}, r"latents must be \(1, 1, 4, 8, 12\)"),
    ],
    ids=["frames", "height", "text", "latents"],
)
def test_sizes_that_do_not_fit_are_refused(
    pixel_pipeline: MHLAWanPipeline, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pixels(pixel_pipeline, **arguments)


def test_a_trained_pipeline_survives_saving(pixel_pipeline: MHLAWanPipeline, tmp_path: Path) -> None:
    pixel_pipeline.save_pretrained(tmp_path)
    again = MHLAPipeline.from_pretrained(tmp_path)
    assert type(again) is MHLAWanPipeline
    assert (again.config.max_sequence_length, again.config.fps) == (8, 8.0)
    torch.testing.assert_close(pixels(again), pixels(pixel_pipeline))
    card = (tmp_path / "README.md").read_text()
    assert "| size | 4 frames of 8 x 12 pixels at 8 a second, pixel space |" in card
    assert 'pipe("...").frames[0]' in card


def test_nothing_is_logged_on_loading(
    pixel_pipeline: MHLAWanPipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pixel_pipeline.register_to_config(sample_size=[4, 8, 12])
    pixel_pipeline.save_pretrained(tmp_path)
    logger = logging.getLogger("diffusers")  # does not propagate
    logger.addHandler(caplog.handler)
    try:
        again = MHLAPipeline.from_pretrained(tmp_path)
    finally:
        logger.removeHandler(caplog.handler)
    assert again.default_size == (4, 8, 12)
    assert not caplog.records


def test_with_an_autoencoder_it_is_the_stock_pipeline(make_pipeline: MakePipeline) -> None:
    transformer = MHLAWanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, num_layers=1,
        text_dim=16, freq_dim=16, ffn_dim=32, mhla_config={"blocks": [1, 1, 3]}, sample_grid=(3, 2, 3),
    ).eval()  # fmt: skip
    torch.nn.init.normal_(transformer.proj_out.weight)
    stock = make_pipeline(transformer=transformer)
    names = ("tokenizer", "text_encoder", "vae", "scheduler", "transformer")
    ours = MHLAWanPipeline(**{name: getattr(stock, name) for name in names})
    assert ours.default_size == (9, 32, 48)
    compiled = MHLAWanPipeline(**{name: getattr(stock, name) for name in names})
    compiled.vae = torch.compile(stock.vae)
    assert compiled.default_size == (9, 32, 48)
    expected = generate(stock)
    torch.testing.assert_close(generate(ours, height=None, width=None, num_frames=None), expected)


def test_videos_are_generated_into_a_folder_and_gone_on_with(
    pixel_pipeline: MHLAWanPipeline, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"prompts": ["a", "b"], "num_videos": 3, "num_inference_steps": 2}
    manifest = generate_videos(pixel_pipeline, tmp_path / "out", batch_size=2, **settings)
    content = json.loads(manifest.read_text())
    assert content["complete"] is True
    assert [(row["prompt"], row["seed"]) for row in content["videos"]] == [("a", 0), ("b", 1), ("a", 2)]
    files = sorted((tmp_path / "out").glob("*.mp4"))
    reader = open_video(files[1])
    assert (reader.num_frames, reader.fps, reader.read([0]).shape) == (4, 8.0, (1, 8, 12, 3))
    save_strips(tmp_path / "out", tmp_path / "strips.png", rows=2)
    assert Image.open(tmp_path / "strips.png").size == (4 * 12 * 8, 2 * 8 * 8)
    before = [file.read_bytes() for file in files]
    files[1].unlink()
    generate_videos(pixel_pipeline, tmp_path / "out", batch_size=2, **settings)
    assert [file.read_bytes() for file in files] == before
    with pytest.raises(ValueError, match="holds another run"):
        generate_videos(pixel_pipeline, tmp_path / "out", batch_size=2, seed=1, **settings)
    with pytest.raises(ValueError, match=r"prompts \(--prompts\) must be a list"):
        generate_videos(pixel_pipeline, tmp_path / "other", prompts="a cat")
