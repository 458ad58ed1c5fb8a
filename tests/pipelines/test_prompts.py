from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mhla_diffusion.pipelines.prompts import Prompt, read_prompts
from mhla_diffusion.pipelines.rows import prompt_rows


def texts(*values: str) -> list[str]:
    return [prompt.prompt for prompt in read_prompts(values)]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["a beach, waves"], ["a beach, waves"]),
        (["a", "b, c"], ["a", "b, c"]),
        (["[a red car]"], ["a red car"]),
        (['["a beach, waves", "b"]'], ["a beach, waves", "b"]),
        (["['a, b', \"c\"]", "d"], ["a, b", "c", "d"]),
        (["[close-up] of a cat, [4k] wide"], ["[close-up] of a cat, [4k] wide"]),
        (["a: b, {c}"], ["a: b, {c}"]),
        (["[1]"], ["1"]),
        (['["[a] b [c]"]'], ["[a] b [c]"]),
    ],
)
def test_a_prompt_is_one_prompt_unless_a_list_is_plain_to_see(values: list[str], expected: list[str]) -> None:
    assert texts(*values) == expected


@pytest.mark.parametrize(
    "value",
    ["[a beach in spring, waves lapping on sand]", '["a", b]', "[a: b]", "[[a], [b]]", "[a] b [c]", "[*a]"],
)
def test_brackets_that_may_be_one_prompt_or_several_are_refused(value: str) -> None:
    with pytest.raises(ValueError, match=r"may be one prompt or several\. Give a prompt without brackets"):
        read_prompts([value])


@pytest.mark.parametrize("values", [[], ["[]"]])
def test_no_prompt_at_all_is_refused(values: list[str]) -> None:
    with pytest.raises(ValueError, match="there is no prompt"):
        read_prompts(values)


def test_a_text_file_has_one_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa beach, waves\r\n\r\n  [sand, sea] \u2028 é\n".encode())
    prompts = read_prompts([str(path)])
    assert [prompt.prompt for prompt in prompts] == ["a beach, waves", "[sand, sea] \u2028 é"]
    assert prompts[1].origin == f"{path} line 3"


def test_tables_have_columns_for_what_goes_with_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    rows: list[dict[str, Any]] = [
        {"prompt": "a, b", "seed": 4, "negative_prompt": "rain", "file": "x/y.mp4", "image": "a.png"},
        {"prompt": "c"},
    ]
    table = tmp_path / "t.csv"
    table.write_text('Prompt,seed,negative prompt,file_name,image\n"a, b",4,rain,x/y.mp4,a.png\n\nc,,,,\n')
    lines = tmp_path / "t.jsonl"
    lines.write_text("\n\n".join(map(json.dumps, rows)))
    for path, last in ((table, 4), (lines, 3)):
        first, second = read_prompts([str(path)])
        assert (first.prompt, first.seed, first.negative_prompt, first.file) == ("a, b", 4, "rain", "x/y.mp4")
        assert first.image == tmp_path / "a.png"
        assert second == Prompt("c", origin=f"{path} line {last}")


