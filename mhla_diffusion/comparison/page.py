"""Page of a comparison: tables with intervals over seeds, curves and samples, and the records beside it."""

from __future__ import annotations

import contextlib
import itertools
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..attention import MHLA
from ..files.text import markdown_table
from ..files.writing import write_file
from ..intervals import Interval
from .config import Comparison, Run, key_of
from .figures import draw_curves, draw_mixing, draw_samples
from .task import Measure, Task
from .variant import Variant

_TIMED = (
    "Medians of the clock, beside whatever else the machine did during a run: they compare only where that "
    "was the same for all."
)

Records = Sequence[dict[str, Any]]
Screened = Mapping[tuple[str, str], float]


def write_page(
    comparison: Comparison,
    records: Records,
    folder: Path,
    command: str,
    *,
    out: Path | None = None,
    screened: Screened | None = None,
) -> Path:
    """Write ``NAME.md``, ``NAME.json`` and, where runs have them, pictures of curves, mixing and samples.

    What is best is bold where its interval lies apart from those of all others, and nothing is where none
    does.

    Args:
        comparison: whose runs they are.
        records: of :func:`mhla_diffusion.comparison.compare_attention`.
        folder: of the page.
        command: that makes them, as the page tells it.
        out: folder of the runs, with their models and samples.
        screened: what was left out, of :func:`mhla_diffusion.comparison.runs.screened_out`; runs of it that
            there are all the same stand in ``NAME.json`` alone.

    Returns:
        The path of the page.

    Raises:
        ValueError: when another page has that name.
    """
    page, screened = folder / f"{comparison.name}.md", screened or {}
    _require_own(page)
    write_file(page.with_suffix(".json"), json.dumps({"command": command, "runs": records}, indent=1) + "\n")
    shown = [record for record in records if key_of(record) not in screened]
    pictures = _write_pictures(comparison, shown, page, out)
    write_file(page, "\n\n".join(_parts(comparison, shown, command, screened) + pictures) + "\n")
    return page


def _require_own(page: Path) -> None:
    """Check that a page is of a comparison, if it is there."""
    record = page.with_suffix(".json")
    with contextlib.suppress(ValueError):
        if "runs" in json.loads(record.read_text() if record.exists() else "{}"):
            return
    for path in (page, record):
        if path.exists():
            raise ValueError(f"{path} is not of a comparison: choose another name, or other --results")


def _parts(comparison: Comparison, records: Records, command: str, screened: Screened) -> list[str]:
    wanted = len(list(comparison.tasks())) * len(comparison.variants) - len(screened)
    wanted *= len(comparison.seeds)
    devices = ", ".join(sorted({record["device"] for record in records})) or "none"
    titles = "; ".join(
        f"{metric.title.lower()} ({'lower' if metric.lower_is_better else 'higher'} is better)"
        for metric in comparison.task.metrics
    )
    about = " ".join(dict.fromkeys(task.about for task in comparison.tasks()))
    parts = [
        f"# {comparison.name.replace('_', ' ').capitalize()}",
        f"`{command}`, on {devices}. {titles[0].upper()}{titles[1:]}: mean over {len(comparison.seeds)} "
        "seeds, its 95 % interval (Student's), and the standard deviation; bold where the interval of the "
        f"best lies apart from all others. {about}",
        'Runs of a seed have data, noise and, where shapes agree, their start in common. So tables "less" '
        "another variant have the mean difference of runs of a seed, and in brackets its 95 % interval, bold "
        "where that does not hold 0, as it would of alike ones once in twenty times.",
    ]
    if len(records) < wanted:
        parts.append(f"**Incomplete: {len(records)} of {wanted} runs are done.**")
    if len(comparison.task.metrics) == 1 and comparison.settings:
        parts += _grid(comparison, records)
    else:
        for task in comparison.tasks():
            parts += _of_task(comparison, task, records)
    parts += ["## Time", _TIMED, markdown_table(_times(comparison, records))]
    return parts + (_screening(comparison, screened) if screened else [])


def _screening(comparison: Comparison, screened: Screened) -> list[str]:
    """What was left out after a short run, with its number."""
    metric, rows = comparison.task.metrics[0], [["tokens", "", comparison.task.metrics[0].title]]
    for task in comparison.tasks():
        text = json.dumps(task.record, sort_keys=True)
        for variant in comparison.variants:
            if (value := screened.get((text, variant.name))) is not None:
                rows.append([f"{task.tokens:,}", variant.name, f"{value:.{metric.digits}f}"])
    return ["## Screened out", comparison.screen.rule(metric), markdown_table(rows)]


def _grid(comparison: Comparison, records: Records) -> list[str]:
    """Tables of the one metric, a column for each value of the last of the settings."""
    *outer, (column, values) = comparison.settings.items()
    parts, (metric,) = list[str](), comparison.task.metrics
    for fixed in itertools.product(*(choices for _, choices in outer)):
        setting = dict(zip((name for name, _ in outer), fixed, strict=True))
        title = ", ".join(f"{name} {value}" for name, value in setting.items())
        rows = [["", *(_heading(column, value) for value in values)]]
        tasks = [comparison.task.replaced({**setting, column: value}) for value in values]
        columns = [_column(comparison, records, task, metric) for task in tasks]
        for variant in comparison.variants:
            rows.append([variant.name, *(cells[variant.name] for cells in columns)])
        parts += [f"## {title or 'All'}", markdown_table(rows)]
        for value, task in zip(values, tasks, strict=True):
            parts += _differences(comparison, records, task, metric, _heading(column, value))
    return parts


