"""Weights of transformers in folders."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor


def weights(folder: str | Path) -> dict[str, Tensor]:
    """Load the weights of the transformer in the folder of a run, of a pipeline, or of its own."""
    places = (Path(folder) / place for place in ("pipeline/transformer", "transformer", ""))
    files = (place / "diffusion_pytorch_model.safetensors" for place in places)
    return load_file(next(file for file in files if file.is_file()))
