"""Lists of captions, and what is said of bad ones."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path

import pytest
import torch

from mhla_diffusion.training.data.captions import (
    draw_caption,
    draw_index,
    read_captions,
    texts_of,
    weighted_texts,
)


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
        (
            "captions.csv",
            "path,caption\na.mp4,b\na.mp4,b\n",
            "line 3: a.mp4 has the caption 'b' already, from line 2",
        ),
        (
            "captions.csv",
            "path,caption,weight\na.mp4,b,-1\n",
            r"line 2: weights of captions must be above 0, got \[-1",
        ),
        ("captions.csv", "path,caption,weight\na.mp4,b,often\n", "line 2: could not convert string to float"),
        (
            "captions.jsonl",
            '{"path": "a.mp4", "caption": ["b", "c"], "weight": [1]}',
            "line 1: .*as many weights",
        ),
        ("other.csv", "", "no captions at .*captions.csv: a CSV with the columns"),
    ],
)
def test_a_bad_captions_file_is_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_captions(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("captions.csv", "path,caption,weight\na.png,a cat,3\nb.png,it,\na.png,a pet,1\n"),
        ("captions.jsonl", '{"path": "a.png", "caption": ["a cat", "a pet"], "weight": [3, 1]}\n\n'
         '{"path": "b.png", "caption": "it"}'),
    ],
)  # fmt: skip
def test_a_file_may_have_several_captions_with_weights(tmp_path: Path, name: str, content: str) -> None:
    for file in ("a.png", "b.png"):
        (tmp_path / file).touch()
    (tmp_path / name).write_text(content)
    files = read_captions(tmp_path)
    assert files == [(tmp_path / "a.png", {"a cat": 3.0, "a pet": 1.0}), (tmp_path / "b.png", "it")]
    assert texts_of(caption for _, caption in files) == ["a cat", "a pet", "it"]
    generator = torch.Generator().manual_seed(0)
    drawn = Counter(draw_caption(files[0][1], generator) for _ in range(400))
    assert drawn["a cat"] == pytest.approx(300, abs=30)
    assert drawn["a cat"] + drawn["a pet"] == 400
    state = generator.get_state()
    assert draw_caption("it", generator) == "it"
    assert torch.equal(generator.get_state(), state), "one caption takes no random number"


def test_text_files_beside_the_files_and_those_without_a_caption(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("a.png", "deep/b.PNG", "c.png", "d.png"):
        (tmp_path / name).touch()
    (tmp_path / "a.txt").write_text("\ufeffa cat\n\na pet\n", encoding="utf-8")
    (tmp_path / "deep" / "b.txt").write_text("gr\u00fcn")
    (tmp_path / "c.txt").write_text(" \n")
    files = dict(read_captions(tmp_path, extensions=(".png",)))
    assert files == {
        tmp_path / "a.png": {"a cat": 1.0, "a pet": 1.0},
        tmp_path / "deep" / "b.PNG": "gr\u00fcn",
    }
    assert (
        f"2 files in {tmp_path} have no caption and are left out, first {tmp_path / 'c.png'}" in caplog.text
    )


@pytest.mark.parametrize(("name", "line"), [("a.txt", 2), ("captions.csv", 3), ("captions.jsonl", 2)])
def test_text_in_another_encoding_is_refused_with_its_line(tmp_path: Path, name: str, line: int) -> None:
    (tmp_path / "a.png").touch()
    content = {
        "a.txt": "a\ngr\u00fcn",
        "captions.csv": "path,caption\na.png,b\na.png,gr\u00fcn\n",
        "captions.jsonl": '{"path": "a.png", "caption": "b"}\n{"path": "a.png", "caption": "gr\u00fcn"}',
    }[name]
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"{name} line {line} is not UTF-8: store the file as UTF-8"):
        read_captions(tmp_path, extensions=(".png",))


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


def test_folders_of_pictures_are_videos_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "frames").mkdir()
    (tmp_path / "captions.csv").write_text(f"path,caption\n{tmp_path / 'frames'},a\n")
    assert read_captions(tmp_path) == [(tmp_path / "frames", "a")]
    assert not caplog.text


def test_equal_texts_have_the_sum_of_their_weights_and_no_weight_is_0() -> None:
    assert weighted_texts(["a", "a ", "b"], [1, 3, 1]) == {"a": 4, "b": 1}
    with pytest.raises(ValueError, match="must be above 0"):
        weighted_texts(["a", "b"], [1, 0])


def test_separators_of_unicode_are_of_the_caption(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    line = json.dumps({"path": "a.png", "caption": "a\u2028b\u0085c"}, ensure_ascii=False)
    (tmp_path / "captions.jsonl").write_text(f"{line}\n", encoding="utf-8")
    assert read_captions(tmp_path) == [(tmp_path / "a.png", "a\u2028b\u0085c")]


@pytest.mark.parametrize("end", ["\r", "\r\n"])
def test_csv_may_have_the_line_ends_of_any_system(tmp_path: Path, end: str) -> None:
    (tmp_path / "a.png").touch()
    (tmp_path / "captions.csv").write_bytes(end.join(["path,caption", 'a.png,"b', 'c"', ""]).encode())
    ((path, caption),) = read_captions(tmp_path)
    assert (path.name, caption.split()) == ("a.png", ["b", "c"])


def test_hidden_files_are_no_samples(tmp_path: Path) -> None:
    (tmp_path / ".cache").mkdir()
    for name in ("a.png", "a.txt", "._a.png", "._a.txt", ".cache/b.png", ".cache/b.txt"):
        (tmp_path / name).write_text("x")
    assert read_captions(tmp_path, extensions=(".png",)) == [(tmp_path / "a.png", "x")]


def test_a_sample_of_one_caption_takes_no_random_number() -> None:
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    assert draw_index([2.0], generator) == 0
    assert torch.equal(generator.get_state(), state), "or runs of before would draw others"
