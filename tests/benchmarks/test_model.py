"""The benchmark of whole models measures what it says; its times are not tested."""

from __future__ import annotations

import json
from pathlib import Path

from mhla_diffusion.benchmarks.model import model


def test_model_writes_times_of_every_attention(tmp_path: Path) -> None:
    text = model([64, 128], layers=1, heads=2, head_dim=8, repeats=1, out=tmp_path, device="cpu")
    assert [line.split(" | ")[:4] for line in text.splitlines()[4:]] == [
        ["| 64", "16", "2", "denoising"],
        ["| 64", "16", "2", "training"],
        ["| 128", "64", "4", "denoising"],
        ["| 128", "64", "4", "training"],
    ]
    record = json.loads((tmp_path / "model.json").read_text())
    assert len(record["measurements"]) == 6
    assert (tmp_path / "model.png").read_bytes().startswith(b"\x89PNG")
