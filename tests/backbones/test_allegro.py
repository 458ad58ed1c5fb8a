"""Allegro with MHLA: the positions of its pipeline, and grids whose sides differ."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import AllegroPipeline

from .cases import CASES


@pytest.mark.parametrize("scales", [(1.0, 1.0, 1.0), (1.5, 2.0, 3.0)], ids=str)
def test_positions_are_those_of_the_pipeline(scales: tuple[float, float, float]) -> None:
    names = ("interpolation_scale_t", "interpolation_scale_h", "interpolation_scale_w")
    model = CASES["Allegro"].make(**dict(zip(names, scales, strict=True)))
    frames, height, width = 3, 4, 6
    pipeline = SimpleNamespace(vae_scale_factor_spatial=8, transformer=model)
    pixels = height * 8 * model.config.patch_size, width * 8 * model.config.patch_size
    expected = AllegroPipeline._prepare_rotary_positional_embeddings(pipeline, 1, *pixels, frames, "cpu")
    found = model.example_inputs((frames, height, width))["image_rotary_emb"]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_blocks_lie_on_the_grid_of_the_config() -> None:
    sizes = {"sample_height": 4, "sample_width": 16}
    model = CASES["Allegro"].make(mhla={"blocks": [1, 1, 4]}, **sizes)
    assert model.default_grid == (3, 2, 8)
    assert model.mixing_blocks == (1, 1, 4)
    with pytest.raises(ValueError, match=r"axis 1 of grid \(3, 2, 8\) has 2 tokens"):
        CASES["Allegro"].make(mhla={"blocks": [1, 4, 1]}, **sizes)
