"""A tiny run on images made here, in this process or in one of its own."""

from __future__ import annotations

import functools
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

from tests.processes import run_script

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps its state for the life of a process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def encoder(tmp_path: Path, text_parts: dict[str, Any]) -> str:
    for part in text_parts.values():
        part.save_pretrained(tmp_path / "text")
    return str(tmp_path / "text")


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Two classes, ``cat`` and ``dog``, of 10 gray images each, 10 to 14 pixels wide and 9 high."""
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for number in range(10):
            pixels = generator.integers(0, 256, (9, 10 + number % 5), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "images"


@pytest.fixture
def settings(tmp_path: Path, image_folder: Path) -> dict[str, Any]:
    """The config of a run: 16 tokens, one layer of MHLA, a batch of 8 of 20 images, 6 steps."""
    return {
        "output_dir": str(tmp_path / "run"),
        "model": {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 1,
            "num_layers": 1,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_embeds_ada_norm": 2,
            "mhla": {"blocks": 4, "cpe": "zero", "gate": True},
        },
        "data": {"source": "folder", "path": str(image_folder), "flip": True},
        "trainer": {
            "max_steps": 6,
            "batch_size": 8,
            "max_grad_norm": 1.0,
            "log_every": 1,
            "checkpoint_every": 3,
            "optimizer": {"learning_rate": 0.01, "schedule": "cosine", "warmup_steps": 2},
        },
        "sampling": {"num_inference_steps": 2, "images_per_class": 1},
    }


@pytest.fixture
def write_settings(tmp_path: Path, settings: dict[str, Any]) -> Callable[[], Path]:
    """Writes the settings, as a test changed them, and returns the file."""

    def write() -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(settings))
        return path

    return write


@pytest.fixture
def run(write_settings: Callable[[], Path]) -> Run:
    """Runs a training script to its end."""

    def run(
        *arguments: str, num_processes: int = 1, script: str = "train_image"
    ) -> subprocess.CompletedProcess[str]:
        result = run_script(
            *(script, "--config", write_settings(), *arguments),
            num_processes=num_processes,
            stderr_to_stdout=True,
        )
        shared = num_processes == 1 or f"{num_processes} processes share the work" in result.stdout
        assert shared, result.stdout
        return result

    return run


@pytest.fixture
def run_video(run: Run) -> Run:
    """Runs scripts/train_video.py to its end."""
    return functools.partial(run, script="train_video")


@pytest.fixture
def losses() -> Callable[[Path], list[float]]:
    """The losses that a run logged, in the order of the steps."""

    def losses(output_dir: Path) -> list[float]:
        lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
        return [line["loss"] for line in lines]

    return losses
