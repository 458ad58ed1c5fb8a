"""``mhla analyze``: rank, entropy and mixing of a model's attention."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from ..files.writing import require_absent
from .parsing import parse_and_call


def report(
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
    # Here, as diffusers takes seconds that ``--help`` has no need of.
    import torch
    from diffusers import DiTTransformer2DModel

    from .. import MHLADiTTransformer2DModel
    from ..analysis import FILE_NAMES, analyze
    from ..hub import component_subfolder

    require_absent([Path(out) / name for name in FILE_NAMES], overwrite=overwrite)
    subfolder = component_subfolder(model, "transformer")
    stored = DiTTransformer2DModel.load_config(model, subfolder=subfolder).get(
        "_class_name", "config of no class"
    )
    classes = (MHLADiTTransformer2DModel, DiTTransformer2DModel)
    model_class = next((c for c in classes if c.__name__ == stored), None)
    if model_class is None:
        raise ValueError(
            f"{model} holds a {stored}; this command knows {', '.join(c.__name__ for c in classes)}"
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


def main(arguments: Sequence[str], prog: str) -> None:
    """Write the report."""
    parse_and_call(report, arguments, prog)
