"""The benchmark of reading clips measures what it says; its times are not tested."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mhla_diffusion.benchmarks import loading as benchmark
from mhla_diffusion.benchmarks.loading import loading
from mhla_diffusion.files.videos import write_video

from .tables import cells


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Three videos with captions."""
    for i in range(3):
        write_video(np.full((8, 32, 48, 3), 80 * i, np.uint8), tmp_path / f"{i}.mp4", fps=8)
    (tmp_path / "captions.csv").write_text("path,caption\n0.mp4,a\n1.mp4,b\n2.mp4,c\n")
    return tmp_path


def test_loading_is_timed_beside_a_plain_loop(clips: Path) -> None:
    rows = cells(loading(clips, frames=4, size=(16, 24), clips=8, num_workers=1, repeats=1))
    assert [row[0] for row in rows] == ["trainer, 1 workers", "plain loop"]
    assert all(float(row[1]) > 0 for row in rows)


def test_rates_are_of_whole_batches(clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "interleaved", lambda *_: [[2.0] * 3, [4.0] * 3])
    rows = cells(loading(clips, frames=4, size=(16, 24), clips=10, num_workers=1))
    assert [row[1] for row in rows] == ["4.0", "2.0"]