def test_captions_of_a_data_set_are_prompts_whose_samples_are_named_as_its_files(tmp_path: Path) -> None:
    table = tmp_path / "captions.csv"
    table.write_text('path,caption,weight\ncats/1.webm,a cat,1\n2.mp4,"a dog, asleep",0.5\n')
    lines = tmp_path / "captions.jsonl"
    rows = ({"path": "./cats/1.jpg", "caption": "a cat"}, {"path": "2", "caption": "a dog, asleep"})
    lines.write_text("\n".join(map(json.dumps, rows)))
    metadata = tmp_path / "metadata.csv"
    metadata.write_text('file_name,text\ncats/1.png,a cat\n2.png,"a dog, asleep"\n')
    more = tmp_path / "more.csv"
    more.write_text('path,caption,duration,fps\ncats/1.webm,a cat,3,\n2.mp4,"a dog, asleep",,8\n')
    for path in (table, lines, metadata, more):
        prompts = read_prompts([str(path)])
        assert [prompt.prompt for prompt in prompts] == ["a cat", "a dog, asleep"]
        assert [prompt.file_name(".mp4") for prompt in prompts] == ["cats/1.mp4", "2.mp4"]
    frames = tmp_path / "frames.csv"
    frames.write_text("path,caption\nv1.0,a\nmovie.2020,b\nmovie.2021,c\n")
    names = [prompt.file_name(".mp4") for prompt in read_prompts([str(frames)])]
    assert names == ["v1.0.mp4", "movie.2020.mp4", "movie.2021.mp4"], "folders of frames have no ending"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "path,caption\n../a.mp4,a\n", "line 2: file '../a' must be a path below the folder"),
        ("a.jsonl", '{"path": "", "caption": "a"}\n', "line 1: file '' must be a path below the folder"),
        ("a.csv", "prompt,caption\na,b\n", "line 2 has prompt and caption: leave all but one out"),
        ("a.jsonl", '{"prompt": "a", "caption": "b"}\n', "line 1 has prompt and caption"),
        ("a.jsonl", '{"prompt": "a", "file": "b", "file_name": "c"}\n', "line 1 has one column twice"),
        ("a.csv", "path,file,caption\na,b,c\n", "line 2 has file and path: leave all but one out"),
        ("a.jsonl", '{"path": 5, "caption": "b"}\n', "line 1: path must be a text, got 5"),
        ("a.csv", "caption,sed\na,1\n", "line 2: unknown 'sed'"),
        (
            "a.jsonl",
            '{"prompt": "a", "prompt": "b"}\n',
            "line 1 is not valid JSON .one name twice among prompt",
        ),
        ("a.jsonl", "[" * 100_000, "line 1 is not valid JSON .*recursion"),
        ("a.csv", "path,prompt\na.png,b\n", "line 2: unknown 'path'"),
        ("a.csv", "Words\na\n", "line 1 must be a header with a column prompt, .* got Words"),
        ("a.csv", "prompt,prompt\na,b\n", "each column once"),
        ("a.csv", "", "got nothing"),
        ("a.csv", "prompt,seed\na,1\nb, c, 2\n", "line 3 has more fields than the header"),
        ("a.csv", "prompt,seed\na,1.5\n", "line 2: seed must be a whole number, got '1.5'"),
        ("a.csv", "prompt,seed\na,-1\n", "line 2: seed must be a whole number from 0 to"),
        ("a.csv", "prompt,seed\na,1\n,2\n", "line 3 has no prompt"),
        ("a.csv", "prompt,sed\na,1\n", "line 2: unknown 'sed'; the columns are prompt, seed, neg"),
        ("a.csv", 'prompt\n"a\nb\n', "line 3 is no CSV"),
        ("a.csv", "prompt,image\na,../a.png\n", "line 2: image '../a.png' lies outside of"),
        ("a.csv", "prompt,image\na,/etc/passwd\n", "lies outside of .*: say which folder"),
        ("a.csv", "prompt,image\na,.\n", "there is no image '.'"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": }\n', "line 2 is not valid JSON"),
        ("a.jsonl", '{"prompt": "a"}\n"b"\n', "line 2 must be an object"),
        ("a.jsonl", '{"prompt": 3}\n', "line 1: prompt must be a text, got 3"),
        ("a.csv", "prompt,width\na,0\n", "line 2: width must be a whole number of pixels, got 0"),
        ("a.csv", "prompt,height\na,tall\n", "line 2: height must be a whole number, got 'tall'"),
        ("a.jsonl", '{"prompt": "a", "seed": true}\n', "line 1: seed must be a whole number .* got True"),
        ("a.jsonl", '{"prompt": "a", "image": 3}\n', "line 1: image must be a path, got 3"),
        ("a.jsonl", '{"prompt": " "}\n', "line 1: the prompt is empty"),
        ("a.jsonl", '{"prompt": "a \\ud800"}\n', "line 1: prompt .* is no Unicode text"),
        ("a.txt", b"a\nb\n\xff\n", "line 3 is not UTF-8"),
        ("a.txt", "\n", "there is no prompt in"),
    ],
)
def test_a_faulty_file_is_refused_by_its_line(
    name: str, content: str | bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught:
        read_prompts([str(path)])
    assert str(path) in str(caught.value)


def test_a_file_that_is_not_there_is_not_taken_for_a_prompt(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file of prompts"):
        read_prompts([str(tmp_path / "my prompts.txt")])


def test_another_file_or_a_folder_is_not_taken_for_a_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("cats").mkdir()
    Path("cats/p.json").write_text("[]")
    for value in ("nothere.json", "nothere.TSV", "./nothere/prompts.yaml"):
        with pytest.raises(ValueError, match=r"is the name of a file, and no file of prompts .* in brackets"):
            read_prompts([value])
    for value in ("a cat eats config.json", "cats", "node.js"):
        assert [prompt.prompt for prompt in read_prompts([value])] == [value]
    for value in ("cats/p.json", "cats/", str(tmp_path)):
        with pytest.raises(ValueError, match=r"is a file or a folder here, .* in brackets") as caught:
            read_prompts([value])
        (bracketed,) = re.findall(r"brackets: (\[.+\])$", str(caught.value))
        assert [prompt.prompt for prompt in read_prompts([bracketed])] == [value]
    assert [prompt.prompt for prompt in read_prompts(["cats", "a/b"])] == ["cats", "a/b"]


@pytest.mark.parametrize(
    "file",
    [
        "/a", "../a", "a/../../b", "a//b", "./a", "C:a", "C:\\a", "a\\b", "", ".hidden", "a/.b", "a\nb",
        "a\0", "x" * 241,
    ],
)  # fmt: skip
def test_names_of_files_stay_inside_the_folder(file: str) -> None:
    with pytest.raises(ValueError, match="prompt 'a': file "):
        Prompt("a", file=file)


@pytest.mark.parametrize(
    ("file", "repetition", "expected"),
    [
        ("x", 0, "x.mp4"),
        ("x.MP4", 0, "x.mp4"),
        ("v1.5 of x", 0, "v1.5 of x.mp4"),
        ("a/x.mp4", 3, "a/x-3.mp4"),
        ("été, à la mer", 1, "été, à la mer-1.mp4"),
    ],
)
def test_names_get_their_extension_and_number(file: str, repetition: int, expected: str) -> None:
    assert Prompt("a", file=file).file_name(".mp4", repetition) == expected


def test_prompts_in_turn_count_their_repetitions() -> None:
    given = [Prompt("a", file="x", seed=5), "b"]
    rows, _ = prompt_rows(given, 4, None, seed=0, negative_prompt=None, kind="images")
    assert [(row["file"], row["seed"]) for row in rows] == [
        ("x.png", 5), ("000001.png", 1), ("x-1.png", 6), ("000003.png", 3),
    ]  # fmt: skip
    fewer, _ = prompt_rows(given, 2, None, seed=0, negative_prompt=None, kind="images")
    assert fewer == rows[:2], "a larger number adds samples"


def test_a_negative_prompt_of_its_own_counts_though_it_is_empty() -> None:
    given = ["a", Prompt("b", negative_prompt=""), Prompt("c", negative_prompt="rain")]
    for of_all, expected in (
        ("blurry", ["blurry", "", "rain"]),
        ("", ["", "", "rain"]),
        (None, [None, "", "rain"]),
    ):
        rows, _ = prompt_rows(given, None, None, seed=0, negative_prompt=of_all, kind="images")
        assert [row.get("negative_prompt") for row in rows] == expected


def test_names_that_differ_in_their_spelling_alone_are_refused() -> None:
    given = [Prompt("a", file="caf\u00e9"), Prompt("b", file="Cafe\u0301")]
    with pytest.raises(ValueError, match="is that of sample 0 too"):
        prompt_rows(given, None, None, seed=0, negative_prompt=None, kind="images")
