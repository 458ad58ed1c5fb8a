"""Report of a conversion: the teacher, and students plain, aligned and distilled, on one page and as JSON.

Models are measured one after the other, and what is measured is kept, so that the same call goes on.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm.auto import tqdm

from mhla_diffusion.pipelines import MHLAPipeline

from ..arguments import require_seed
from ..backbones import convert_to_mhla, load_transformer
from ..backbones.teacher import as_teacher, fingerprint, load_teacher
from ..config import MHLAConfig
from ..files.locking import only_writer
from ..files.pages import render
from ..files.sums import short_hash
from ..files.writing import write_file
from ..hub import expert_times
from ..planning import Plan
from ..processes import in_first_process, one_fate, process_state
from ..scoring import size_beside_config
from ..training.export import is_run
from .calls import TIME_BUCKETS, Calls, DataCalls, fresh_numbers, open_calls
from .choose import RECORD as CHOICE
from .choose import kinds_of
from .knapsack import STOCK
from .measures import branch_errors, by_time, losses, pictures, ratio, speed, training_hours
from .scores import fingerprint_of_real, scores
from .trial import prediction_error

logger = logging.getLogger(__name__)

FILE_NAMES = ("report.json", "report.html")
# When the trainer draws samples: these are drawn once.
_NOT_DRAWN = ("every", "max_share")
# Raised when something else is measured: what was kept is then measured anew.
_MEASURES = 2


@dataclass(frozen=True)
class ReportConfig:
    """Settings of a report.

    Args:
        calls: of each model in each tenth of the time.
        real: images or videos to score against, see ``mhla evaluate``; no scores by default.
        num_samples: to generate for scores, 2 or more.
        samples: whether to draw the run's sample sheet with every model.
        seed: of calls.

    Raises:
        ValueError: for fewer than 1 call, or scores of no samples or of one.
    """

    calls: int = 8
    real: str | None = None
    num_samples: int = 0
    samples: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.calls < 1:
            raise ValueError(f"calls must be 1 or more, got {self.calls}")
        if (self.real is None) != (self.num_samples < 1):
            raise ValueError(
                f"scores need real and num_samples, got real {self.real} and num_samples {self.num_samples}"
            )
        if self.num_samples == 1:
            raise ValueError("num_samples must be 2 or more, as one sample has no covariance, got 1")
        require_seed(self.seed)


@dataclass(frozen=True)
class Entry:
    """Model in a report.

    Args:
        name: what the page calls it.
        stage: ``teacher``, ``plain``, ``aligned``, ``distilled``; of what no choice led to ``converted``, and
            of a training run without a teacher ``trained``.
        load: gives the transformer.
        choice: choice.json of its layers, if it has one.
        hours: of the stage, on the machine that it ran on.
        source: what it was read from, by which it is known again.
        guided: whether guidance was distilled into it, so that it is sampled without.
    """

    name: str
    stage: str
    load: Callable[[], Any]
    choice: Mapping[str, Any] | None = None
    hours: float = 0.0
    source: str = ""
    guided: bool = False


@one_fate()
def report(
    teacher: str,
    students: Sequence[str],
    data: str,
    out: str | Path,
    *,
    size: Plan | None = None,
    config: ReportConfig | None = None,
    grid: tuple[int, ...] | None = None,
    component: str = "transformer",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Measure a teacher and its students, and write report.json and report.html, in the first process alone.

    Others would be in the way of speed.

    Args:
        teacher: folder or hub id.
        students: folders of mhla choose, or of training runs; at least one.
        data, grid: as for :func:`open_calls`; without a training run there are no losses and no samples.
        out: folder.
        size: what speed and memory are measured at; none by default.
        config: see :class:`ReportConfig`.
        component: of the pipeline.
        dtype: of the models, that of the alignment: the teacher is known by its weights in it.

    Returns:
        The content of report.json.

    Raises:
        ValueError: for no students, folders that hold no model, students of another teacher or given twice,
            nothing to score against, and an ``out`` that another process writes to.
    """
    config, out = config or ReportConfig(), Path(out)
    paths = [_located(Path(student)) for student in students]
    named = dict(zip(_names(paths), paths, strict=True))

    def measure() -> dict[str, Any]:
        with only_writer(out):
            model = load_teacher(teacher, component=component, dtype=dtype, device=process_state().device)
            times = expert_times(teacher, component)
            calls = open_calls(model, data, seed=config.seed, grid=grid, times=times)
            entries = [Entry("teacher", "teacher", lambda: model, source=teacher)]
            for name, path in named.items():
                entries += _entries(path, name, model, component)
            pipeline = partial(MHLAPipeline.from_pretrained, teacher)
            found = _measures(entries, model, calls, out, pipeline=pipeline, size=size, config=config)
            content = _content(teacher, entries, found, calls, size, config)
            write_file(out / FILE_NAMES[0], json.dumps(content, indent=2))
            sheets = {name: measured.get("pictures", []) for name, measured in found.items()}
            write_file(out / FILE_NAMES[1], _page(content, sheets))
        logger.info("Report: %s", out / FILE_NAMES[1])
        return content

    return in_first_process(measure)


