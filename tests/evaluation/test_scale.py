"""Many samples in little memory, and several processes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mhla_diffusion.evaluation.sets.images import open_images
from tests.processes import run_script


def test_two_processes_find_the_scores_of_one(
    make_pixels: Callable[..., np.ndarray], write_folder: Callable[..., Path], tmp_path: Path
) -> None:
    real, generated = write_folder("real", make_pixels(19)), write_folder("made", make_pixels(14, seed=1))
    (real / "0004.png").write_text("no image")
    arguments = [
        *("image", "--real", real, "--generated", generated, "--extractor", "efficientnet_lite0"),
        *("--batch_size", "4", "--max_skipped", "0.2", "--out"),
    ]
    pair = run_script("evaluate", *arguments, tmp_path / "two", num_processes=2)
    assert pair.returncode == 0, pair.stderr
    assert "2 processes share the work" in pair.stderr
    alone = run_script("evaluate", *arguments, tmp_path / "one")
    assert alone.returncode == 0, alone.stderr
    scores, fingerprints = [], []
    for name in ("one", "two"):
        content = json.loads((tmp_path / name / "report.json").read_text())
        assert content["real"]["count"] == 18
        scores.append({score["name"]: score["value"] for score in content["scores"]})
        fingerprints.append([content[side]["fingerprint"] for side in ("real", "generated")])
    assert len(scores[0]) == 6
    assert scores[1] == pytest.approx(scores[0], rel=1e-9)
    assert fingerprints[0] == fingerprints[1]


FLAT = """
import resource, sys
import numpy as np
from mhla_diffusion.evaluation import FeatureExtractor, evaluate_images, evaluate_videos
path, count = sys.argv[1], int(sys.argv[2])
draw = np.random.default_rng(0).integers
flat = lambda pixels: np.resize(pixels, 768).astype(np.float32)
extractor = FeatureExtractor("flat", "fd_flat", 768, flat, lambda x: x, "none", "none", "none", "0" * 64)
settings = {"extractor": extractor, "metrics": "frechet", "bootstrap": 0, "batch_size": 256}
"""

IMAGES = """
np.savez(path, arr_0=draw(0, 256, (count, 8, 8, 3), dtype=np.uint8))
evaluate_images(path, path, **settings)
"""

VIDEOS = """
shape = (4, 32, 32, 3)
with open(path, "wb") as file:  # without ever mapping or holding it all
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
    np.lib.format.write_array_header_1_0(file, header)
    for _ in range(count):
        file.write(draw(0, 256, shape, dtype=np.uint8).tobytes())
evaluate_videos(path, path, frames=4, **settings)
"""


@pytest.mark.parametrize(("code", "suffix"), [(IMAGES, "npz"), (VIDEOS, "npy")], ids=["images", "videos"])
def test_memory_does_not_grow_with_the_number_of_samples(code: str, suffix: str, tmp_path: Path) -> None:
    """Ten times the samples, in a process of their own, may cost what their names and hashes take."""
    peaks = []
    for count in (1_000, 10_000):
        lines = FLAT + code + "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        result = subprocess.run(
            [sys.executable, "-c", lines, str(tmp_path / f"{count}.{suffix}"), str(count)],
            capture_output=True, text=True, check=True, timeout=300,
        )  # fmt: skip
        peaks.append(int(result.stdout.split()[-1]) / 1024)
    # In memory the features of both sets would take 55 MiB more, the videos 105.
    assert peaks[1] - peaks[0] < 40


PHOTOS = """
import os, pathlib, resource, sys
import numpy as np
from PIL import Image
from mhla_diffusion.evaluation import FeatureExtractor, evaluate_images
folder = pathlib.Path(sys.argv[1])
for index in range(2):
    Image.new("RGB", (6000, 4000), (index, 0, 0)).save(folder / f"{index}.png", compress_level=1)
for index in range(2, 12):
    os.link(folder / f"{index % 2}.png", folder / f"{index}.png")
first = lambda x: x[:, :2, :2, 0].flatten(1).float()
extractor = FeatureExtractor("all", "fd_all", 4, lambda x: x, first, "none", "none", "none", "0" * 64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
evaluate_images(folder, folder, extractor=extractor, metrics="frechet", bootstrap=0, batch_size=12)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_batches_of_large_photos_are_cut_by_their_size(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", PHOTOS, str(tmp_path)], capture_output=True, text=True, check=True, timeout=300
    )
    # A batch of all is 824 MiB, twice that with its copies, and as much again of the next.
    assert float(result.stdout.split()[-1]) < 1300


@pytest.mark.parametrize("listed", [False, True], ids=["folder", "manifest"])
def test_listing_files_takes_as_long_as_they_are_many(tmp_path: Path, listed: bool) -> None:
    def seconds(shards: int) -> float:
        folder = tmp_path / str(shards)
        rows = [
            {"file": f"class{shard}/{index}.png", "class_id": shard}
            for shard in range(shards)
            for index in range(200)
        ]
        for shard in range(shards):
            (folder / f"class{shard}").mkdir(parents=True)
        for row in rows:
            (folder / row["file"]).touch()
        if listed:
            (folder / "manifest.json").write_text(json.dumps({"images": rows}))
        start = time.process_time()
        assert len(open_images(folder).names) == 200 * shards
        return time.process_time() - start

    seconds(1)  # what is imported and kept at first
    assert seconds(100) < 100 * seconds(5)  # 20 times as long; 400 times if each looked at all others
