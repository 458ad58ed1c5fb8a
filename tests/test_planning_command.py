"""Plans as ``mhla plan`` prints them."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run_script(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """In this process, as importing diffusers takes many times as long as planning."""
    monkeypatch.setattr(sys, "argv", ["plan.py", *arguments])
    runpy.run_path(str(ROOT / "scripts" / "plan.py"), run_name="__main__")


SIZE = ("--height", "720", "--width", "1280", "--frames", "81")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("Wan2.1-14B", *SIZE, "--gate", "true"), "21 x 45 x 80 = 75,600 tokens"),
        (("Wan2.1-14B", *SIZE, "--blocks", "[3, 5, 10]", "--cpe", "true"), "blocks 3 x 5 x 10 = 150, each"),
        (("Wan2.1-14B", *SIZE, "--linear_layers", "20", "--dtype", "float16"), "in 20 of 40 layers"),
        (("DiT-XL/2", "--height", "4096", "--width", "4096"), "256 x 256 = 65,536 tokens"),
        (("Qwen-Image", *SIZE[:4], "--extra_tokens", "512"), "45 x 80 = 3,600 tokens and 512 of text"),
        (("DiT-XL/2", "--height", "256", "--width", "256", "--blocks", "1"), "recommended: blocks 2 x 4 = 8"),
        (("DiT-XL/2", "--height", "256", "--width", "256"), "the paper and the configs take 16 for"),
    ],
    ids=str,
)
def test_the_script_prints_a_table_of_at_most_100_columns(
    arguments: tuple[str, ...],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_script(monkeypatch, "--model", *arguments)
    table = capsys.readouterr().out
    assert expected in table
    assert all(part in table for part in ("GFLOPs", "feed-forward", "whole model", "MB in a layer"))
    assert max(map(len, table.splitlines())) <= 100


def test_the_script_says_what_is_wrong_and_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        run_script(monkeypatch, "--model", "DiT-S/2", *SIZE)
    assert exit_.value.code == 1
    assert capsys.readouterr().err == "error: an image model has no frames, got frames=81; leave it out\n"


def test_an_unknown_option_of_the_script_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        run_script(monkeypatch, "--model", "DiT-S/2", "--height", "256", "--width", "256", "--heigth", "9")
    assert exit_.value.code == 2
    assert "heigth" in capsys.readouterr().err
