"""Small things that stand in for what the pages speak of: models of the hub, photos, clips."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler, LattePipeline
from PIL import Image
from safetensors.torch import save_file

from mhla_diffusion import (
    MHLADiTPipeline,
    MHLAPipeline,
    MHLAPixArtTransformer2DModel,
    MHLATextToImagePipeline,
    MHLAWanTransformer3DModel,
)
from mhla_diffusion.files.videos import write_video
from mhla_diffusion.pipelines.generation import generate_videos
from tests.backbones.cases import CASES
from tests.backbones.test_official import their_weights
from tests.pipelines.conftest import (  # noqa: F401 (fixtures)
    make_pipeline,
    make_stock_pipeline,
    make_stock_video_pipeline,
    make_vae,
    sana_pipeline,
    video_vae,
)
from tests.training import test_kandinsky5 as kandinsky5
from tests.training import test_two_encoders as hunyuan

_SAVED_REPORT = Path(__file__).parents[1] / "saved" / "report-image" / "report"


def _photos(folder: Path) -> Path:
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for number in range(4):
            pixels = generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def _clips(folder: Path) -> Path:
    """Four clips of 18 frames, 8 a second, and their captions."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(4):
        frames = generator.integers(0, 256, (18, 48, 64, 3), dtype=np.uint8)
        write_video(frames, folder / f"{number}.mp4", fps=8)
    rows = "".join(f"{number}.mp4,a red car\n" for number in range(4))
    (folder / "captions.csv").write_text(f"path,caption\n{rows}")
    return folder


def write_checkpoint(path: Path) -> None:
    """A checkpoint as the public code writes it: heads of 128 in 3 x 5 x 10 blocks."""
    mhla = {"blocks": [3, 5, 10], "normalizer": "none", "constraint": "none", "output_norm": True}
    model = MHLAWanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=128, in_channels=3, out_channels=3, num_layers=1,
        text_dim=4, freq_dim=4, ffn_dim=8, sample_grid=(21, 30, 50), mhla_config=mhla,
    )  # fmt: skip
    save_file(their_weights(model), path)


def generate_clips(model: str, folder: Path) -> None:
    """What generation leaves of a small Wan: three clips of 9 frames."""
    generate_videos(
        MHLAPipeline.from_pretrained(model), folder, prompts=["a cat", "a dog", "it"],
        num_inference_steps=1, height=32, width=32, num_frames=9, options={"max_sequence_length": 8},
    )  # fmt: skip


def _benchmarks(folder: Path) -> dict[str, str]:
    """Prompts of MJHQ-30K and GenEval, and real images of the former in folders by category."""
    names = [(category, number) for category in ("animals", "people") for number in range(4)]
    texts = {f"{category}{number}": f"{category} {number}" for category, number in names}
    entries = {name: {"category": name[:-1], "prompt": text} for name, text in texts.items()}
    (folder / "meta_data.json").write_text(json.dumps(entries))
    lines = [json.dumps({"tag": "counting", "prompt": text}) for text in list(texts.values())[:2]]
    (folder / "evaluation_metadata.jsonl").write_text("\n".join(lines))
    generator = np.random.default_rng(0)
    for name in texts:
        (folder / "mjhq" / name[:-1]).mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "mjhq" / name[:-1] / f"{name}.jpg")
    return {
        "META_DATA": str(folder / "meta_data.json"),
        "EVALUATION_METADATA": str(folder / "evaluation_metadata.jsonl"),
        "MJHQ": str(folder / "mjhq"),
    }