def _heading(name: str, value: Any) -> str:
    return f"{value**2:,} tokens" if name == "side" else f"{name} {value}"


def _of_task(comparison: Comparison, task: Task, records: Records) -> list[str]:
    """Tables of a task: the metrics, and what else its runs have."""
    metrics = task.metrics
    columns = [_column(comparison, records, task, metric) for metric in metrics]
    rows = [["", *(metric.title for metric in metrics)]]
    rows += [[v.name, *(cells[v.name] for cells in columns)] for v in comparison.variants]
    parts = [f"## {task.tokens:,} tokens", markdown_table(rows)]
    for metric in metrics:
        parts += _differences(comparison, records, task, metric, metric.title)
    by_time = {v.name: _values(records, task, v.name, "loss_by_time") for v in comparison.variants}
    if any(by_time.values()):
        head = ["loss, data to noise", *(f"{n / 10:.1f}" for n in range(10))]
        cells = [
            [name, *(f"{statistics.mean(bucket):.3f}" for bucket in zip(*found, strict=True))]
            for name, found in by_time.items()
            if found
        ]
        parts += ["### Loss by time", markdown_table([head, *cells])]
    return parts + _frame_changes(comparison, task, records) + _attention(comparison, task, records)


def _frame_changes(comparison: Comparison, task: Task, records: Records) -> list[str]:
    """Change from frame to frame, of tasks of videos, beside that of held-out clips."""
    names = [variant.name for variant in comparison.variants]
    changes = {name: _values(records, task, name, "frame_change") for name in names}
    real = [value for name in names for value in _values(records, task, name, "real_frame_change")]
    if not real:
        return []
    rows = [[name, Interval.of(values).text(2)] for name, values in changes.items() if values]
    head = ["", "mean absolute difference of consecutive frames, of 255"]
    held_out = ["held-out clips", f"{statistics.mean(real):.2f}"]
    return ["### Change from frame to frame", markdown_table([head, *rows, held_out])]


def _attention(comparison: Comparison, task: Task, records: Records) -> list[str]:
    """Rank and entropy of attention, means over seeds of each layer."""
    rows = list[list[str]]()
    for variant in comparison.variants:
        found = [layers for layers in _values(records, task, variant.name, "attention") if layers]
        if found:
            cells = [
                f"{statistics.mean(layer['rank'] for layer in same):.0f} / "
                f"{statistics.mean(layer['entropy'] for layer in same):.2f}"
                for same in zip(*found, strict=True)
            ]
            rows.append([variant.name, *cells])
    if not rows:
        return []
    head = ["rank / entropy (nats)", *(f"layer {n}" for n in range(max(map(len, rows)) - 1))]
    return ["### Attention", markdown_table([head, *rows])]


def _column(comparison: Comparison, records: Records, task: Task, metric: Measure) -> dict[str, str]:
    """Cells of a column by variant."""
    found = {v.name: _values(records, task, v.name, metric.key) for v in comparison.variants}
    intervals = {name: Interval.of(values) for name, values in found.items() if values}
    cells = dict.fromkeys(found, "")
    for name, interval in intervals.items():
        best = all(
            interval.is_better(other, lower=metric.lower_is_better)
            for key, other in intervals.items()
            if key != name
        )
        text = interval.text(metric.digits)
        bold = best and len(intervals) > 1
        cells[name] = (f"**{text}**" if bold else text) + _missing(comparison, interval)
    return cells


def _differences(
    comparison: Comparison, records: Records, task: Task, metric: Measure, title: str
) -> list[str]:
    """Table of a metric less a reference's of the same seed; nothing where fewer than two seeds have both."""
    if not metric.paired:
        return []
    found = {v.name: _by_seed(records, task, v.name, metric.key) for v in comparison.variants}
    rows = [[f"{title}, less", *comparison.references]]
    for name, own in found.items():
        row = [name]
        for reference in comparison.references:
            others = {} if reference == name else found[reference]
            less = [own[seed] - others[seed] for seed in comparison.seeds if seed in own and seed in others]
            row.append(_difference(comparison, less, metric))
        rows.append(row)
    return [markdown_table(rows)] if any(any(row[1:]) for row in rows[1:]) else []


def _difference(comparison: Comparison, values: list[float], metric: Measure) -> str:
    if len(values) < 2:
        return ""
    interval = Interval.of(values)
    text = interval.difference_text(metric.digits)
    return (text if interval.holds(0) else f"**{text}**") + _missing(comparison, interval)


def _missing(comparison: Comparison, interval: Interval) -> str:
    return f" ({interval.seeds} seeds)" if 1 < interval.seeds < len(comparison.seeds) else ""


