"""Wan pipelines with MHLA, of tiny real parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)  # fmt: skip
from torch import Tensor
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from mhla_diffusion import MHLAPipeline, MHLAWanTransformer3DModel

SCHEDULERS: list[Any] = [
    UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    FlowMatchEulerDiscreteScheduler(shift=3.0),
]


def make_pipeline(**components: Any) -> WanPipeline:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(letter, -float(i)) for i, letter in enumerate("\u2581abcdefghijklmnopqrstuvwxyz")]
    encoder = UMT5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    transformer: dict[str, Any] = {
        "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
        "num_layers": 2, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32,
    }  # fmt: skip
    return WanPipeline(
        **{
            "tokenizer": T5Tokenizer(vocab=pieces, extra_ids=0),
            "text_encoder": UMT5EncoderModel(encoder).eval(),
            "vae": AutoencoderKLWan(
                base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
                temperal_downsample=[False, True, True], latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
            ).eval(),
            "scheduler": SCHEDULERS[0],
            "transformer": WanTransformer3DModel(**transformer).eval(),
            **components,
        }
    )  # fmt: skip


def generate(pipeline: Any, **arguments: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    settings = {
        "height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 2, "guidance_scale": 3.0,
        "output_type": "pt", "generator": torch.Generator().manual_seed(0),
    }  # fmt: skip
    return pipeline("a cat", **{**settings, **arguments}).frames


def test_a_stock_pipeline_is_converted_on_loading_and_survives_saving(tmp_path: Path) -> None:
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


def test_a_stock_pipeline_stays_itself_without_a_config(tmp_path: Path) -> None:
    stock = make_pipeline()
    stock.save_pretrained(tmp_path)
    pipeline = MHLAPipeline.from_pretrained(tmp_path)
    assert type(pipeline.transformer) is WanTransformer3DModel
    torch.testing.assert_close(generate(pipeline), generate(stock))


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda s: type(s).__name__)
def test_flow_matching_schedulers_and_any_size(scheduler: Any) -> None:
    transformer = MHLAWanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, num_layers=2,
        text_dim=16, freq_dim=16, ffn_dim=32, mhla_config={"blocks": [1, 2, 2]}, sample_grid=(3, 2, 3),
    ).eval()  # fmt: skip
    pipeline = make_pipeline(transformer=transformer, scheduler=scheduler)
    for frames, height, width in ((1, 32, 32), (5, 48, 80)):
        video = generate(pipeline, num_frames=frames, height=height, width=width)
        assert video.shape == (1, frames, 3, height, width)
        assert video.isfinite().all()
