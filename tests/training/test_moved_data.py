"""Runs that go on after their data were moved, and those whose data are others."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from mhla_diffusion.files.videos import write_video
from mhla_diffusion.training import (
    DataConfig,
    ImageTrainingConfig,
    VideoDataConfig,
    parse_config,
    train_image,
)
from mhla_diffusion.training.data import open_images, open_videos
from mhla_diffusion.training.data.fingerprint import fingerprint_of

Train = Callable[..., int]


@pytest.fixture
def train(write_settings: Callable[[], Path]) -> Train:
    """Trains in this process."""

    def train(*arguments: str) -> int:
        config, resume = parse_config(ImageTrainingConfig, ["--config", str(write_settings()), *arguments])
        return train_image(config, resume=resume)

    return train


def test_a_run_goes_on_where_its_data_were_moved_and_not_with_others(
    train: Train,
    settings: dict[str, Any],
    image_folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings["trainer"]["max_steps"] = 3
    assert train() == 0
    moved = tmp_path / "elsewhere" / "pictures"
    shutil.copytree(image_folder, moved)
    settings["trainer"]["max_steps"] = 4
    assert train("--resume", "latest", "--data.path", str(moved)) == 0
    (image_folder / "cat" / "3.png").unlink()
    settings["trainer"]["max_steps"] = 5
    with pytest.raises(ValueError, match=r"data\.path: .* -> .* and what is there is not the same: give the"):
        train("--resume", "latest", "--data.path", str(image_folder))
    (moved / "cat" / "3.png").unlink()
    with caplog.at_level(logging.WARNING):
        assert train("--resume", "latest", "--data.path", str(moved)) == 0
    assert "the data have changed since" in caplog.text


def test_a_checkpoint_without_a_fingerprint_keeps_its_path(
    train: Train, settings: dict[str, Any], image_folder: Path, tmp_path: Path
) -> None:
    settings["trainer"]["max_steps"] = 3
    assert train() == 0
    checkpoint = Path(settings["output_dir"]) / "checkpoints" / "step-00000003"
    record = json.loads((checkpoint / "run.json").read_text())
    del record["data"]  # as earlier versions wrote it
    (checkpoint / "run.json").write_text(json.dumps(record))
    (checkpoint / "SHA256SUMS").unlink()
    shutil.copytree(image_folder, tmp_path / "copy")
    settings["trainer"]["max_steps"] = 4
    with pytest.raises(ValueError, match="the checkpoint has no fingerprint of its data"):
        train("--resume", "latest", "--data.path", str(tmp_path / "copy"))
    assert train("--resume", "latest") == 0


def images(folder: Path) -> DataConfig:
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        Image.new("L", (8, 8), 40).save(folder / name / "0.png")
    return DataConfig("folder", str(folder))


def rows(folder: Path) -> DataConfig:
    features = datasets.Features({"image": datasets.Image(), "kind": datasets.Value("string")})
    content = {"image": [Image.new("L", (8, 8), 40)] * 2, "kind": ["a", "b"]}
    datasets.Dataset.from_dict(content, features=features).save_to_disk(folder)
    return DataConfig("huggingface", str(folder), label_column="kind")


def array(folder: Path) -> DataConfig:
    folder.mkdir()
    np.savez(folder / "images.npz", arr_0=np.full((2, 8, 8), 40, np.uint8), labels=np.arange(2))
    return DataConfig("npz", str(folder / "images.npz"))


def clips(folder: Path) -> VideoDataConfig:
    write_video(np.full((4, 16, 16), 40, np.uint8), folder / "a.mp4", fps=8)
    (folder / "captions.csv").write_text("path,caption\na.mp4,a video\n")
    return VideoDataConfig(source="folder", path=str(folder), frames=2)


@pytest.mark.parametrize("make", [images, rows, array, clips])
def test_a_fingerprint_is_of_the_data_and_not_of_their_place(
    make: Callable[[Path], Any], tmp_path: Path
) -> None:
    def find(config: Any) -> str | None:
        opened = open_videos(config) if make is clips else open_images(config)
        return fingerprint_of(opened)

    first = find(make(tmp_path / "here"))
    assert first is not None
    assert find(make(tmp_path / "deep" / "there" if make in (images, clips) else tmp_path / "there")) == first


def test_another_caption_or_content_is_another_fingerprint(tmp_path: Path) -> None:
    config = clips(tmp_path)
    first = fingerprint_of(open_videos(config))
    (tmp_path / "captions.csv").write_text("path,caption\na.mp4,another video\n")
    second = fingerprint_of(open_videos(config))
    write_video(np.full((4, 16, 16), 41, np.uint8), tmp_path / "a.mp4", fps=8)
    assert len({first, second, fingerprint_of(open_videos(config))}) == 3
