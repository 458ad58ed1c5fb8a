"""Lists of captions, and what is said of bad ones."""

from __future__ import annotations

import json
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
        ("captions.csv", "path,caption\n../a.mp4,b\n", r"line 2: '\.\./a\.mp4' leads out of"),
        ("captions.csv", "path,caption\n/etc/passwd,b\n", "line 2: '/etc/passwd' leads out of"),
        ("captions.jsonl", '{"path": "a\\u0000", "caption": "b"}\n', "line 1: .* leads out of"),
        ("captions.json", '[{"path": "a.mp4"}', "captions.json: not valid JSON"),
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


ROWS = [("a.mp4", "ein Bär, müde"), ("b/c.mp4", "x" * 200_000)]
CSV = "".join(f'{path},"{caption}"\n' for path, caption in ROWS)
OBJECTS = [json.dumps({"file_name": path, "text": caption}, ensure_ascii=False) for path, caption in ROWS]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("captions.csv", f"path,caption\n{CSV}".encode("utf-8-sig")),
        ("captions.csv", f"path,caption\n{CSV}".encode("utf-16")),
        ("metadata.csv", f"file_name,text\n{CSV}".encode()),
        ("metadata.jsonl", "\n".join(OBJECTS).encode("utf-8-sig")),
        ("captions.json", f"[{', '.join(OBJECTS)}]".encode()),
        ("captions.jsonl", f"[{', '.join(OBJECTS)}]".encode("utf-16")),
    ],
)
def test_captions_as_people_have_them(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / "b").mkdir()
    for path, _ in ROWS:
        (tmp_path / path).touch()
    (tmp_path / name).write_bytes(content)
    assert read_captions(tmp_path) == [(tmp_path / path, caption) for path, caption in ROWS]


def test_another_encoding_is_named_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "captions.csv").write_bytes("path,caption\na.mp4,Bär\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"captions\.csv line 2 is not UTF-8: store the file as UTF-8"):
        read_captions(tmp_path)


def test_folders_of_pictures_are_videos_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "frames").mkdir()
    (tmp_path / "captions.csv").write_text(f"path,caption\n{tmp_path / 'frames'},a\n")
    assert read_captions(tmp_path) == [(tmp_path / "frames", "a")]
    assert not caplog.text
