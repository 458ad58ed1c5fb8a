"""The scripts as a user runs them one after the other: convert, cache latents, fine-tune, generate, score."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from PIL import Image

from mhla_diffusion import MHLADiTTransformer2DModel, MHLAPipeline
from tests.processes import run_script


def succeed(script: str, *arguments: str | Path) -> str:
    result = run_script(script, *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


@pytest.fixture
def stock(tmp_path: Path) -> Path:
    """A small stock DiT pipeline: 16 x 16 pixels, 4 x 4 tokens of latents."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        sample_size=8, patch_size=2,
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8), latent_channels=4, norm_num_groups=2, sample_size=16,
    )  # fmt: skip
    DiTPipeline(transformer, vae=vae, scheduler=DDIMScheduler()).save_pretrained(tmp_path / "stock")
    return tmp_path / "stock"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(6):
            pixels = generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}.png")
    return tmp_path / "photos"


def test_a_stock_model_is_converted_fine_tuned_on_latents_and_scored(
    stock: Path, photos: Path, tmp_path: Path
) -> None:
    converted, latents, training, images = (tmp_path / name for name in ("mhla", "latents", "run", "images"))
    output = succeed(
        "convert", "--model", stock, "--out", converted, "--mhla.blocks", "4", "--mhla.cpe", "zero"
    )
    assert "processor.mixing" in output, "what is new is said"
    assert 'MHLAPipeline.from_pretrained("mhla")' in (converted / "README.md").read_text()
    succeed(
        *("cache_latents", "image", "--vae", stock, "--size", "16", "--output_dir", latents),
        *("--data.source", "folder", "--data.path", photos),
    )
    succeed(
        *("train_image", "--model.init_from", converted, "--objective.name", "ddpm"),
        *("--data.source", "latents", "--data.path", latents, "--output_dir", training),
        *("--trainer.max_steps", "2", "--trainer.batch_size", "4"),
    )
    succeed(
        *(
            "generate",
            "image",
            "--model",
            training / "pipeline",
            "--out",
            images,
            "--num",
            "4",
            "--steps",
            "2",
        ),
        *("--classes", '["cat", "dog"]', "--grid", tmp_path / "grid.png"),
    )
    assert Image.open(tmp_path / "grid.png").size == (128, 64 * 2)
    succeed("evaluate", "image", "--real", photos, "--generated", images, "--out", tmp_path / "report")
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["scores"][0]["value"] > 0

    before = DiTTransformer2DModel.from_pretrained(stock, subfolder="transformer")
    pipeline = MHLAPipeline.from_pretrained(training / "pipeline")
    after = pipeline.transformer
    assert isinstance(after, MHLADiTTransformer2DModel)
    assert after.mixing_blocks == (2, 2)
    assert pipeline.vae is not None
    moved = (after.proj_out_2.weight - before.proj_out_2.weight).abs().max()
    assert 0 < moved < 1e-3, "two small steps from the stock weights"


