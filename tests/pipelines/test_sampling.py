"""Generation from diffusers' own pipelines, which all are called a little differently."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline
from diffusers.pipelines.wan import pipeline_wan_i2v
from PIL import Image

from mhla_diffusion import MHLADiTPipeline, MHLAPipeline
from mhla_diffusion.files.videos import open_video
from mhla_diffusion.pipelines.generation import generate_images, generate_videos, save_grid
from mhla_diffusion.pipelines.prompts import Prompt, read_prompts
from mhla_diffusion.pipelines.sampling import (
    NotFiniteSampleError,
    batches,
    call_parameters,
    output_kind,
    sample,
    takes_one_text,
)
from mhla_diffusion.training.text import make_stock_pipeline
from tests.processes import run_script

MakeStock = Callable[[str], Any]

NAMES = ["wan", "wan2.2", "wan-image", "sana_video", "sana_video-image"]
MHLA = {"blocks": [1, 1, 2]}
SANA = {"max_sequence_length": 8, "complex_human_instruction": None, "use_resolution_binning": False}
SMALL: dict[str, Any] = {"num_inference_steps": 2, "height": 32, "width": 32, "num_frames": 5}


def options(name: str) -> dict[str, Any]:
    return SANA if name.startswith("sana") else {"max_sequence_length": 8}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, value in (("b.png", 200), ("a.png", 30)):
        Image.new("RGB", (40, 40), (value, 255 - value, value)).save(folder / name)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_every_pipeline_that_is_converted_can_be_generated_from(
    name: str, make_stock_video_pipeline: MakeStock, pictures: Path, tmp_path: Path
) -> None:
    make_stock_video_pipeline(name).save_pretrained(tmp_path / "stock")
    pipeline = MHLAPipeline.from_pretrained(tmp_path / "stock", mhla_config=MHLA)
    more: dict[str, Any] = {"images": pictures} if name.endswith("image") else {}
    texts = ["a cat", Prompt("a dog", negative_prompt="rain")]
    manifest = generate_videos(
        pipeline, tmp_path / "out", prompts=texts, seed=3, options=options(name), **SMALL, **more
    )
    content = json.loads(manifest.read_text())
    assert content["complete"] is True
    assert (content["num_inference_steps"], content["fps"]) == (2, 16.0)
    assert content["guidance_scale"] == (6.0 if name.startswith("sana") else 5.0), "the pipeline's own"
    rows = content["videos"]
    assert [row.get("image") for row in rows] == (["a.png", "b.png"] if more else [None, None])
    call = {**options(name), "num_inference_steps": 2, "height": 32, "width": 32}
    call["frames" if name.startswith("sana") else "num_frames"] = 5
    paths = [pictures / row["image"] if more else None for row in rows]
    batch = [sample(pipeline, rows[i : i + 1], call, paths[i : i + 1])[0] for i in range(2)]
    for row, path, made in zip(rows, paths, batch, strict=True):
        reader = open_video(tmp_path / "out" / row["file"])
        assert (reader.num_frames, reader.fps) == (5, 16.0)
        stored = reader.read(range(5)).astype(int)
        assert np.abs(stored - made).mean() < 12, "lossy, but the same"
        given = {"image": Image.open(path)} if path else {}
        expected = pipeline(
            prompt=row["prompt"], negative_prompt=row.get("negative_prompt", ""), output_type="pt",
            generator=torch.Generator().manual_seed(row["seed"]), **call, **given,
        ).frames[0]  # fmt: skip
        exact = (expected.permute(0, 2, 3, 1) * 255).round().numpy()
        assert np.abs(exact - made).max() <= 1
        assert (exact != made).mean() < 0.1, "rounded, and not cut off"


def test_images_of_texts_are_generated_too(sana_pipeline: SanaPipeline, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"height": 32, "width": 64, "num_inference_steps": 2, "options": SANA}
    texts = ["a cat", "a dog"]
    manifest = generate_images(sana_pipeline, tmp_path / "out", prompts=texts, per_prompt=2, **settings)
    content = json.loads(manifest.read_text())
    assert content["guidance_scale"] == 4.5
    assert [(row["prompt"], row["seed"]) for row in content["images"]] == [
        ("a cat", 0), ("a cat", 1), ("a dog", 2), ("a dog", 3),
    ]  # fmt: skip
    assert Image.open(tmp_path / "out" / "000003.png").size == (64, 32)
    save_grid(tmp_path / "out", tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").size == (2 * 128, 2 * 64)
    sana_pipeline.transformer.register_to_config(sample_size=7)
    with pytest.raises(
        ValueError, match=r'none for sample_size 7: .* options {"use_resolution_binning": false}'
    ):
        generate_images(sana_pipeline, tmp_path / "rounded", prompts=texts, height=32, width=64)
    with pytest.raises(ValueError, match="SanaPipeline makes images of texts: give prompts"):
        generate_images(sana_pipeline, tmp_path / "other", class_labels=[1], num_images=1)
    with pytest.raises(ValueError, match=r"SanaPipeline makes images: use generate_images"):
        generate_videos(sana_pipeline, tmp_path / "other", prompts=texts)
    assert not (tmp_path / "other").exists()


def test_calls_are_of_rows_of_one_size_with_a_negative_prompt_each_or_none() -> None:
    plain, other = {"prompt": "a"}, {"prompt": "a", "negative_prompt": "b"}
    large = {**other, "height": 64, "width": 64}
    rows = [plain, plain, plain, other, plain, other, other, large, large]
    found = [(calls.start, calls.stop) for calls in batches(rows, 2)]
    assert found == [(0, 2), (2, 3), (3, 4), (4, 5), (5, 7), (7, 9)]


@pytest.mark.parametrize(
    ("name", "alone"),
    [
        ("Kandinsky5T2VPipeline", True),
        ("LattePipeline", True),
        ("WanVACEPipeline", True),
        ("WanPipeline", False),
    ],
)
def test_texts_that_would_change_each_other_are_called_one_by_one(name: str, alone: bool) -> None:
    assert takes_one_text(make_stock_pipeline(name)) is alone


def test_a_package_that_is_missing_is_named(
    make_stock_video_pipeline: MakeStock, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = make_stock_video_pipeline("wan-image")
    monkeypatch.delattr(pipeline_wan_i2v, "ftfy")
    with pytest.raises(ImportError, match="pip install ftfy"):
        generate_videos(pipeline, tmp_path / "out", prompts=["a"], images=pictures, **SMALL)


def test_a_wan_pipeline_is_converted_and_generated_from_by_the_scripts(
    make_stock_video_pipeline: MakeStock, tmp_path: Path
) -> None:
    make_stock_video_pipeline("wan").save_pretrained(tmp_path / "stock")
    made = run_script(
        "convert", "--model", tmp_path / "stock", "--out", tmp_path / "mhla", "--mhla.blocks", "[1, 1, 2]"
    )
    assert made.returncode == 0, made.stderr
    file = tmp_path / "prompts.csv"
    file.write_text('prompt,seed,file\n"waves, wind",7,sea\na cat,,\n')
    arguments = (
        "--model", tmp_path / "mhla", "--steps", "1", "--height", "32", "--width", "32", "--frames", "5",
        "--options", '{"max_sequence_length": 8}', "--fps", "8",
    )  # fmt: skip
    result = run_script(
        "generate", "video", *arguments, "--out", tmp_path / "out", "--prompts", file,
        "--prompts", "a dog, in snow", "--prompts=[a red car]", "--per_prompt", "2",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "out" / "manifest.json").read_text())["videos"]
    assert [(row["prompt"], row["seed"], row["file"]) for row in rows] == [
        ("waves, wind", 7, "sea.mp4"), ("waves, wind", 8, "sea-1.mp4"),
        ("a cat", 2, "000002.mp4"), ("a cat", 3, "000003.mp4"),
        ("a dog, in snow", 4, "000004.mp4"), ("a dog, in snow", 5, "000005.mp4"),
        ("a red car", 6, "000006.mp4"), ("a red car", 7, "000007.mp4"),
    ]  # fmt: skip
    assert all(open_video(tmp_path / "out" / row["file"]).fps == 8 for row in rows)
    refused = run_script(
        "generate", "video", *arguments, "--out", tmp_path / "no", "--prompts", "[sand, sea]"
    )
    assert refused.returncode != 0
    assert "may be one prompt or several" in refused.stderr
    assert "Traceback" not in refused.stderr


COMPONENTS = ["transformer_2", "vae", "text_encoder", "tokenizer", "scheduler", "image_encoder", "boundary"]


@pytest.mark.parametrize("part", COMPONENTS)
def test_a_run_does_not_go_on_with_another_component(
    part: str, make_stock_video_pipeline: MakeStock, pictures: Path, tmp_path: Path
) -> None:
    name = "wan-image" if part == "image_encoder" else "wan2.2"
    pipeline = make_stock_video_pipeline(name)
    settings: dict[str, Any] = {"prompts": ["a"], "options": options(name), **SMALL}
    if name == "wan-image":
        settings["images"] = pictures
    generate_videos(pipeline, tmp_path / "out", **settings)
    generate_videos(pipeline, tmp_path / "out", **settings)
    if part == "scheduler":
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    elif part == "boundary":
        pipeline.register_to_config(boundary_ratio=0.5)
    elif part == "tokenizer":
        pipeline.tokenizer.add_tokens(["cat"])
    else:
        with torch.no_grad():
            next(getattr(pipeline, part).parameters()).flatten()[0] += 1
    with pytest.raises(ValueError, match=rf"holds another run \([a-z]*\.?{part}"):
        generate_videos(pipeline, tmp_path / "out", **settings)


def test_another_picture_is_another_run(
    make_stock_video_pipeline: MakeStock, pictures: Path, tmp_path: Path
) -> None:
    pipeline = make_stock_video_pipeline("sana_video-image")
    settings: dict[str, Any] = {"prompts": ["a"], "images": pictures, "options": SANA, **SMALL}
    content = json.loads(generate_videos(pipeline, tmp_path / "out", **settings).read_text())
    assert [row["prompt"] for row in content["videos"]] == ["a", "a"], "one prompt goes with all pictures"
    (pictures / "b.png").write_bytes((pictures / "a.png").read_bytes())
    with pytest.raises(ValueError, match="holds another run"):
        generate_videos(pipeline, tmp_path / "out", **settings)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "wan",
            {"options": {"frames": 3}},
            "options frames cannot be given to WanPipeline; .*attention_kwargs",
        ),
        ("wan", {"options": {"prompt": "x"}}, "options prompt cannot be given"),
        (
            "wan",
            {"num_inference_steps": 1, "options": {"num_inference_steps": 3}},
            "num_inference_steps is given twice, by itself and among the options",
        ),
        ("wan-image", {}, "WanImageToVideoPipeline needs image: give a folder of images"),
        ("wan", {"prompts": [Prompt("a", image="pictures/a.png")]}, "WanPipeline takes no image"),
        ("wan-image", {"prompts": ["a", "b", "c"], "images": "pictures"}, "holds 2 images, and there are 3"),
        ("wan-image", {"images": "nowhere"}, "nowhere is no folder of images"),
        (
            "wan-image",
            {"prompts": [Prompt("a", image="pictures/a.png"), "b"]},
            "prompt 'b': has no image, and others have one",
        ),
        ("wan", {"fps": 0}, "fps must be a number above 0, got 0"),
        ("wan", {"fps": math.inf}, "fps must be a number above 0, got inf"),
        ("wan", {"guidance_scale": math.nan}, "guidance_scale must be a finite number, got nan"),
        ("wan", {"options": {"guidance_scale_2": math.inf}}, "guidance_scale_2 must be a finite number"),
        (
            "wan",
            {"options": {"max_sequence_length": "8"}},
            "max_sequence_length of a WanPipeline must be int, got '8'",
        ),
        ("wan", {"options": {"guidance_scale_2": [3.0]}}, "guidance_scale_2 .* must be float, got"),
        ("wan", {"num_videos": 2, "per_prompt": 2}, "give num_videos or per_prompt, not both: got 2 and 2"),
        ("wan", {"per_prompt": 0}, "per_prompt must be at least 1, got 0"),
        ("wan", {"prompts": [Prompt("a", file="x"), Prompt("b", file="X.mp4")]}, "file 'X.mp4' is that of"),
        ("wan", {"prompts": [Prompt("a", file="x"), Prompt("b", file="x.mp4/y")]}, "is a folder of others"),
        ("wan", {"prompts": [Prompt("a", file="X"), Prompt("b", file="x.mp4/y")]}, "is a folder of others"),
        ("wan", {"prompts": [Prompt("a", file="x.png")]}, "must end in .mp4 or have no such ending"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    name: str,
    change: dict[str, Any],
    message: str,
    make_stock_video_pipeline: MakeStock,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        generate_videos(make_stock_video_pipeline(name), "out", **{"prompts": ["a"], **change})
    assert not Path("out").exists()


def test_a_file_of_prompts_names_pictures_and_files(
    make_stock_video_pipeline: MakeStock, pictures: Path, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": "a dog", "image": "b.png", "file": "dogs/first", "seed": 9},
        {"prompt": "a cat", "image": "a.png", "file": "cat.mp4"},
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    prompts = read_prompts([str(file)], images=pictures)
    pipeline = make_stock_video_pipeline("sana_video-image")
    manifest = generate_videos(pipeline, tmp_path / "out", prompts=prompts, options=SANA, **SMALL)
    rows = json.loads(manifest.read_text())["videos"]
    assert [(row["file"], row["image"], row["seed"]) for row in rows] == [
        ("dogs/first.mp4", "b.png", 9), ("cat.mp4", "a.png", 1),
    ]  # fmt: skip
    assert (tmp_path / "out" / "dogs" / "first.mp4").is_file()


def spoil(module: torch.nn.Module, value: float = float("nan")) -> None:
    with torch.no_grad():
        list(module.parameters())[-1].fill_(value)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            "transformer",
            r"000000.mp4 to 000001.mp4: NaN .* latents after step 1 of 2. transformer \(proj_out",
        ),
        ("transformer_2", r"in the latents after step 2 of 2. transformer_2 \(proj_out"),
        ("text_encoder", r"in what text_encoder made of the prompts, .* step 1 of 2. text_encoder \("),
        ("vae", r"after decoding; the latents were finite after every step. vae \("),
    ],
)
def test_of_a_model_with_nan_no_video_is_written(
    part: str, message: str, make_stock_video_pipeline: MakeStock, tmp_path: Path
) -> None:
    pipeline = make_stock_video_pipeline("wan2.2")
    spoil(pipeline.vae.decoder if part == "vae" else getattr(pipeline, part))
    with pytest.raises(NotFiniteSampleError, match=message):
        generate_videos(pipeline, tmp_path, prompts=["a", "b"], options=options("wan"), **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
    assert json.loads((tmp_path / "manifest.json").read_text())["complete"] is False


def test_numbers_that_grow_too_large_are_told_from_bad_weights(
    make_pipeline: Callable[..., MHLADiTPipeline], tmp_path: Path
) -> None:
    pipeline = make_pipeline()
    spoil(pipeline.transformer, 1e38)
    with pytest.raises(NotFiniteSampleError, match="all weights are finite, so that a number grew too"):
        generate_images(pipeline, tmp_path, num_images=2, num_inference_steps=2, guidance_scale=1e5)
    assert not list(tmp_path.glob("*.png"))


def test_signatures_are_read_through_keyword_arguments(
    make_stock_video_pipeline: MakeStock, make_pipeline: Callable[..., MHLADiTPipeline]
) -> None:
    from mhla_diffusion import MHLAWanPipeline

    ours = MHLAWanPipeline(**make_stock_video_pipeline("wan").components)
    parameters = call_parameters(ours)
    assert parameters["num_inference_steps"].default == 50, "said by the base class alone"
    assert parameters["height"].default is None, "said otherwise by the base class"
    assert "kwargs" not in parameters
    assert output_kind(ours) == "videos"
    assert output_kind(make_pipeline()) == "images"
