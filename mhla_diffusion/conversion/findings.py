"""Findings of the experiment: tables of it, and what was wished of conversion beside what is true."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ..files.text import markdown_table
from ..intervals import Interval

Record = Mapping[str, Any]
_Rows = Mapping[str, Sequence[Record]]
_Losses = Mapping[str, Sequence[float]]

# Variants of which something is wished, and the most that they may add to the loss, over the teacher's.
_HALVES = {
    "half, chosen": "half of the layers",
    "half, chosen, wide": "half of the layers, with a wide window",
}
_WHOLES = {"all local": "all layers with a window", "all wide": "all layers with a wide window"}
_MOST = {**dict.fromkeys(_HALVES, 0.01), **dict.fromkeys(_WHOLES, 0.03)}


def findings(content: Record) -> dict[str, Any]:
    """Return what was wished: ``value``, mean over seeds, ``interval``, ``seeds``, each one's, and ``met``.

    Losses are over the teacher's, less 1. A difference or share of them is taken within each seed, whose
    variants saw the same samples, times and noise. The interval decides: ``met`` where all of it is on the
    wished side of the limit, not where none is, and None, open, where it holds the limit, or of one seed.
    Wishes of variants that have not run are left out.

    Args:
        content: of results.json.
    """
    rows = _by_variant(content)
    losses = {
        name: [its["ratio"]["value"] - 1 for its in records]
        for name, records in rows.items()
        if name != "teacher"
    }
    found = {
        f"{name}: loss within {_MOST[variant]:.0%}": _finding(losses[variant], most=_MOST[variant])
        for variant, name in (_HALVES | _WHOLES).items()
        if variant in rows
    }
    return found | _forms(losses) | _patterns(losses) | _alignment(rows, losses) | _scored(rows)


def _less(losses: _Losses, variant: str, other: str) -> list[float]:
    return [b - a for a, b in zip(losses[variant], losses[other], strict=True)]


def _forms(losses: _Losses) -> dict[str, Any]:
    """Whether MHLA is ahead of linear attention."""
    if not {"all MHLA", "all linear"} <= set(losses):
        return {}
    spread = max(max(losses[name]) - min(losses[name]) for name in ("all MHLA", "all linear"))
    name = "all layers: loss of linear attention less MHLA's, above the spread"
    return {name: _finding(_less(losses, "all MHLA", "all linear"), least=spread)}


def _patterns(losses: _Losses) -> dict[str, Any]:
    """Whether layers that were chosen are ahead of a pattern."""
    return {
        f"chosen layers: loss of {pattern} less theirs": _finding(
            _less(losses, "half, chosen", f"half, {pattern}"), least=0.0
        )
        for pattern in ("every second", "every second from the first")
        if {"half, chosen", f"half, {pattern}"} <= set(losses)
    }


def _alignment(rows: _Rows, losses: _Losses) -> dict[str, Any]:
    """Whether alignment closes half of the gap that is left without it, and removes half of the error."""
    found = {}
    for name, variant in (("half of the layers", "half, chosen"), ("all layers", "all MHLA")):
        without = f"{variant}, not aligned"
        if not {variant, without} <= set(rows):
            continue
        pairs = zip(losses[variant], losses[without], strict=True)
        gaps = [aligned - plain / 2 for aligned, plain in pairs]
        both = zip(rows[variant], rows[without], strict=True)
        removed = [1 - aligned["error"] / plain["error"] for aligned, plain in both]
        found[f"{name}: gap when aligned, less half of that without"] = _finding(gaps, most=0.0)
        found[f"{name}: error of prediction that alignment removes"] = _finding(removed, least=0.5)
    return found


def _scored(rows: _Rows) -> dict[str, Any]:
    """Whether half of the layers score within the teacher's interval, where they were scored."""
    found = {}
    for number, score in enumerate(_scores(rows.get("teacher", [{}])[0])):
        for variant, name in _HALVES.items():
            if students := [its for its in rows.get(variant, []) if _scores(its)]:
                values = [_scores(its)[number]["value"] for its in students]
                wish = f"{name}: {score['name']} within the teacher's interval"
                found[wish] = _finding(values, most=score["interval"][1])
    return found


def _scores(record: Record) -> Sequence[Record]:
    return record.get("scores") or []


