"""Generated videos as VBench reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mhla_diffusion.evaluation.sets.vbench import export_vbench
from tests.evaluation.clips import moving_squares

WriteVideos = Callable[..., Path]


def test_export_for_vbench(write_videos: WriteVideos, tmp_path: Path) -> None:
    generated = write_videos("made", moving_squares(3, 1))
    prompts = ["a red/blue  square", "a dot", "a dot"]
    rows = [{"file": f"{i:04d}.mp4", "prompt": prompt} for i, prompt in enumerate(prompts)]
    (generated / "manifest.json").write_text(json.dumps({"videos": rows}))
    assert export_vbench(generated, tmp_path / "vbench") == 3
    names = ["a dot-0.mp4", "a dot-1.mp4", "a red blue square-0.mp4", "prompts.json"]
    assert sorted(path.name for path in (tmp_path / "vbench").iterdir()) == names
    assert (tmp_path / "vbench" / "a dot-1.mp4").read_bytes() == (generated / "0002.mp4").read_bytes()
    assert json.loads((tmp_path / "vbench" / "prompts.json").read_text())["a dot-1.mp4"] == "a dot"
    with pytest.raises(ValueError, match="vbench is there already"):
        export_vbench(generated, tmp_path / "vbench")
    rows[0] = {"file": "0000.mp4"}
    (generated / "manifest.json").write_text(json.dumps({"videos": rows}))
    with pytest.raises(ValueError, match=r"0000\.mp4 has no prompt"):
        export_vbench(generated, tmp_path / "second")
    assert not (tmp_path / "second").exists()
