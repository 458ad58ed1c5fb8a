"""``mhla card``: the model card of a saved pipeline, with what only its author knows.

mhla card --model runs/a/pipeline --report runs/a/report --picture runs/a/grid.png --license apache-2.0
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..files.writing import write_file
from .parsing import parse_and_call

if TYPE_CHECKING:
    from mhla_diffusion.pipelines.model_card import Result


def card(
    model: str,
    report: str | None = None,
    picture: str | None = None,
    license: str | None = None,
    base_model: str | None = None,
    datasets: tuple[str, ...] = (),
    converted: bool = False,
    name: str | None = None,
) -> None:
    """Write README.md of a saved pipeline again, fit to publish; one that somebody edited is refused.

    Args:
        model: folder of the pipeline.
        report: folder of mhla evaluate, whose scores are shown, and listed for the hub.
        picture: PNG file with samples, which is copied there.
        license: as the hub names it, such as apache-2.0.
        base_model: hub id of the model that this one was made of.
        datasets: hub ids of the data.
        converted: whether it was converted and not trained since.
        name: that it is published under, such as someone/digits.
    """
    # Here, as diffusers takes seconds that ``--help`` has no need of.
    from mhla_diffusion.pipelines.model_card import PICTURE, CardFields, is_edited, write_model_card

    from .. import MHLAPipeline
    from ..hub import require_stored

    folder = Path(model)
    require_stored(model)
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{model} is no folder of a pipeline (it has no model_index.json)")
    readme = folder / "README.md"
    if is_edited(readme):
        raise ValueError(f"{readme} was edited, and is not written again: move it away first")
    if report is None and readme.is_file() and "\n## Scores\n" in readme.read_text("utf-8"):
        logging.warning("%s had scores, which are left out: give their --report again", readme)
    scores, results = (None, ()) if report is None else _read_scores(Path(report))
    if picture is not None:
        if Path(picture).suffix.lower() != ".png" or not Path(picture).is_file():
            raise ValueError(f"{picture} is no PNG file: give one, such as mhla generate --grid writes")
        write_file(folder / PICTURE, partial(shutil.copyfile, picture))
    fields = CardFields(
        scores=scores, results=results, base_model=base_model, license=license, datasets=datasets,
        converted=converted,
    )  # fmt: skip
    pipeline = MHLAPipeline.from_pretrained(model)
    write_model_card(pipeline, folder, repo_id=name or folder.resolve().name, fields=fields)
    logging.info("Card: %s", readme)


def _read_scores(report: Path) -> tuple[str, tuple[Result, ...]]:
    """Read the table of a report, and its scores one by one."""
    from mhla_diffusion.pipelines.model_card import Result

    from ..evaluation.pages.runs import load_run

    path = report / "report.md"
    if not path.is_file():
        raise ValueError(f"{report} holds no report of mhla evaluate (report.md)")
    run = load_run(report, report.name)
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
