"""``mhla convert``: a stock model, or a checkpoint of the public MHLA code, into an MHLA model.

python scripts/convert.py --model facebook/DiT-XL-2-256 --out DIR [--mhla.blocks 16 --mhla.cpe zero]
python scripts/convert.py --from official-wan-mhla --model CHECKPOINT --out DIR
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ..config import MHLAConfig
from ..files.locking import new_folder
from ..files.writing import write_folder
from .parsing import parse_and_call


def convert(
    model: str,
    out: str,
    mhla: MHLAConfig = MHLAConfig(),  # noqa: B008 (frozen)
    subfolder: str | None = None,
    revision: str | None = None,
    only_transformer: bool = False,
    source: Literal["diffusers", "official-wan-mhla"] = "diffusers",
    normalizer: Literal["none", "official"] = "none",
) -> None:
    """Turn a stock model into an MHLA model, or read a checkpoint of the public MHLA code.

    Args:
        model: folder or hub id of a pipeline whose transformer has an MHLA form; with only_transformer, of
            such a transformer or its pipeline; with ``--from official-wan-mhla`` a file or folder of weights.
        out: a folder that does not exist yet.
        mhla: what the attention becomes, also where the model has MHLA: parts that it has and this does not
            name are left out, with a warning. Not for official-wan-mhla, whose weights say it.
        subfolder: where the model lies in the folder or repository.
        revision: branch, tag or commit on the hub.
        only_transformer: convert the transformer alone, not a pipeline.
        source: what the model is; also written ``--from``.
        normalizer: of official-wan-mhla: official for runs with a denominator.
    """
    # Here, as diffusers takes seconds that ``--help`` has no need of.
    from mhla_diffusion.pipelines.identity import mark_converted
    from mhla_diffusion.pipelines.model_card import CardFields, write_model_card

    from .. import MHLAPipeline
    from ..backbones import convert_to_mhla, load_transformer
    from ..backbones.official import load_official_wan

    place: dict[str, Any] = {"subfolder": subfolder, "revision": revision}
    with new_folder(out) as target:
        if source == "official-wan-mhla":
            converted: Any = load_official_wan(model, normalizer=normalizer)
            use = "MHLAWanTransformer3DModel.from_pretrained opens it"
        else:
            use = "it is a start for fine-tuning"
            if only_transformer:
                converted = convert_to_mhla(load_transformer(model, **place), mhla)
            else:
                converted = MHLAPipeline.from_pretrained(model, mhla_config=mhla, **place)
                mark_converted(converted, model)

        def write(folder: Path) -> None:
            converted.save_pretrained(folder)
            if hasattr(converted, "components"):
                fields = CardFields(base_model=model, converted=True)
                write_model_card(converted, folder, repo_id=target.name, fields=fields)

        write_folder(target, write)
    logging.info("saved %s; %s", out, use)


def main(arguments: Sequence[str], prog: str) -> None:
    """Convert."""
    # "from" is a word of Python, and cannot be a parameter.
    arguments = [re.sub(r"^--from(?==|$)", "--source", argument) for argument in arguments]
    parse_and_call(convert, arguments, prog)
