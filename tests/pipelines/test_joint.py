"""Pipelines whose self-attention sees more than a grid: a text beside an image, pictures ahead of a video."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    LTXConditionPipeline,
    LTXI2VLongMultiPromptPipeline,
    LTXVideoTransformer3DModel,
    QwenImageImg2ImgPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition
from PIL import Image
from torch import Tensor, nn

from mhla_diffusion import MHLAPipeline, MHLAQwenImageTransformer2DModel, convert_to_mhla
from mhla_diffusion.pipelines.generation import generate_images
from tests.text_encoders import make_qwen_parts

TEXTS = ["a red cat", "two birds on a fence, in winter"]


@pytest.fixture
def qwen_pipeline() -> QwenImagePipeline:
    """Images of texts, 8 pixels to a latent; a tokenizer of single characters."""
    parts = make_qwen_parts()
    transformer = QwenImageTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=4, num_layers=2,
        joint_attention_dim=16, axes_dims_rope=(4, 4, 4),
    )  # fmt: skip
    for parameter in transformer.parameters():
        nn.init.normal_(parameter, std=0.2)
    vae = AutoencoderKLQwenImage(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    pipeline = QwenImagePipeline(
        FlowMatchEulerDiscreteScheduler(),
        vae.eval(),
        parts["text_encoder"],
        parts["tokenizer"],
        transformer.eval(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline: Any, texts: list[str], **settings: Any) -> Tensor:
    generators = [torch.Generator().manual_seed(i) for i in range(len(texts))]
    arguments = {"num_inference_steps": 2, "height": 48, "width": 80, "output_type": "pt", **settings}
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(texts, generator=generators, **arguments).images


def test_a_stock_pipeline_is_converted_on_loading_and_saved(
    qwen_pipeline: QwenImagePipeline, tmp_path: Path
) -> None:
    qwen_pipeline.save_pretrained(tmp_path / "stock")
    stock = MHLAPipeline.from_pretrained(tmp_path / "stock")
    assert type(stock) is QwenImagePipeline
    assert torch.equal(generate(stock, TEXTS), generate(qwen_pipeline, TEXTS))
    pipeline = MHLAPipeline.from_pretrained(tmp_path / "stock", mhla_config={"blocks": (2, 2), "gate": True})
    assert type(pipeline) is QwenImagePipeline
    assert isinstance(pipeline.transformer, MHLAQwenImageTransformer2DModel)
    images = generate(pipeline, TEXTS)
    assert images.shape == (2, 3, 48, 80)
    assert not torch.equal(images, generate(stock, TEXTS))
    pipeline.save_pretrained(tmp_path / "converted")
    again = MHLAPipeline.from_pretrained(tmp_path / "converted")
    assert torch.equal(generate(again, TEXTS), images)


def test_a_text_beside_longer_ones_gives_the_same_image(qwen_pipeline: QwenImagePipeline) -> None:
    """Its padding does not count, and a prompt against which to generate has a length of its own."""
    pipeline = converted(qwen_pipeline)
    for negative in ({}, {"true_cfg_scale": 3.0, "negative_prompt": "blurred"}):
        batch = generate(pipeline, TEXTS, **negative)
        alone = generate(pipeline, TEXTS[:1], **negative)
        torch.testing.assert_close(batch[:1], alone, rtol=1e-3, atol=1e-4)
    assert not torch.equal(generate(pipeline, TEXTS[:1]), alone)


def converted(pipeline: QwenImagePipeline) -> QwenImagePipeline:
    transformer = convert_to_mhla(pipeline.transformer, {"blocks": (2, 2)})
    pipeline.register_modules(transformer=transformer)
    return pipeline


def test_images_of_images_are_made_by_the_same_transformer(qwen_pipeline: QwenImagePipeline) -> None:
    pipeline = QwenImageImg2ImgPipeline(**converted(qwen_pipeline).components)
    pictures = [Image.new("RGB", (80, 48), colour) for colour in ("red", "blue")]
    images = generate(pipeline, TEXTS, image=pictures, strength=0.9)
    assert images.shape == (2, 3, 48, 80)
    assert images.isfinite().all()


def test_images_of_prompts_are_generated_in_a_folder(
    qwen_pipeline: QwenImagePipeline, tmp_path: Path
) -> None:
    """Guidance is its true_cfg_scale, away from the empty text where no other is given."""
    pipeline, size = converted(qwen_pipeline), {"num_inference_steps": 1, "height": 32, "width": 32}
    for guidance, call in ((None, {}), (3.0, {"true_cfg_scale": 3.0, "negative_prompt": ["", ""]})):
        out = tmp_path / str(guidance)
        manifest = generate_images(
            pipeline, out, prompts=TEXTS, per_prompt=2, batch_size=2, guidance_scale=guidance, **size
        )
        assert json.loads(manifest.read_text()).get("true_cfg_scale") == guidance
        pictures = [np.asarray(Image.open(path)).astype(int) for path in sorted(out.rglob("*.png"))]
        assert [picture.shape for picture in pictures] == [(32, 32, 3)] * 4
        expected = generate(pipeline, TEXTS[:1] * 2, **size, **call).permute(0, 2, 3, 1) * 255
        assert np.abs(np.stack(pictures[:2]) - expected.round().numpy()).max() <= 1


@pytest.fixture
def condition_pipeline(text_parts: dict[str, Any]) -> LTXConditionPipeline:
    """Videos of texts and pictures, 4 pixels and 2 frames to a latent."""
    vae = AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5, patch_size=1, patch_size_t=1,
        spatio_temporal_scaling=(True, True, False, False), encoder_causal=True, decoder_causal=False,
        decoder_spatio_temporal_scaling=(True, True, False, False),
    )  # fmt: skip
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    transformer = LTXVideoTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=8, out_channels=8, num_layers=2,
        cross_attention_dim=24, caption_channels=16,
    )  # fmt: skip
    for parameter in transformer.parameters():
        nn.init.normal_(parameter, std=0.2)
    scheduler = FlowMatchEulerDiscreteScheduler()
    return LTXConditionPipeline(scheduler, vae.eval(), **text_parts, transformer=transformer.eval())


def test_frames_behind_a_video_are_refused_on_loading_and_in_a_call(
    condition_pipeline: LTXConditionPipeline, tmp_path: Path
) -> None:
    stock = LTXI2VLongMultiPromptPipeline(**condition_pipeline.components)
    stock.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="frames behind those of the video, which then lie on no grid: take"):
        MHLAPipeline.from_pretrained(tmp_path, mhla_config={"blocks": (1, 2, 2), "extra_block": True})
    pipeline = MHLAPipeline.from_pretrained(tmp_path)
    settings = {
        "num_frames": 17, "height": 32, "width": 64, "max_sequence_length": 16, "num_inference_steps": 2,
        "temporal_tile_size": 8, "temporal_overlap": 4,
    }  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a cat", **settings).frames.isfinite().all()
    config = {"blocks": (1, 2, 2), "extra_block": True}
    pipeline.register_modules(transformer=convert_to_mhla(stock.transformer, config, attention="softmax"))
    assert pipeline("a cat", **settings).frames.isfinite().all()
    pipeline.register_modules(transformer=convert_to_mhla(stock.transformer, config))
    with pytest.raises(ValueError, match="have no place on the grid that MHLA needs; take LTXPipeline"):
        pipeline("a cat", **settings)


def test_pictures_ahead_of_a_video_need_a_block_of_their_own(
    condition_pipeline: LTXConditionPipeline, tmp_path: Path
) -> None:
    condition_pipeline.save_pretrained(tmp_path / "stock")
    config: dict[str, Any] = {"blocks": (1, 2, 2)}
    with pytest.raises(ValueError, match="ahead of those of the video, on no grid: set extra_block=True"):
        MHLAPipeline.from_pretrained(tmp_path / "stock", mhla_config=config)
    config["extra_block"] = True
    pipeline = MHLAPipeline.from_pretrained(tmp_path / "stock", mhla_config=config)
    assert type(pipeline) is LTXConditionPipeline
    calls: list[Any] = []
    processor = pipeline.transformer.transformer_blocks[0].attn1.processor
    processor.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((kwargs["grid"], kwargs.get("extra"))), with_kwargs=True
    )
    settings = {
        "num_frames": 17, "height": 32, "width": 64, "max_sequence_length": 16, "output_type": "pt",
        "num_inference_steps": 2, "decode_timestep": 0.0,
    }  # fmt: skip
    videos = {}
    for frame, extra in ((0, None), (8, (128, 0))):
        condition = LTXVideoCondition(image=Image.new("RGB", (64, 32), "red"), frame_index=frame)
        generator = torch.Generator().manual_seed(0)
        videos[frame] = pipeline(
            prompt="a cat", conditions=[condition], generator=generator, **settings
        ).frames
        assert videos[frame].shape == (1, 17, 3, 32, 64)
        assert videos[frame].isfinite().all()
        assert {call[1] for call in calls} == {extra}
        calls.clear()
    pipeline.save_pretrained(tmp_path / "converted")
    again = MHLAPipeline.from_pretrained(tmp_path / "converted")
    assert again.transformer.config.mhla_config["extra_block"] is True
