"""Exported pictures are those that training sees, and their captions prompts."""

from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mhla_diffusion.commands.export import images, videos
from mhla_diffusion.files.videos import open_video, write_video
from mhla_diffusion.pipelines.prompts import read_prompts
from mhla_diffusion.training.data import DataConfig, ImageSamples, VideoDataConfig, open_images
from mhla_diffusion.training.data.stream import to_pixels
from mhla_diffusion.training.data.toys import MovingDigitsConfig, ScenesConfig


def test_pictures_have_the_sizes_that_training_brings_them_to(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, draw = tmp_path / "in" / "a", np.random.default_rng(0)
    folder.mkdir(parents=True)
    for i, shape in enumerate([(16, 9), (9, 20), (10, 10)]):
        Image.fromarray(draw.integers(0, 256, (*shape, 3), np.uint8)).save(folder / f"{i}.png")
    data = DataConfig("folder", str(tmp_path / "in"), sizes=((14, 7), (7, 14)), enlarge=False, flip=True)
    with caplog.at_level(logging.WARNING):
        images(data, str(tmp_path / "out"))
    assert re.search(r"skipped: \S+2\.png: 10 x 10 pixels are fewer than the 14 x 7 it goes to", caplog.text)
    trained = ImageSamples(open_images(data), channels=3, sizes=data.sizes, enlarge=False)
    exported = sorted((tmp_path / "out" / "a").iterdir())
    assert [path.name for path in exported] == ["000000.png", "000001.png"]
    for i, path in enumerate(exported):
        pixels = to_pixels(trained.load(i, torch.Generator())["samples"]).permute(1, 2, 0)
        assert np.array_equal(np.asarray(Image.open(path)), pixels.numpy())
    images(DataConfig("folder", str(tmp_path / "in")), str(tmp_path / "whole"))
    whole = sorted((tmp_path / "whole" / "a").iterdir())
    assert [Image.open(path).size for path in whole] == [(9, 16), (20, 9), (10, 10)]


def test_clips_have_the_rate_that_they_are_taken_at(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for name, rate in (("a", 30.0), ("b", 12.0)):
        write_video(np.zeros((15, 16, 16, 3), np.uint8), source / f"{name}.mp4", fps=rate)
        (source / f"{name}.txt").write_text(name)

    def rates(data: VideoDataConfig, name: str) -> list[float]:
        videos(data, str(tmp_path / name), num=2)
        return [round(open_video(path).fps, 2) for path in sorted((tmp_path / name).glob("*.mp4"))]

    files = VideoDataConfig("folder", str(source), frames=3, sizes=((16, 16),))
    assert rates(files, "own") == [30, 12], "that of each file"
    assert rates(dataclasses.replace(files, fps=6.0), "asked") == [6, 6]
    digits = MovingDigitsConfig(digit_size=8, num_clips=2)
    drawn = VideoDataConfig("moving_mnist", frames=3, sizes=((16, 16),), moving_digits=digits)
    assert rates(drawn, "drawn") == [16, 16]


def test_captions_are_prompts_whose_samples_are_named_as_the_pictures(tmp_path: Path) -> None:
    data = DataConfig("scene", scenes=ScenesConfig(num_images=6))
    images(data, str(tmp_path / "out"), captions=True)
    prompts = read_prompts([str(tmp_path / "out" / "captions.csv")])
    assert [prompt.prompt for prompt in prompts] == list(open_images(data, captioned=True).captions or ())
    pictures = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert [prompt.file_name(".png") for prompt in prompts] == pictures