def _measures(
    entries: Sequence[Entry],
    teacher: Any,
    calls: Calls,
    out: Path,
    *,
    size: Plan | None,
    config: ReportConfig,
    pipeline: Callable[..., Any],
) -> dict[str, dict[str, Any]]:
    """Measure what is not kept in a folder yet; returns all measures by the names of the models."""
    made_with, found = _sampling_facts(calls, config), dict[str, dict[str, Any]]()
    for entry in tqdm(entries, desc="models", disable=None):
        key = _key(entry, teacher, [calls.facts, asdict(config), *made_with], size)
        kept = out / "measures" / f"{key}.json"
        if not kept.is_file():
            generated = out / "generated" / key
            measured = _measure(
                entry, teacher, calls, pipeline=pipeline, generated=generated, size=size, config=config
            )
            write_file(kept, json.dumps(measured))
        found[entry.name] = json.loads(kept.read_text())
    return found


def _names(students: Sequence[Path]) -> list[str]:
    """What the page calls the models of folders: the last parts of their paths, as many as tell all apart."""
    parts = [Path(os.path.abspath(path)).parts for path in students]  # links keep their names
    for count in range(1, 1 + max(map(len, parts), default=0)):
        names = ["/".join(part[-count:]) for part in parts]
        if len({"teacher", *names}) > len(names):
            return names
    given = ", ".join(map(str, students)) or "none"
    raise ValueError(f"students must be different folders, at least one, got {given}")


def _located(path: Path) -> Path:
    """The folder of a student or of a training run, which may be given by its pipeline."""
    if not path.is_dir():
        raise ValueError(f"students are folders of mhla choose or of training runs, and {path} is no folder")
    if path.name == "pipeline" and is_run(path.parent):
        return path.parent
    if is_run(path) or any((path / name).is_file() for name in ("model_index.json", "config.json")):
        return path
    inside = [str(path / name) for name in ("student", "distilled", "pipeline") if (path / name).is_dir()]
    raise ValueError(
        f"{path} holds no model, and is no training run"
        + (f": students of it are [{', '.join(inside)}]" if inside else "")
    )


def require_scores(calls: Calls, config: ReportConfig) -> str | None:
    """Check that what models are scored against is there, and return its fingerprint; None without scores.

    Raises:
        ValueError: when it is not, or the calls are of no training run.
    """
    if config.real is None:
        return None
    if not isinstance(calls, DataCalls):
        raise ValueError("scores need the settings of a training run: give its YAML as data")
    return fingerprint_of_real(config.real, calls.config)


def _sampling_facts(calls: Calls, config: ReportConfig) -> list[Any]:
    """What generated samples and their scores depend on, beside the models."""
    against = require_scores(calls, config)
    if not isinstance(calls, DataCalls) or not (config.samples or against):
        return []
    sampling = asdict(calls.config.sampling)
    drawn = {key: value for key, value in sampling.items() if key not in _NOT_DRAWN}
    return [drawn, against, *size_beside_config(calls.config)]


def _entries(path: Path, name: str, teacher: Any, component: str) -> list[Entry]:
    """The models that a folder stands for: a student and its plain conversion, or one that was trained."""
    run = is_run(path)
    folder, source, stage, guided = path, path, "trained", False
    if run:
        folder = path / "pipeline"
        if not folder.is_dir():
            raise ValueError(
                f"{path} is a training run without a pipeline: mhla export-checkpoint writes one"
            )
        settings = yaml.safe_load((path / "config.yaml").read_text())
        source = Path(settings["model"].get("init_from") or "")
        taught_by = settings.get("objective", {}).get("teacher")
        if taught_by is not None:
            stage = "distilled"
            guided = settings["objective"].get("distillation", {}).get("guidance_scale", 1.0) > 1
            _require_teacher(path, taught_by, teacher, component)
    choice = json.loads((source / CHOICE).read_text()) if (source / CHOICE).is_file() else None
    if choice is not None and choice["teacher"] != fingerprint(teacher):
        raise ValueError(
            f"{source} was made of another teacher than this, or of this in another dtype than "
            f"{teacher.dtype}"
        )

    def load() -> Any:
        stored = load_transformer(str(folder), component=component, dtype=teacher.dtype)
        return stored.eval().requires_grad_(False)

    if run:
        return [Entry(name, stage, load, choice, training_hours(path), str(path), guided)]
    if choice is None:
        return [Entry(name, "converted", load, None, 0.0, str(path))]
    hours = choice["align_seconds"] / 3600
    return [
        Entry(f"{name}, plain", "plain", lambda: plain(teacher, choice), choice, 0.0, str(path)),
        Entry(name, "aligned", load, choice, hours, str(path)),
    ]