def _values(records: Records, task: Task, variant: str, key: str) -> list[Any]:
    return list(_by_seed(records, task, variant, key).values())


def _by_seed(records: Records, task: Task, variant: str, key: str) -> dict[int, Any]:
    wanted = json.loads(json.dumps(task.record))
    return {
        record["seed"]: record[key]
        for record in records
        if record["variant"]["name"] == variant and record["task"] == wanted and key in record
    }


def _times(comparison: Comparison, records: Records) -> list[list[str]]:
    """Median time and most memory of a step, and the parameters."""
    sizes = dict.fromkeys(task.tokens for task in comparison.tasks())
    has_bytes = any("peak_bytes" in record for record in records)
    head = [f"{tokens:,} tokens, ms a step" for tokens in sizes]
    head += [f"{tokens:,} tokens, MiB a step" for tokens in sizes] if has_bytes else []
    rows = [["", *head, "parameters"]]
    for variant in comparison.variants:
        times, bytes_, parameters = (
            [_of_tokens(comparison, records, tokens, variant.name, key) for tokens in sizes]
            for key in ("seconds_per_step", "peak_bytes", "parameters")
        )
        cells = [f"{statistics.median(found) * 1e3:.1f}" if found else "" for found in times]
        if has_bytes:
            cells += [f"{max(found) / 2**20:.0f}" if found else "" for found in bytes_]
        counts = sorted({int(count) for found in parameters for count in found})
        cells.append(" to ".join(f"{count:,}" for count in (counts[:1] + counts[1:][-1:])))
        rows.append([variant.name, *cells])
    return rows


def _of_tokens(comparison: Comparison, records: Records, tokens: int, variant: str, key: str) -> list[Any]:
    """Values of all tasks of a number of tokens."""
    tasks = (task for task in comparison.tasks() if task.tokens == tokens)
    return [value for task in tasks for value in _values(records, task, variant, key)]


def _write_pictures(comparison: Comparison, records: Records, page: Path, out: Path | None) -> list[str]:
    """Write curves and samples beside the page, and return how it shows them."""
    parts = list[str]()
    for number, task in enumerate(comparison.tasks()):
        curves = {v.name: _values(records, task, v.name, "curve") for v in comparison.variants}
        curves = {name: found for name, found in curves.items() if found}
        if curves:
            name = f"{page.stem}-curves-{number}.png"
            write_file(page.with_name(name), draw_curves(curves))
            parts += [
                f"## Training loss, {task.tokens:,} tokens",
                f"![Loss over steps, a line a variant]({name})",
            ]
        mixing = {} if out is None else _mixing(comparison, task, out)
        if mixing:
            name = f"{page.stem}-mixing-{number}.png"
            write_file(page.with_name(name), draw_mixing(mixing))
            parts += [
                f"## Mixing, {task.tokens:,} tokens",
                "How much each block of queries (a row) weighs each block of keys (a column) after training, "
                f"in colours from 0 to the largest weight; seed {comparison.seeds[0]}, means over heads.",
                f"![Mixing matrices, a row a variant, a column a layer]({name})",
            ]
        sheets = {} if out is None else _sheets(comparison, task, out)
        if sheets:
            name = f"{page.stem}-samples-{number}.png"
            write_file(page.with_name(name), draw_samples(sheets))
            shown = f"![Samples of the same seeds, a row a variant]({name})"
            parts += [
                f"## Samples, {task.tokens:,} tokens",
                f"Seed {comparison.seeds[0]}, the same noise.",
                shown,
            ]
    return parts


def _first_runs(comparison: Comparison, task: Task, out: Path) -> Iterator[tuple[Variant, Path]]:
    """Variants, and the folders of their runs of the first seed."""
    for variant in comparison.variants:
        yield variant, (out / Run(task, variant, comparison.seeds[0]).path).with_suffix("")


def _sheets(comparison: Comparison, task: Task, out: Path) -> dict[str, Path]:
    """Sheets of the first seed, by variant."""
    paths = {variant.name: folder / "sheet.png" for variant, folder in _first_runs(comparison, task, out)}
    return {name: path for name, path in paths.items() if path.is_file()}


def _mixing(comparison: Comparison, task: Task, out: Path) -> dict[str, dict[str, Tensor]]:
    """Mixing matrices ``[M, M]`` of the first seed, means over heads, by variant and layer."""
    found = {}
    for variant, folder in _first_runs(comparison, task, out):
        # Of runs that are done, and linear attention and softmax have none.
        if variant.attention == "mhla" and folder.with_suffix(".json").is_file():
            found[variant.name] = _mixing_of(task.trained(variant, folder))
    return {name: layers for name, layers in found.items() if layers}


def _mixing_of(model: Any) -> dict[str, Tensor]:
    """Mixing matrices of a model, by the number of the layer, the first in its name."""
    found = dict[str, Tensor]()
    for name, module in () if model is None else model.named_modules():
        if isinstance(module, MHLA) and module.mixing is not None:
            matrix = module.mixing_matrix().detach()
            number = next(part for part in name.split(".") if part.isdigit())
            found[f"layer {number}"] = matrix if matrix.ndim == 2 else matrix.mean(0)
    return found