def test_a_transformer_alone_is_converted_and_nothing_is_overwritten(stock: Path, tmp_path: Path) -> None:
    arguments = (
        *("--model", stock / "transformer", "--only_transformer", "true"),
        *("--out", tmp_path / "out", "--mhla.blocks", "4"),
    )
    succeed("convert", *arguments)
    assert not list(tmp_path.glob(".*")) + list(tmp_path.glob("*partial*")), "nothing is left over"
    model = MHLADiTTransformer2DModel.from_pretrained(tmp_path / "out")
    assert model.mixing_blocks == (2, 2)
    succeed("convert", "--model", stock, "--only_transformer", "true", "--out", tmp_path / "found")
    MHLADiTTransformer2DModel.from_pretrained(tmp_path / "found")
    again = run_script("convert", *arguments)
    assert again.returncode == 1
    assert "is there already; choose another folder" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mhla.blocks", "0"], "blocks must be an integer >= 1 or one per axis, got 0"),
        (["--mhla.blocks", "64"], "64"),
        (["--mhla.block", "4"], "mhla.block"),
    ],
)
def test_a_conversion_that_cannot_be_is_explained(
    arguments: list[str], message: str, stock: Path, tmp_path: Path
) -> None:
    result = run_script("convert", "--model", stock, "--out", tmp_path / "out", *arguments)
    assert result.returncode != 0
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_exported_images_are_those_of_the_source(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    succeed("export_images", "--data.source", "folder", "--data.path", photos, "--out", out)
    assert sorted(path.name for path in out.iterdir()) == ["cat", "dog"]
    exported = np.stack([np.asarray(Image.open(path)) for path in sorted(out.rglob("*.png"))])
    expected = np.stack([np.asarray(Image.open(path)) for path in sorted(photos.rglob("*.png"))])
    assert np.array_equal(exported, expected)
    last = photos / "dog" / "5.png"
    whole = last.read_bytes()
    last.write_bytes(whole[:40])
    damaged = ("export_images", "--data.source", "folder", "--data.path", photos)
    result = run_script(*damaged, "--out", tmp_path / "whole")
    assert result.returncode == 0
    assert f"skipped: {last}: " in result.stderr
    assert f"1 of {len(exported)} images were skipped" in result.stderr
    assert len(list((tmp_path / "whole").rglob("*.png"))) == len(exported) - 1
    last.write_bytes(whole)
    succeed(
        *("export_images", "--data.source", "folder", "--data.path", photos, "--num", "4"),
        *("--out", tmp_path / "some"),
    )
    assert [f"{path.parent.name}/{path.name}" for path in sorted((tmp_path / "some").rglob("*.png"))] == [
        "cat/000000.png",
        "cat/000003.png",
        "dog/000006.png",
        "dog/000009.png",
    ]
    too_many = run_script(
        "export_images", "--data.source", "mnist", "--num", "5001", "--out", tmp_path / "many"
    )
    assert "num must be 1 to 5000, the number of images, got 5001" in too_many.stderr


def test_images_with_captions_are_exported_trained_on_and_generated(tmp_path: Path) -> None:
    scenes, training, images = tmp_path / "scenes", tmp_path / "training", tmp_path / "images"
    succeed(
        *("export_images", "--data.source", "scene", "--data.scenes.num_images", "6", "--captions", "true"),
        *("--out", scenes),
    )
    assert (scenes / "captions.csv").read_text().splitlines()[:2] == [
        "path,caption,weight", "000000.png,one red circle on the right,1.0",
    ]  # fmt: skip
    assert len(list(scenes.glob("*.png"))) == 6
    succeed(
        *("train_image", "--config", "configs/image_pixart_scenes.yaml", "--output_dir", training),
        *("--data.source", "folder", "--data.path", scenes, "--trainer.max_steps", "1"),
        *("--trainer.batch_size", "2", "--sampling.every", "0", "--model.num_layers", "1"),
    )
    (tmp_path / "prompts.csv").write_text("prompt,seed,height,width\na cat,7,16,16\na dog,,16,16\nit,,,\n")
    succeed(
        *("generate", "image", "--model", training / "pipeline", "--out", images, "--steps", "1"),
        *("--prompts", tmp_path / "prompts.csv", "--grid", tmp_path / "grid.png"),
    )
    rows = json.loads((images / "manifest.json").read_text())["images"]
    assert [(row["prompt"], row["seed"]) for row in rows] == [("a cat", 7), ("a dog", 1), ("it", 2)]
    sizes = [Image.open(images / row["file"]).size for row in rows]
    assert sizes == [(16, 16), (16, 16), (32, 32)]
    assert Image.open(tmp_path / "grid.png").width == 2 * 136


def test_names_of_classes_lead_nowhere_out_of_the_folder(tmp_path: Path) -> None:
    import datasets

    names = ["../../up", "a/b", str(tmp_path / "out2"), "..", "a_b", "x" * 300]
    image = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    rows = datasets.Dataset.from_dict({"image": [image] * 6, "label": list(range(6))}, features=features)
    rows.save_to_disk(tmp_path / "rows")
    succeed(
        *("export_images", "--data.source", "huggingface", "--data.path", tmp_path / "rows"),
        *("--out", tmp_path / "in" / "out"),
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "rows"]
    folders = sorted(path.parent.name for path in (tmp_path / "in" / "out").glob("*/*.png"))
    plain = str(tmp_path / "out2").replace("/", "_")
    assert folders == sorted(["__.._up", "a_b", plain, "_", "a_b-4", "x" * 200])


def test_the_benchmark_prints_a_table() -> None:
    text = succeed(
        "benchmark", "operator", "--shapes", "[1k]", "--dtypes", "[float32]", "--passes", "[forward]",
        "--peers", "[mhla, linear]", "--repeats", "1", "--scaling", "false",
    )  # fmt: skip
    assert text.count("| d 64, H 6, N 1,024, M 16 |") == 1


def test_videos_are_exported_trained_on_and_generated(tmp_path: Path) -> None:
    clips, training, videos = tmp_path / "clips", tmp_path / "training", tmp_path / "videos"
    export = ("export_videos", "--data.source", "films", "--data.sizes", "[[48, 64]]", "--out", clips)
    succeed(*export, "--num", "3", "--data.fps", "16")
    assert sorted(path.name for path in clips.iterdir()) == [
        "000000.mp4", "000001.mp4", "000002.mp4", "captions.csv",
    ]  # fmt: skip
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "a.mp4").write_bytes(b"no video")
    (tmp_path / "damaged" / "a.txt").write_text("a film")
    damaged = ("--data.source", "folder", "--data.path", tmp_path / "damaged", "--data.sizes", "[[48, 64]]")
    result = run_script("export_videos", *damaged, "--out", tmp_path / "nothing")
    assert (result.returncode, (tmp_path / "nothing").exists()) == (1, False)
    assert "not one of 1 videos could be read" in result.stderr
    refused = run_script(*export)
    assert refused.returncode != 0
    assert f"error: {clips} is there already; choose another folder" in refused.stderr
    train = (
        *("train_video", "--config", "configs/video_wan_films.yaml", "--output_dir", training),
        *("--data.source", "folder", "--data.path", clips, "--data.frames", "8"),
        *("--data.sizes", "[[32, 32], [24, 40]]", "--trainer.max_steps", "1", "--sampling.every", "0"),
    )
    too_short = run_script(*train, "--data.fps", "1")
    assert too_short.returncode == 1, "workers end with the run"
    assert re.search(
        "error: none of the 3 samples can be read, first .* is shorter than asked", too_short.stderr
    )
    shutil.rmtree(training)
    # As the README has it.
    succeed(*train, "--data.fps", "8")
    made = ("generate", "video", "--model", training / "pipeline", "--out", videos, "--steps", "2")
    succeed(*made, "--prompts", "[a red car]", "--strip", tmp_path / "strip.png")
    assert json.loads((videos / "manifest.json").read_text())["videos"][0]["prompt"] == "a red car"
    assert (videos / "000000.mp4").is_file()
    assert Image.open(tmp_path / "strip.png").size == (8 * 64, 64)
    other = run_script(
        "generate", "image", "--model", training / "pipeline", "--num", "1", "--out", tmp_path / "images"
    )
    assert other.returncode != 0
    assert "holds a MHLAWanPipeline: use mhla generate video" in other.stderr