def _require_teacher(run: Path, taught_by: str, teacher: Any, component: str) -> None:
    """Check whom a run was distilled from, if that can still be opened from here."""
    try:
        its = load_teacher(taught_by, component=component, dtype=teacher.dtype)
    except (OSError, ValueError) as error:
        logger.warning("%s: its teacher %s cannot be compared with this one: %s", run, taught_by, error)
        return
    if fingerprint(its) != fingerprint(teacher):
        raise ValueError(f"{run} was distilled from {taught_by}, which is another teacher than this")


def plain(teacher: Any, choice: Mapping[str, Any]) -> Any:
    """Return the conversion with a choice's forms whose layers were not aligned."""
    forms = choice["chosen"]["forms"]
    configs = [MHLAConfig.from_dict(choice["candidates"].get(form, {})) for form in forms]
    return convert_to_mhla(teacher, configs, attention=kinds_of(teacher, forms)).eval()


def _key(entry: Entry, teacher: Any, settings: list[Any], size: Plan | None) -> str:
    """Name under which measures are kept: of all that they depend on."""
    weights = (
        fingerprint(entry.load()) if entry.stage != "plain" else json.dumps(entry.choice, sort_keys=True)
    )
    facts = [
        _MEASURES, entry.stage, entry.source, weights, fingerprint(teacher), *settings,
        None if size is None else list(size.layout.grid), *(["guided"] if entry.guided else []),
    ]  # fmt: skip
    return short_hash(facts)


def _measure(
    entry: Entry,
    teacher: Any,
    calls: Calls,
    *,
    pipeline: Callable[[], Any],
    generated: Path,
    size: Plan | None,
    config: ReportConfig,
) -> dict[str, Any]:
    """Everything that is measured of one model, in the teacher's pipeline where that is asked for."""
    model = entry.load().to(teacher.device)
    if entry.stage == "teacher":
        model = as_teacher(model)
    numbers = fresh_numbers(config.calls)
    few = numbers[: TIME_BUCKETS * min(config.calls, 2)]
    found: dict[str, Any] = {
        "attention": model.layer_attention,
        "prediction_error": prediction_error(teacher, model, calls, few),
        "branches": branch_errors(model, teacher, calls, few),
    }
    if size is not None:
        found["speed"] = speed(model, teacher, size.layout.grid)
    if not isinstance(calls, DataCalls):
        return found
    found["losses"] = losses(model, calls, numbers)
    sampling = calls.config.sampling
    if entry.guided:
        sampling = replace(sampling, guidance_scale=1.0)
    if config.samples and sampling.rows():
        task = replace(calls.task, sampling=sampling)
        found["pictures"] = pictures(model, task, playing=len(model.default_grid) == 3)
    if config.real is not None:
        made_by = pipeline()
        made_by.register_modules(transformer=model)
        run = replace(calls.config, sampling=sampling)
        found["scores"] = scores(made_by, config.real, generated, run, config.num_samples)
    return found


def _content(
    teacher: str,
    entries: Sequence[Entry],
    found: Mapping[str, Mapping[str, Any]],
    calls: Calls,
    size: Plan | None,
    config: ReportConfig,
) -> dict[str, Any]:
    """The content of report.json."""
    numbers = fresh_numbers(config.calls)
    models = []
    for entry in entries:
        measured = {key: value for key, value in found[entry.name].items() if key != "pictures"}
        if values := measured.pop("losses", None):
            measured["loss"] = sum(values) / len(values)
            measured["loss_by_time"] = by_time(values, numbers)
            measured["loss_ratio"] = ratio(values, found["teacher"]["losses"])
        chosen = entry.choice["chosen"] if entry.choice is not None else {}
        models.append(
            {
                "name": entry.name, "stage": entry.stage, "hours": entry.hours,
                "cost": chosen.get("cost", 1.0 if entry.stage == "teacher" else None), **measured,
            }
        )  # fmt: skip
    choices = {
        entry.name: {
            key: entry.choice[key]
            for key in ("chosen", "errors", "curve", "check", "budget", "cost_by", "size")
        }
        for entry in entries
        if entry.choice is not None and entry.stage == "aligned"
    }
    return {
        "teacher": teacher, "calls": calls.facts, "times": list(calls.times), "settings": asdict(config),
        "size": None if size is None else size.size, "models": models, "choices": choices,
    }  # fmt: skip


def _page(content: Mapping[str, Any], sheets: Mapping[str, Sequence[str]]) -> str:
    """The content of report.html, which needs no other file and no network."""
    shown = {name: rows for name, rows in sheets.items() if rows}
    return render(__package__, "report.html", report=content, sheets=shown, stock=STOCK, curve=_curve)


def _curve(choice: Mapping[str, Any]) -> dict[str, Any]:
    """Points of error against cost for an SVG of 420 x 200, and the chosen one."""
    points = choice["curve"]
    most = max(point["error"] for point in points) or 1

    def on_page(point: Mapping[str, Any]) -> tuple[float, float]:
        return round(10 + 400 * min(1.0, point["cost"]), 1), round(190 - 180 * point["error"] / most, 1)

    line = " ".join(f"{x},{y}" for x, y in map(on_page, points))
    return {"line": line, "chosen": on_page(choice["chosen"]), "most": most}
