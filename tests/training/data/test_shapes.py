"""Shapes of files, opened once."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest

from mhla_diffusion.files.videos import write_video
from mhla_diffusion.training import VideoDataConfig
from mhla_diffusion.training.data import VideoSamples, open_videos
from mhla_diffusion.training.data.shapes import Shape, read_shapes


class Opener:
    """Notes which files are opened, in a file, as this happens in other processes."""

    def __init__(self, files: list[Path], log: Path) -> None:
        self.files, self.log = files, log

    def __call__(self, number: int) -> Shape:
        with self.log.open("a") as log:
            log.write(f"{self.files[number].name}\n")
        text = self.files[number].read_text()
        return (len(text), 2 * len(text)) if text.isalpha() else None

    def opened(self) -> list[str]:
        names = sorted(self.log.read_text().split()) if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return names


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    (tmp_path / "set").mkdir()
    for name, text in {"a": "x", "b": "xy", "broken": "?"}.items():
        (tmp_path / "set" / name).write_text(text)
    return [tmp_path / "set" / name for name in ("a", "b", "broken", "missing")]


def test_files_are_opened_once_and_again_when_they_change(files: list[Path], tmp_path: Path) -> None:
    opener, index = Opener(files, tmp_path / "log"), files[0].with_name("captions.shapes.json")
    assert read_shapes(files, opener, index) == [(1, 2), (2, 4), None, None]
    assert opener.opened() == ["a", "b", "broken"]
    assert read_shapes(files, opener, index) == [(1, 2), (2, 4), None, None]
    assert opener.opened() == []
    files[1].write_text("xyz")
    os.utime(files[0], ns=(0, 0))
    assert read_shapes(files, opener, index) == [(1, 2), (3, 6), None, None]
    assert opener.opened() == ["a", "b"]


def test_an_index_moves_with_its_folder(files: list[Path], tmp_path: Path) -> None:
    opener = Opener(files, tmp_path / "log")
    read_shapes(files, opener, files[0].with_name("index.json"))
    opener.opened()
    moved = tmp_path / "moved"
    files[0].parent.rename(moved)
    again = Opener([moved / file.name for file in files], tmp_path / "log")
    assert read_shapes(again.files, again, moved / "index.json") == [(1, 2), (2, 4), None, None]
    assert again.opened() == []


def test_what_was_opened_before_an_interruption_is_kept(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mhla_diffusion.training.data.shapes._KEPT_EVERY", 1)
    opener, index = Opener(files, tmp_path / "log"), tmp_path / "index.json"

    def interrupted(number: int) -> Shape:
        if number == 1:
            raise RuntimeError("killed")
        return opener(number)

    with pytest.raises(RuntimeError, match="killed"):
        read_shapes(files, interrupted, index)
    assert opener.opened() == ["a"]
    assert read_shapes(files, opener, index) == [(1, 2), (2, 4), None, None]
    assert opener.opened() == ["b", "broken"]


def test_an_index_that_cannot_be_read_or_kept_is_said(
    files: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opener = Opener(files, tmp_path / "log")
    index = tmp_path / "index.json"
    index.write_text("{")
    with caplog.at_level(logging.WARNING):
        assert read_shapes(files, opener, index) == [(1, 2), (2, 4), None, None]
        assert "index.json is made anew" in caplog.text
        (tmp_path / "file").touch()
        assert read_shapes(files, opener, tmp_path / "file" / "index.json") == [(1, 2), (2, 4), None, None]
    assert "index.json cannot be kept" in caplog.text


def test_videos_of_several_sizes_are_opened_at_the_first_start_alone(tmp_path: Path) -> None:
    for name, size in {"wide": (32, 64), "tall": (64, 32)}.items():
        write_video(np.zeros((4, *size), np.uint8), tmp_path / f"{name}.mp4", fps=8)
    (tmp_path / "captions.csv").write_text("path,caption\nwide.mp4,wide\ntall.mp4,tall\n")
    config = VideoDataConfig(
        source="folder", path=str(tmp_path), frames=4, sizes=((16, 32), (32, 16)), decoder="pyav"
    )
    assert VideoSamples(open_videos(config), config, channels=1).buckets == [0, 1]
    index = json.loads((tmp_path / "captions.shapes.json").read_text())
    assert {name: entry[2:] for name, entry in index["shapes"].items()} == {
        "wide.mp4": [32, 64],
        "tall.mp4": [64, 32],
    }
    index["shapes"]["wide.mp4"][2:] = [64, 32]  # what would not be read if the file were opened
    (tmp_path / "captions.shapes.json").write_text(json.dumps(index))
    assert VideoSamples(open_videos(config), config, channels=1).buckets == [1, 1]
