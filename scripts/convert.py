"""Turn a stock softmax DiT into an MHLA model, ready for fine-tuning.

python scripts/convert.py --model facebook/DiT-XL-2-256 --out DIR [--mhla.blocks 16 --mhla.cpe zero]
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from diffusers import DiTTransformer2DModel
from jsonargparse import auto_cli

from mhla_diffusion import MHLAConfig, MHLAPipeline, convert_to_mhla
from mhla_diffusion.training.checkpoints import write_atomically


def main(
    model: str,
    out: str,
    mhla: MHLAConfig = MHLAConfig(),  # noqa: B008 (frozen)
    subfolder: str | None = None,
    revision: str | None = None,
    only_transformer: bool = False,
) -> None:
    """Turn a stock softmax DiT into an MHLA model, ready for fine-tuning.

    Args:
        model: folder or hub id of a DiT pipeline; with only_transformer, of a DiT transformer.
        out: a folder that does not exist yet.
        mhla: what the attention becomes.
        subfolder: where the model lies in the folder or repository.
        revision: branch, tag or commit on the hub.
        only_transformer: the source is a transformer alone, not a pipeline.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if Path(out).exists():
        raise ValueError(f"{out} is there already; choose another folder")
    source = {"subfolder": subfolder, "revision": revision}
    if only_transformer:
        stock = DiTTransformer2DModel.from_pretrained(model, **source)
        converted = convert_to_mhla(stock, mhla)
    else:
        converted = MHLAPipeline.from_pretrained(model, mhla_config=mhla, **source)
    write_atomically(Path(out), converted.save_pretrained)
    logging.info(
        "saved %s; it is a start for fine-tuning (scripts/train_image.py --model.init_from %s)", out, out
    )


if __name__ == "__main__":
    try:
        auto_cli(main, as_positional=False, allow_abbrev=False)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