def _finding(values: Sequence[float], *, most: float = math.inf, least: float = -math.inf) -> dict[str, Any]:
    found = Interval.of(list(values))
    low, high = found.mean - found.half, found.mean + found.half
    met = True if least < low and high <= most else False if high <= least or low > most else None
    return {
        "value": found.mean, "interval": [low, high] if math.isfinite(found.half) else None,
        "seeds": list(values), "wanted": {"most": most} if math.isfinite(most) else {"more than": least},
        "met": met,
    }  # fmt: skip


def table(content: Record) -> str:
    """Return results as tables in Markdown: means over seeds with their 95 % intervals by Student's t.

    Args:
        content: of results.json.
    """
    rows = _by_variant(content)
    share = 100 * content["steps"] / content["teacher_steps"]
    parts = [
        f"{content['size']}; {content['steps']} steps of distillation, {share:.3g} % of the teacher's; seeds "
        f"{', '.join(map(str, content['seeds']))}{_sampling(content.get('sampling'))}",
        markdown_table(_variants(rows)),
    ]
    timed = {name: records for name, records in rows.items() if all("by_time" in its for its in records)}
    if timed:
        head = ["loss over the teacher's, by tenth from data to noise", *map(str, range(1, 11))]
        lines = [[name, *_tenths(records)] for name, records in timed.items()]
        parts.append(markdown_table([head, *lines]))
    if content.get("findings"):
        parts.append(markdown_table(_wishes(content["findings"])))
    return "\n\n".join(parts) + "\n"


def _sampling(facts: Record | None) -> str:
    """State how many samples scores are of, and how they were made."""
    if facts is None:
        return ""
    real = facts["real"] or f"{facts['num_real']:,} held-out ones"
    return (
        f"; scores of {facts['num_samples']:,} samples of each model, from the same seeds, in "
        f"{facts['num_inference_steps']} steps at guidance {facts['guidance_scale']:g}, against {real}"
    )


def _variants(rows: _Rows) -> list[list[str]]:
    head = ["variant", "loss over the teacher's", "error of prediction", "before distillation"]
    scored = next((its for records in rows.values() for its in records if _scores(its)), {})
    names = [score["name"] for score in _scores(scored)]
    lines = [[*head, *names]]
    for name, records in rows.items():
        cells = [
            _cell([its["ratio"]["value"] for its in records]),
            *(_cell([its[key] for its in records]) for key in ("error", "before")),
        ]
        for number in range(len(names)):
            cells.append(_score_cell([_scores(its)[number] for its in records if _scores(its)]))
        lines.append([name, *cells])
    return lines


def _tenths(records: Sequence[Record]) -> list[str]:
    """Loss over the teacher's in each tenth of the time, mean over seeds."""
    ratios = [[a / b for a, b in zip(its["by_time"], its["teacher_by_time"], strict=True)] for its in records]
    return [f"{statistics.mean(values):.3f}" for values in zip(*ratios, strict=True)]


def _wishes(found: Record) -> list[list[str]]:
    lines = [["wanted", "limit", "mean", "95 % interval", "by seed", "met"]]
    for name, its in found.items():
        ((word, limit),) = its["wanted"].items()
        interval = "-" if its["interval"] is None else "{:.4f} to {:.4f}".format(*its["interval"])
        seeds = ", ".join(f"{value:.4f}" for value in its["seeds"])
        met = "open" if its["met"] is None else "yes" if its["met"] else "no"
        lines.append([name, f"{word} {limit:.4g}", f"{its['value']:.4f}", interval, seeds, met])
    return lines


def _by_variant(content: Record) -> dict[str, list[Record]]:
    rows: dict[str, list[Record]] = {}
    for record in content["results"]:
        rows.setdefault(record["variant"], []).append(record)
    return rows


def _score_cell(scores: Sequence[Record]) -> str:
    """Mean over seeds with its interval; of one model the interval over samples, as the teacher's is."""
    if len(scores) == 1 and scores[0].get("interval"):
        return "{:.2f} ({:.2f} to {:.2f})".format(scores[0]["value"], *scores[0]["interval"])
    return _cell([score["value"] for score in scores], digits=2) if scores else "-"


def _cell(values: Sequence[float], digits: int = 4) -> str:
    found = Interval.of(list(values))
    return f"{found.mean:.{digits}f}" + (f" ± {found.half:.{digits}f}" if math.isfinite(found.half) else "")
