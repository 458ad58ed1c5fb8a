"""What the tests of every room share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Nothing may reach for a hub; set before huggingface_hub is imported.
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml
from torch import Tensor

from tests.extractors import quarters
from tests.processes import free_port

# Relative RMS error that a result in this dtype may have against the float64 reference.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.bfloat16: 1e-2,
    torch.float16: 1e-3,
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def assert_close() -> Callable[..., None]:
    """``assert_close(actual, expected, dtype=None)``: relative RMS error within the dtype's tolerance."""

    def check(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
        assert actual.shape == expected.shape
        difference = (actual.double() - expected.double()).square().mean().sqrt()
        scale = expected.double().square().mean().sqrt()
        assert scale > 0, "an expected value of zero proves nothing"
        error = (difference / scale).item()
        assert error <= TOLERANCE[dtype or actual.dtype], f"relative RMS error {error:.2e}"

    return check


@pytest.fixture
def clip_training(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The config of tests/saved/training-video, of random digits; clips are scored by their colours."""
    from mhla_diffusion.evaluation.networks import videos
    from mhla_diffusion.training.data import toys

    digits = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    monkeypatch.setattr(toys, "load_mnist", lambda: (digits, np.arange(20) % 10))
    monkeypatch.setattr(videos, "_transnetv2", quarters)
    folder = Path(__file__).parent / "saved" / "training-video"
    values = yaml.safe_load((folder / "config.yaml").read_text())
    values["text"]["encoder"] = str(folder / "text")
    return values


@pytest.fixture
def text_parts() -> dict[str, Any]:
    """A tokenizer that knows the lower-case letters and a random text encoder of width 16, as Wan's are."""
    from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(letter, -float(i)) for i, letter in enumerate("\u2581abcdefghijklmnopqrstuvwxyz")]
    config = UMT5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return {
        "tokenizer": T5Tokenizer(vocab=pieces, extra_ids=0),
        "text_encoder": UMT5EncoderModel(config).eval(),
    }


@pytest.fixture
def run_processes() -> Callable[..., None]:
    """``run_processes(function, num_processes, *arguments)``: ``function(rank, *arguments)`` in a gloo group.

    Raises what one of the processes raised.
    """

    def run(function: Callable[..., None], num_processes: int, *arguments: Any) -> None:
        mp.start_processes(
            _in_process,
            (num_processes, free_port(), function, arguments),
            nprocs=num_processes,
            start_method="forkserver",  # that of tests/processes.py, which has imported torch
        )

    return run


def _in_process(
    rank: int, num_processes: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=num_processes)
    try:
        function(rank, *arguments)
    finally:
        dist.destroy_process_group()
