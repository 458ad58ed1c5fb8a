"""The benchmark of a layer measures what it says; its times are not tested."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mhla_diffusion.benchmarks import layer as benchmark
from mhla_diffusion.benchmarks.layer import layer

from .tables import cells


def test_a_layer_is_timed_with_both_attentions(tmp_path: Path) -> None:
    text = layer(
        (2, 4, 4), (1, 2, 2), heads=2, head_dim=12, ffn_dim=16, repeats=3, out=tmp_path, device="cpu"
    )
    assert [line.split(" | ")[0] for line in text.splitlines()[4:]] == ["| forward", "| forward + backward"]
    rows = json.loads((tmp_path / "layer.json").read_text())["measurements"]
    assert [row["attention"] for row in rows] == ["mhla", "softmax"] * 2
    assert all(row["seconds"] > 0 and row["peak_bytes"] > 0 and row["runs"] == 3 for row in rows)
    assert (tmp_path / "layer.md").read_text() == text


def test_a_layer_with_mhla_needs_no_more_memory_than_with_softmax(tmp_path: Path) -> None:
    layer(
        (4, 16, 16), (2, 2, 2), heads=2, head_dim=32, ffn_dim=128, passes=["forward + backward"], repeats=1,
        out=tmp_path, device="cpu",
    )  # fmt: skip
    mhla, softmax = json.loads((tmp_path / "layer.json").read_text())["measurements"]
    assert mhla["peak_bytes"] <= softmax["peak_bytes"]


def test_an_unknown_pass_and_an_odd_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"head_dim must be even, .* got 7"):
        layer(head_dim=7)
    with pytest.raises(ValueError, match=r"passes must be of forward, forward . backward, got 'backward'"):
        layer(passes=["backward"])
    with pytest.raises(ValueError, match="device 'meta' cannot be used: choose one of cpu"):
        layer(device="meta")


def test_a_table_has_both_attentions_and_how_many_times_slower_softmax_is() -> None:
    sizes = ((2.0, 0.1, 30_000_000), (6.0, None, 50_000_000))
    rows = [
        {"pass": "forward", "seconds": seconds, "spread": spread, "peak_bytes": bytes_}
        for seconds, spread, bytes_ in sizes
    ]
    assert cells(benchmark._layer_table(rows)) == [["forward", "2", "10%", "6", "-", "3.00 x", "30 / 50"]]
