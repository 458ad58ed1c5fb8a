"""The benchmark of reading clips measures what it says; its times are not tested."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mhla_diffusion.benchmarks.loading import loading
from mhla_diffusion.files.videos import write_video


def test_loading_is_timed_beside_a_plain_loop(tmp_path: Path) -> None:
    for i in range(3):
        write_video(np.full((8, 32, 48, 3), 80 * i, np.uint8), tmp_path / f"{i}.mp4", fps=8)
    (tmp_path / "captions.csv").write_text("path,caption\n0.mp4,a\n1.mp4,b\n2.mp4,c\n")
    text = loading(tmp_path, frames=4, size=(16, 24), clips=8, num_workers=1, repeats=1)
    rows = [line.strip("| ").split(" | ") for line in text.splitlines()[2:]]
    assert [row[0] for row in rows] == ["trainer, 1 workers", "plain loop"]
    assert all(float(row[1]) > 0 for row in rows)
