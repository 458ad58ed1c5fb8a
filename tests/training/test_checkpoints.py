"""Which checkpoints there are."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from mhla_diffusion.files.writing import start_writing, write_folder
from mhla_diffusion.training import checkpoints


def write(folder: Path) -> None:
    (folder / "weights").write_text("x")


def test_what_is_still_written_is_no_checkpoint(tmp_path: Path) -> None:
    first = checkpoints.checkpoint_folder(tmp_path, 1)
    write_folder(first, write)
    write(start_writing(checkpoints.checkpoint_folder(tmp_path, 2)))
    assert checkpoints.list_checkpoints(tmp_path) == [first]


def test_rotation_keeps_the_latest(tmp_path: Path) -> None:
    folders = [checkpoints.checkpoint_folder(tmp_path, step) for step in (5, 10, 100, 1000)]
    for folder in reversed(folders):
        write_folder(folder, write)
    checkpoints.keep_latest(tmp_path, 2)
    assert checkpoints.list_checkpoints(tmp_path) == folders[2:]
    checkpoints.keep_latest(tmp_path, 5)
    assert checkpoints.list_checkpoints(tmp_path) == folders[2:]


def why(error: Callable[[], Any]) -> str:
    with (
        pytest.raises(ValueError, match=r"^x cannot be loaded: ") as caught,
        checkpoints.read_errors(Path("x")),
    ):
        error()
    return str(caught.value)


def test_why_a_checkpoint_cannot_be_loaded_is_said_in_short() -> None:
    few, many = nn.Linear(1, 1), nn.ModuleList(nn.Linear(1, 1) for _ in range(1000))
    assert 'for Linear: Missing key(s) in state_dict: "weight", "bias"' in why(
        lambda: few.load_state_dict({})
    )
    found = why(lambda: many.load_state_dict({}))
    assert re.search(r'"0\.weight", .* \.\.\.; go on from another checkpoint$', found)
    assert len(found) < 400