def _latte(text_parts: dict[str, Any]) -> LattePipeline:
    """Latte of 5 frames of 16 x 16 pixels, 2 pixels to a latent."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8), latent_channels=3, norm_num_groups=2,
    )  # fmt: skip
    transformer = CASES["Latte"].stock(caption_channels=16, video_length=5)
    return LattePipeline(**text_parts, vae=vae, transformer=transformer, scheduler=DDIMScheduler())


@pytest.fixture
def text_model(tmp_path: Path, text_parts: dict[str, Any]) -> Path:
    """A small model of texts on pixels, saved."""
    transformer = MHLAPixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8, patch_size=2, in_channels=3,
        out_channels=3, caption_channels=16, cross_attention_dim=16, mhla_config={"blocks": 4},
    )  # fmt: skip
    pipeline = MHLATextToImagePipeline(
        **text_parts,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        max_sequence_length=8,
    )
    pipeline.save_pretrained(tmp_path / "text-model")
    return tmp_path / "text-model"


@pytest.fixture
def stand_ins(
    tmp_path: Path,
    make_pipeline: Callable[..., MHLADiTPipeline],  # noqa: F811
    make_stock_pipeline: Callable[[], Any],  # noqa: F811
    make_stock_video_pipeline: Callable[[str], Any],  # noqa: F811
    sana_pipeline: Any,  # noqa: F811
    text_model: Path,
    text_parts: dict[str, Any],
) -> dict[str, str]:
    """What stands in for a word of a command or a string of a program, by how that begins."""
    digits = make_pipeline(channels=1, vae=False, num_embeds_ada_norm=10)
    MHLADiTPipeline(
        digits.transformer, digits.scheduler, id2label={i: str(i) for i in range(10)}
    ).save_pretrained(tmp_path / "digits")
    make_stock_pipeline().save_pretrained(tmp_path / "dit")
    make_stock_video_pipeline("wan").save_pretrained(tmp_path / "wan")
    make_stock_video_pipeline("wan-image").save_pretrained(tmp_path / "wan-image")
    sana_pipeline.save_pretrained(tmp_path / "sana")
    _latte(text_parts).save_pretrained(tmp_path / "latte")
    stock = CASES["HunyuanDiT"].stock(**hunyuan.SHAPE)
    hunyuan.hunyuan_pipeline(stock).save_pretrained(tmp_path / "hunyuan")
    stock = CASES["Kandinsky5"].stock(**kandinsky5.SHAPE)
    kandinsky5.kandinsky_pipeline(stock).save_pretrained(tmp_path / "kandinsky")
    (tmp_path / "prompts.csv").write_text("prompt,seed\na cat,1\na dog,2\n")
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (40, 40), "red").save(tmp_path / "pictures" / "red.png")
    (tmp_path / "pictures" / "captions.csv").write_text("path,caption\nred.png,red\n")
    photos, clips = _photos(tmp_path / "photos"), _clips(tmp_path / "clips")
    return {
        "facebook/DiT-XL-2-256": str(tmp_path / "dit"),
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": str(tmp_path / "wan"),
        "runs/quickstart/training/pipeline": str(tmp_path / "digits"),
        "SANA": str(tmp_path / "sana"),
        "LATTE": str(tmp_path / "latte"),
        "HUNYUAN": str(tmp_path / "hunyuan"),
        "KANDINSKY": str(tmp_path / "kandinsky"),
        "TEXT_MODEL": str(text_model),
        **_benchmarks(tmp_path),
        "WAN_I2V": str(tmp_path / "wan-image"),
        "WAN": str(tmp_path / "wan"),
        "CHECKPOINT": str(tmp_path / "wan.safetensors"),
        "PHOTOS": str(photos),
        "PICTURES": str(tmp_path / "pictures"),
        "CLIPS": str(clips),
        "VIDEOS": str(clips),
        "imagenet/train": str(photos),
        "prompts.csv": str(tmp_path / "prompts.csv"),
        "runs/report_": str(_SAVED_REPORT),
        "runs/": str(tmp_path / "runs") + "/",
        "models/": str(tmp_path / "models") + "/",
        "data/": str(tmp_path / "data") + "/",
        "imagenet256.npz": str(tmp_path / "imagenet256.npz"),
    }
