"""``mhla card``: the model card of a saved pipeline, with what only its author knows.

mhla card --model runs/a/pipeline --report runs/a/report --picture runs/a/grid.png --license apache-2.0
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files.writing import write_file
from .parsing import parse_and_call

if TYPE_CHECKING:
    from mhla_diffusion.pipelines.model_card import Result

    from ..evaluation.pages.runs import Run


_HUB_ID = r"(\w[\w.-]*/)?\w[\w.-]*"


def card(
    model: str,
    report: str | None = None,
    picture: str | None = None,
    license: str | None = None,
    base_model: str | None = None,
    datasets: tuple[str, ...] = (),
    converted: bool | None = None,
    name: str | None = None,
) -> None:
    """Write README.md of a saved pipeline again, fit to publish; one that somebody edited is refused.

    Licence, base model, data and whether it was converted, where not given, are what that README.md says.

    Args:
        model: folder of the pipeline.
        report: folder of mhla evaluate, whose scores are shown, and listed for the hub; of samples of this
            pipeline.
        picture: PNG file with samples, which is copied there.
        license: as the hub names it, such as apache-2.0.
        base_model: hub id of the model that this one was made of.
        datasets: hub ids of the data.
        converted: whether it was converted and not trained since.
        name: that it is published under, such as someone/digits.
    """
    # Here, as diffusers takes seconds that ``--help`` has no need of.
    from mhla_diffusion.pipelines import model_card
    from mhla_diffusion.pipelines.identity import training_of

    from .. import MHLAPipeline
    from ..hub import require_stored

    folder = Path(model)
    require_stored(model)
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{model} is no folder of a pipeline (it has no model_index.json)")
    readme = folder / "README.md"
    if model_card.is_edited(readme):
        raise ValueError(f"{readme} was edited, and is not written again: move it away first")
    if report is None and readme.is_file() and "\n## Scores\n" in readme.read_text("utf-8"):
        logging.warning("%s had scores, which are left out: give their --report again", readme)
    _require_hub_ids(license, base_model, datasets, name)
    if picture is not None:
        _require_png(Path(picture))
    pipeline = MHLAPipeline.from_pretrained(model)
    known, trained = model_card.stored_fields(readme), "trained" in training_of(pipeline, folder)
    if converted and trained:
        raise ValueError(
            f"{model} was trained since it was converted, by what it says: leave --converted out"
        )
    scores, results = (None, ()) if report is None else _read_scores(Path(report), pipeline, model)
    if picture is not None:
        write_file(folder / model_card.PICTURE, partial(shutil.copyfile, picture))
    fields = model_card.CardFields(
        scores=scores, results=results, base_model=base_model or known.base_model,
        license=license or known.license, datasets=datasets or known.datasets,
        converted=known.converted and not trained if converted is None else converted,
    )  # fmt: skip
    model_card.write_model_card(pipeline, folder, repo_id=name or folder.resolve().name, fields=fields)
    logging.info("Card: %s", readme)


def _require_hub_ids(
    license: str | None, base_model: str | None, datasets: Sequence[str], name: str | None
) -> None:
    """Check what the hub would refuse, or a card leave out without a word."""
    from mhla_diffusion.pipelines.model_card import is_hub_id

    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise ValueError(f"license must be a name of the hub, such as apache-2.0, got {license!r}")
    if base_model is not None and not is_hub_id(base_model):
        raise ValueError(
            f"base_model must be a hub id, such as someone/model, and no folder here, got {base_model!r}"
        )
    if name is not None and not re.fullmatch(_HUB_ID, name):
        raise ValueError(f"name must be a hub id, such as someone/digits, got {name!r}")
    for data in datasets:
        if not re.fullmatch(_HUB_ID, data):
            raise ValueError(f"datasets must be hub ids, such as someone/photos, got {data!r}")


def _require_png(path: Path) -> None:
    from ..files.pictures import DECODING_ERRORS, open_picture

    try:
        with open_picture(path) as image:
            image.load()
            kind = image.format
    except DECODING_ERRORS as error:
        raise ValueError(f"{path} is no picture that can be read ({error}): give a PNG file") from error
    if kind != "PNG":
        raise ValueError(
            f"{path} is of the format {kind}: give a PNG file, such as mhla generate --grid writes"
        )


def _require_its_samples(run: Run, pipeline: Any, model: str) -> None:
    """Check that a report is of samples that the pipeline has made, as far as it says of which they are."""
    import torch

    from mhla_diffusion.pipelines.identity import transformers_of, weights_sha256

    from ..backbones import load_transformer

    if run.weights is None:
        logging.warning("%s does not say what made its samples: whether %s did, is for you to know",
                        run.name, model)  # fmt: skip
        return
    name, transformer = next(iter(transformers_of(pipeline).items()))
    dtype = getattr(torch, run.dtype or "", None)
    if dtype not in (None, transformer.dtype):
        transformer = load_transformer(model, component=name, dtype=dtype)
    found = weights_sha256(transformer)
    if found != run.weights:
        raise ValueError(
            f"{run.name} has scores of samples that another model made: its weights have the SHA-256 "
            f"{run.weights[:12]}, those of {model} {found[:12]}. Give a report of what this one generates"
        )


def _read_scores(report: Path, pipeline: Any, model: str) -> tuple[str, tuple[Result, ...]]:
    """Read the table of a report on samples of the pipeline, and its scores one by one."""
    from mhla_diffusion.pipelines.model_card import Result

    from ..evaluation.pages.runs import load_run

    path = report / "report.md"
    if not path.is_file():
        raise ValueError(f"{report} holds no report of mhla evaluate (report.md)")
    run = load_run(report, report.name)
    _require_its_samples(run, pipeline, model)
    results = [
        Result(
            score.name, score.metric or score.name, score.value, data=Path(run.real).name,
            facts={f"{name} samples": count for name, count in run.counts.items() if count is not None}
            | ({} if score.interval is None else {"interval of 95 %": list(score.interval)}),
        )
        for score in run.scores.values()
    ]  # fmt: skip
    return path.read_text("utf-8").strip(), tuple(results)


def main(arguments: Sequence[str], prog: str) -> None:
    """Write the card."""
    parse_and_call(card, arguments, prog)
