"""Rank, entropy and mixing of a model's attention: python scripts/analyze.py --model DIR --out DIR"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel
from jsonargparse import auto_cli

from mhla_diffusion import MHLADiTTransformer2DModel
from mhla_diffusion.analysis import FILE_NAMES, analyze
from mhla_diffusion.files.writing import require_absent
from mhla_diffusion.hub import component_subfolder


@torch.no_grad()
def main(
    model: str,
    out: str,
    height: int | None = None,
    width: int | None = None,
    timestep: int = 500,
    batch_size: int = 2,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Write report.html and report.json about the attention of an image transformer, on noise.

    Args:
        model: folder or hub id of a DiT, of this project or stock diffusers, or of its pipeline.
        out: folder for the report.
        height: of the latents; the model's own by default.
        width: of the latents; the height by default.
        timestep: 0 to 999.
        batch_size: samples, of random classes.
        seed: of the latents and classes.
        overwrite: replace a report that is already there.
    """
    require_absent([Path(out) / name for name in FILE_NAMES], overwrite=overwrite)
    subfolder = component_subfolder(model, "transformer")
    stored = DiTTransformer2DModel.load_config(model, subfolder=subfolder)["_class_name"]
    classes = (MHLADiTTransformer2DModel, DiTTransformer2DModel)
    model_class = next((c for c in classes if c.__name__ == stored), None)
    if model_class is None:
        raise ValueError(
            f"{model} holds a {stored}; this script knows {', '.join(c.__name__ for c in classes)}"
        )
    dit = model_class.from_pretrained(model, subfolder=subfolder).eval()
    height = height or dit.config.sample_size
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch_size, dit.config.in_channels, height, width or height, generator=generator)
    labels = torch.randint(dit.config.num_embeds_ada_norm, (batch_size,), generator=generator)
    analysis = analyze(
        dit,
        lambda: dit(latents, timestep=torch.full((batch_size,), timestep), class_labels=labels),
        settings={
            "model": model,
            "latents": f"{batch_size} x {height} x {width or height}, noise",
            "timestep": timestep,
            "seed": seed,
        },
    )
    analysis.save(out, overwrite=overwrite)
    logging.info("Report: %s", Path(out) / "report.html")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        auto_cli(main, as_positional=False, allow_abbrev=False)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
