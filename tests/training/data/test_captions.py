"""Lists of captions, and what is said of bad ones."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from mhla_diffusion.training.data.captions import read_captions


def test_missing_files_are_named_and_stay_in(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.png").touch()
    (tmp_path / "captions.csv").write_text("path,caption\na.png, here \nnowhere.png,nothing\n")
    with caplog.at_level(logging.WARNING):
        files = read_captions(tmp_path)
    assert files == [(tmp_path / "a.png", "here"), (tmp_path / "nowhere.png", "nothing")]
    assert "captions.csv, line 3: no such file" in caplog.text
    assert "1 of 2 files are missing and will be skipped" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("captions.csv", "file,text\na.mp4,b\n", "line 1: the columns path and caption are needed"),
        (
            "captions.csv",
            "path,caption\na.mp4,a cat, a dog\n",
            "line 2: 2 columns are needed; a caption with",
        ),
        ("captions.csv", "path,caption\na.mp4,ok\nb.mp4\n", "line 3: 2 columns are needed"),
        ("captions.csv", "path,caption\na.mp4,\n", "line 2: path and caption must be texts"),
        ("captions.csv", "path,caption\n", "lists no files"),
        ("captions.csv", "path,caption\na.mp4,ok\n", r"none of the 1 files .* exists, .*line 2"),
        ("captions.jsonl", '{"path": "a.mp4", "caption": "ok"}\n{"path"\n', "line 2: not valid JSON"),
        ("captions.jsonl", '{"path": "a.mp4", "caption": 3}\n', "line 1: path and caption must be texts"),
        ("captions.jsonl", "[1]\n", "line 1: path and caption must be texts"),
        ("other.csv", "", "no captions at .*captions.csv: a CSV with the columns"),
    ],
)
def test_a_bad_captions_file_is_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_captions(tmp_path)
