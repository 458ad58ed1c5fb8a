"""Pipelines of diffusers, of every backbone that has no tests of its own, around our transformers."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    DDIMScheduler,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaControlNetModel,
    SanaControlNetPipeline,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
    WanAnimatePipeline,
)
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from mhla_diffusion import MHLAPipeline
from mhla_diffusion.backbones import BACKBONES
from tests.backbones.cases import CASES, Case, randomize

TEXT = torch.randn(1, 6, 10, generator=torch.Generator().manual_seed(0))
OTHER_TEXT = TEXT.flip(1)
ONES = torch.ones(1, 6)
MASKS = {"prompt_attention_mask": ONES, "negative_prompt_attention_mask": ONES}
TEXTS = {"prompt_embeds": TEXT, "negative_prompt": None, "negative_prompt_embeds": OTHER_TEXT}
PICTURE = Image.new("RGB", (32, 32), "orange")


class NothingUnsafe:
    """In the place of the guard of Cosmos, a large model in a package of its own."""

    def to(self, device: Any) -> NothingUnsafe:
        return self

    def check_text_safety(self, prompt: str) -> bool:
        return True


@dataclass(frozen=True)
class Call:
    """A pipeline without encoders and decoder, and a call of it.

    Args:
        pipeline: its name in diffusers.
        case: of the transformer.
        arguments: of the call.
        parts: its scheduler, and what else is not None.
        settings: of the transformer, beside those of its case.
        guard: what is put in place of a component that cannot be None.
    """

    pipeline: str
    case: Case
    arguments: dict[str, Any]
    parts: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    guard: dict[str, Any] = field(default_factory=dict)

    def make(self) -> Any:
        pipeline_class = getattr(diffusers, self.pipeline)
        names = inspect.signature(pipeline_class).parameters
        transformer = self.case.stock(**self.settings)
        parts = {**dict.fromkeys(names), "transformer": transformer, **self.parts, **self.guard}
        return pipeline_class(**parts)


def run(pipeline: Any, **arguments: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(
        **{"num_inference_steps": 2, "output_type": "latent", **arguments},
        generator=generator,
        return_dict=False,
    )[0]


def check_conversion(
    stock: Any, blocks: Sequence[int], folder: Path, guard: dict[str, Any] | None = None, **arguments: Any
) -> None:
    """Save a stock pipeline, load it with MHLA and without, and compare what the three give."""
    guard = guard or {}
    expected = run(stock, **arguments)
    stock.register_modules(**dict.fromkeys(guard))
    stock.save_pretrained(folder)
    absent = {name: guard.get(name) for name, component in stock.components.items() if component is None}
    load = functools.partial(MHLAPipeline.from_pretrained, folder, **absent)
    pipelines = [load(), load(mhla_config={"layers": ()}), load(mhla_config={"blocks": list(blocks)})]
    assert {type(pipeline) for pipeline in pipelines} == {type(stock)}
    same, ours, mhla = (run(pipeline, **arguments) for pipeline in pipelines)
    assert torch.equal(same, expected)
    assert torch.equal(ours, expected)
    assert type(pipelines[2].transformer) is BACKBONES[type(stock.transformer)]
    assert mhla.shape == expected.shape
    assert mhla.isfinite().all()
    assert not torch.allclose(mhla, expected, rtol=1e-2)


DDIM = {"scheduler": DDIMScheduler()}
FLOW = {"scheduler": FlowMatchEulerDiscreteScheduler()}
CALLS = [
    Call("LattePipeline", CASES["Latte"], {**TEXTS, "height": 32, "width": 96, "video_length": 3}, DDIM),
    Call("LuminaPipeline", CASES["LuminaNextDiT"], {**TEXTS, **MASKS, "height": 32, "width": 96}, FLOW),
    Call(
        "HunyuanDiTPipeline",
        CASES["HunyuanDiT"],
        {
            "prompt_embeds": TEXT[:, :4], "negative_prompt_embeds": OTHER_TEXT[:, :4],
            "prompt_attention_mask": ONES[:, :4], "negative_prompt_attention_mask": ONES[:, :4],
            "prompt_embeds_2": torch.ones(1, 6, 16), "negative_prompt_embeds_2": torch.zeros(1, 6, 16),
            "prompt_attention_mask_2": ONES, "negative_prompt_attention_mask_2": ONES,
            "height": 32, "width": 96, "use_resolution_binning": False,
        },
        {**DDIM, "requires_safety_checker": False},
    ),
    Call(
        "AllegroPipeline",
        CASES["Allegro"],
        {**TEXTS, **MASKS, "height": 32, "width": 96, "num_frames": 12},
        DDIM,
    ),
    Call(
        "AnyFlowPipeline",
        CASES["AnyFlow"],
        {"prompt_embeds": TEXT, "height": 32, "width": 96, "num_frames": 9},
        {"scheduler": FlowMapEulerDiscreteScheduler()},
    ),
    Call(
        "Kandinsky5T2VPipeline",
        CASES["Kandinsky5"],
        {
            "prompt_embeds_qwen": TEXT, "negative_prompt_embeds_qwen": OTHER_TEXT,
            "prompt_embeds_clip": torch.ones(1, 6), "negative_prompt_embeds_clip": torch.zeros(1, 6),
            "prompt_cu_seqlens": torch.tensor([0, 6]), "negative_prompt_cu_seqlens": torch.tensor([0, 6]),
            "height": 32, "width": 96, "num_frames": 9,
        },
        FLOW,
    ),
    Call(
        "Cosmos2TextToImagePipeline",
        CASES["Cosmos"],
        {**TEXTS, "height": 32, "width": 96},
        {"scheduler": FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)},
        settings={"out_channels": 3},
        guard={"safety_checker": NothingUnsafe()},
    ),
]  # fmt: skip


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.pipeline)
@torch.no_grad()
def test_a_pipeline_without_encoders_runs_with_our_transformer(call: Call, tmp_path: Path) -> None:
    check_conversion(call.make(), call.case.blocks, tmp_path, call.guard, **call.arguments)


@torch.no_grad()
def test_wan_animate_moves_a_character(
    text_parts: dict[str, Any], video_vae: AutoencoderKLWan, tmp_path: Path
) -> None:
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16,
        patch_size=8,
    )  # fmt: skip
    size = {"height": 16, "width": 16}
    case = CASES["WanAnimate"]
    stock = WanAnimatePipeline(
        **text_parts, vae=video_vae, scheduler=FlowMatchEulerDiscreteScheduler(),
        image_encoder=CLIPVisionModel(vision).eval(),
        image_processor=CLIPImageProcessor(size=size, crop_size=size),
        transformer=case.stock(
            in_channels=12, latent_channels=4, image_dim=16, added_kv_proj_dim=24, text_dim=16
        ),
    )  # fmt: skip
    videos = {"pose_video": [PICTURE] * 5, "face_video": [PICTURE.resize((8, 8))] * 5}
    check_conversion(
        stock, case.blocks, tmp_path, image=PICTURE, prompt="a cat", **videos, height=32, width=64,
        segment_frame_length=5, output_type="pt",
    )  # fmt: skip


@torch.no_grad()
def test_sana_sprint_is_opened(sana_pipeline: SanaPipeline, tmp_path: Path) -> None:
    parts = {**sana_pipeline.components, "scheduler": SCMScheduler()}
    config = sana_pipeline.transformer.config
    parts["transformer"] = SanaTransformer2DModel.from_config(config, guidance_embeds=True)
    randomize(parts["transformer"])
    arguments = {"height": 32, "width": 64, "use_resolution_binning": False}
    check_conversion(SanaSprintPipeline(**parts), (2, 2), tmp_path, prompt="a cat", **arguments)


@torch.no_grad()
def test_the_controlnet_of_sana_stands_beside_ours(sana_pipeline: SanaPipeline, tmp_path: Path) -> None:
    controlnet = SanaControlNetModel.from_config(sana_pipeline.transformer.config)
    randomize(controlnet)
    stock = SanaControlNetPipeline(**sana_pipeline.components, controlnet=controlnet)
    arguments = {"height": 32, "width": 64, "use_resolution_binning": False}
    check_conversion(stock, (2, 2), tmp_path, prompt="a cat", control_image=PICTURE, **arguments)
