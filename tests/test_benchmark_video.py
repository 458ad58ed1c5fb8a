"""The benchmarks for video measure what they say; their times are not tested."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mhla_diffusion import benchmark_video
from mhla_diffusion.files.videos import write_video


def test_a_layer_is_timed_with_both_attentions(tmp_path: Path) -> None:
    text = benchmark_video.layer(
        (2, 4, 4), (1, 2, 2), heads=2, head_dim=12, ffn_dim=16, repeats=3, out=tmp_path, device="cpu"
    )
    assert [line.split(" | ")[0] for line in text.splitlines()[4:]] == ["| forward", "| forward + backward"]
    rows = json.loads((tmp_path / "layer.json").read_text())["measurements"]
    assert [row["attention"] for row in rows] == ["mhla", "softmax"] * 2
    assert all(row["seconds"] > 0 and row["peak_bytes"] > 0 and row["runs"] == 3 for row in rows)
    assert (tmp_path / "layer.md").read_text() == text


def test_a_layer_with_mhla_needs_no_more_memory_than_with_softmax(tmp_path: Path) -> None:
    benchmark_video.layer(
        (4, 16, 16), (2, 2, 2), heads=2, head_dim=32, ffn_dim=128, passes=["forward + backward"], repeats=1,
        out=tmp_path, device="cpu",
    )  # fmt: skip
    mhla, softmax = json.loads((tmp_path / "layer.json").read_text())["measurements"]
    assert mhla["peak_bytes"] <= softmax["peak_bytes"]


def test_an_unknown_pass_is_refused() -> None:
    with pytest.raises(ValueError, match=r"passes must be of forward, forward . backward, got 'backward'"):
        benchmark_video.layer(passes=["backward"])


def test_loading_is_timed_beside_a_plain_loop(tmp_path: Path) -> None:
    for i in range(3):
        write_video(np.full((8, 32, 48, 3), 80 * i, np.uint8), tmp_path / f"{i}.mp4", fps=8)
    (tmp_path / "captions.csv").write_text("path,caption\n0.mp4,a\n1.mp4,b\n2.mp4,c\n")
    text = benchmark_video.loading(tmp_path, frames=4, size=(16, 24), clips=8, num_workers=1, repeats=1)
    rows = [line.strip("| ").split(" | ") for line in text.splitlines()[2:]]
    assert [row[0] for row in rows] == ["trainer, 1 workers", "plain loop"]
    assert all(float(row[1]) > 0 for row in rows)
