"""Runs that are compared: their reports, what each is called, and which are the same but for their seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...files.pictures import PICTURE_CONVERSION, VIDEO_CONVERSION, WHITE
from ..scores.score import Score
from ..sets.samples import EARLIER_CONVERSIONS
from .report import SCHEMA_VERSION

# What differs from run to run without changing what is measured.
_HARMLESS = ("date", "command", "device", "batch_size", "versions", "intervals", "chosen")
# Of a manifest: what two runs of one experiment need not have in common.
_INCIDENTAL = ("complete", "versions", "model", "weights_sha256")
_SEED = "training.seed"
# Reports of earlier versions: where pixels became others, the fingerprint of the real set is another.
_RENAMED = {
    EARLIER_CONVERSIONS[kind]: text.format(background=WHITE)
    for kind, text in (("image", PICTURE_CONVERSION), ("video", VIDEO_CONVERSION))
}


@dataclass(frozen=True)
class Run:
    """Report that is compared.

    Args:
        name: the path that was given.
        label: what it is called.
        scores: by name.
        conditions: everything that must be equal in two runs that are compared, by a dotted key.
        versions: of the packages.
        kind: ``"image"`` or ``"video"``.
        samples: a few generated ones, as they stand in samples.json; none when that is not there.
        made: how its samples were made, by a dotted key, without seeds; empty when no manifest says it.
        seed: of the training; None when it is not known.
        real: folder or file of the real samples.
        counts: samples of both sets, ``real`` and ``generated``; None where statistics do not state it.
    """

    name: str
    label: str
    scores: dict[str, Score]
    conditions: dict[str, str]
    versions: dict[str, str]
    kind: str
    samples: list[dict[str, Any]]
    made: dict[str, str]
    seed: str | None
    real: str
    counts: dict[str, int | None]


@dataclass(frozen=True)
class Group:
    """Runs that are one experiment, done again with other seeds.

    Args:
        label: what the group is called.
        indices: of its runs.
        reason: why they are one, as the end of a sentence.
    """

    label: str
    indices: list[int]
    reason: str


def load_run(path: Path, label: str) -> Run:
    """Read a report.

    Raises:
        ValueError: when it is not one of this version.
    """
    file = path / "report.json" if path.is_dir() else path
    try:
        content = json.loads(file.read_text("utf-8"))
        version = content["schema_version"]
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"it has schema_version {version}, not {SCHEMA_VERSION}: score the samples again"
            )
        protocol = content["protocol"]
        conditions = {key: value for key, value in protocol.items() if key not in (*_HARMLESS, "scores")}
        conditions["extractors"] = {
            name: {key: value for key, value in its.items() if key not in _HARMLESS}
            for name, its in protocol["extractors"].items()
        }
        real, generated = content["real"], content["generated"]
        conditions["conversion"] = _RENAMED.get(conditions["conversion"], conditions["conversion"])
        conditions |= {
            "kind": content["kind"],
            "real": {"count": real["count"], "fingerprint": real["fingerprint"]},
            "generated": {"count": generated["count"]},
        }
        scores = [Score(**score) for score in content["scores"]]
        pictures = file.with_name("samples.json")
        samples = json.loads(pictures.read_text("utf-8")) if pictures.is_file() else []
        if not all(map(_is_sample, samples)) or not all(map(_is_score, scores)):
            raise ValueError("it has been changed: score the samples again")
        versions = dict(protocol["versions"])
        made, seed = _made(generated.get("manifest") or {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is not a report that can be compared: {error}") from error
    return Run(
        name=str(path),
        label=label,
        scores={score.name: score for score in scores},
        conditions=flat(conditions),
        versions=versions,
        kind=content["kind"],
        samples=samples,
        made=made,
        seed=seed,
        real=str(real["source"]),
        counts={"real": real["count"], "generated": generated["count"]},
    )


def _is_sample(sample: Any) -> bool:
    """Check what goes into a page: a report may come from a stranger."""
    picture, sizes = sample.get("data_uri"), [sample.get(name) for name in ("width", "height")]
    texts = [sample.get(name) or "" for name in ("name", "label", "prompt")]
    inline = isinstance(picture, str) and picture.startswith("data:image/")
    return inline and all(type(size) is int for size in sizes) and all(isinstance(t, str) for t in texts)


def _is_score(score: Score) -> bool:
    numbers = [score.value, *(score.interval or ())]
    return (
        isinstance(score.name, str)
        and isinstance(score.extractor, str)
        and all(isinstance(number, int | float) for number in numbers)
        and len(score.interval or (0, 0)) == 2
        and all(isinstance(flag, str) for flag in score.flags)
    )


def _made(manifest: Mapping[str, Any]) -> tuple[dict[str, str], str | None]:
    """How samples were made, and with which seed their model was trained."""
    made = flat({key: value for key, value in manifest.items() if key not in _INCIDENTAL})
    seed = made.pop(_SEED, None)
    if made and seed is None:  # nothing says that other weights are those of another seed
        made["weights_sha256"] = str(manifest.get("weights_sha256"))
    return made, seed


def short_names(paths: Sequence[Path]) -> list[str]:
    """Names of paths without the folders that all of them begin or end with."""
    parts = [path.parts for path in paths]
    start = end = 0
    shortest = min(map(len, parts))
    while start < shortest - 1 and len({its[start] for its in parts}) == 1:
        start += 1
    while end < shortest - start - 1 and len({its[-1 - end] for its in parts}) == 1:
        end += 1
    return ["/".join(its[start : len(its) - end]) for its in parts]


def group_runs(runs: Sequence[Run], *, by_label: bool) -> list[Group]:
    """Put the runs of one experiment together.

    Args:
        runs: all of them.
        by_label: whether who compares them said by equal labels which are one; else those are that were made
            in the same way, by models that differ in the seed of their training at most.
    """
    members: dict[Any, list[int]] = {}
    for index, run in enumerate(runs):
        key: Any = run.label if by_label else tuple(run.made.items()) or index
        members.setdefault(key, []).append(index)
    groups = []
    for indices in members.values():
        label, seeds = runs[indices[0]].label, {runs[i].seed for i in indices} - {None}
        if by_label:
            reason = "that have this label"
        elif len(seeds) > 1:
            label = ", ".join(runs[i].label for i in indices)
            reason = f"that differ in the seed of the training ({', '.join(sorted(map(str, seeds)))})"
        else:
            label = ", ".join(runs[i].label for i in indices)
            reason = "of one model, whose samples have other seeds"
        groups.append(Group(label, indices, reason))
    return groups


def differing(conditions: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """Keys that do not have the same value in all, with what each has."""
    keys = dict.fromkeys(key for its in conditions for key in its)
    found = {key: [its.get(key, "(absent)") for its in conditions] for key in keys}
    return {key: values for key, values in found.items() if len(set(values)) > 1}


def flat(value: Any, key: str = "") -> dict[str, str]:
    """Flatten nested mappings to one, its keys dotted and its values texts."""
    if not isinstance(value, dict):
        return {key: str(value)} if key else {}
    flattened: dict[str, str] = {}
    for name, inner in value.items():
        flattened |= flat(inner, f"{key}.{name}" if key else name)
    return flattened
