"""Exported pictures are those that training sees, and their captions prompts."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mhla_diffusion.commands.export import images
from mhla_diffusion.pipelines.prompts import read_prompts
from mhla_diffusion.training.data import DataConfig, ImageSamples, open_images
from mhla_diffusion.training.data.stream import to_pixels
from mhla_diffusion.training.data.toys import ScenesConfig


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


def test_captions_are_prompts_whose_samples_are_named_as_the_pictures(tmp_path: Path) -> None:
    data = DataConfig("scene", scenes=ScenesConfig(num_images=6))
    images(data, str(tmp_path / "out"), captions=True)
    prompts = read_prompts([str(tmp_path / "out" / "captions.csv")])
    assert [prompt.prompt for prompt in prompts] == list(open_images(data, captioned=True).captions or ())
    pictures = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert [prompt.file_name(".png") for prompt in prompts] == pictures
