"""Runs that are compared: their reports, what each is called, and which are the same but for their seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

from ...files.pictures import PICTURE_CONVERSION, VIDEO_CONVERSION, WHITE
from ..scores.score import Score
from ..sets.samples import EARLIER_CONVERSIONS
from .report import SCHEMA_VERSION

# What differs from run to run without changing what is measured.
_HARMLESS = ("date", "command", "device", "batch_size", "versions", "intervals", "chosen")
# Of a manifest: what two runs of one experiment need not have in common.
_INCIDENTAL = ("complete", "versions", "model", "weights_sha256", "seeds")
_SEED = "training.seed"

Seeds = Sequence[Sequence[int]]
"""Ranges of them: the first and the last."""

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
        weights: their hash; None when it is not known.
        dtype: of the weights that samples were made with, such as ``"bfloat16"``; None when it is not known.
        seeds: of its samples; none when they are not known.
        fingerprint: hash of its samples; None when it is not known.
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
    weights: str | None
    dtype: str | None
    seeds: Seeds
    fingerprint: str | None
    real: str
    counts: dict[str, int | None]


@dataclass(frozen=True)
class Group:
    """Runs that are one experiment, done again with other seeds.

    Args:
        label: what the group is called.
        indices: of its runs.
        reason: why they are one, as the end of a sentence.
        flaw: why no mean is taken over them; None where nothing speaks against it.
    """

    label: str
    indices: list[int]
    reason: str
    flaw: str | None = None

    @property
    def averaged(self) -> bool:
        """Tell a group that has a mean from one of a single run, or with a flaw."""
        return len(self.indices) > 1 and self.flaw is None


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
            "real": {
                "count": real["count"],
                "fingerprint": real["fingerprint"],
                "statistics_sha256": real.get("statistics_sha256"),
            },
            "generated": {"count": generated["count"]},
        }
        scores = [Score(**score) for score in content["scores"]]
        pictures = file.with_name("samples.json")
        samples = json.loads(pictures.read_text("utf-8")) if pictures.is_file() else []
        if not all(map(_is_sample, samples)) or not all(map(_is_score, scores)):
            raise ValueError("it has been changed: score the samples again")
        versions = dict(protocol["versions"])
        manifest = generated.get("manifest") or {}
        made, seed = _made(manifest)
        weights, seeds = manifest.get("weights_sha256"), manifest.get("seeds") or []
        if not all(type(first) is int and type(last) is int for first, last in seeds):
            raise ValueError("it has been changed: score the samples again")
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
        weights=None if weights is None else str(weights),
        dtype=None if manifest.get("dtype") is None else str(manifest["dtype"]),
        seeds=seeds,
        fingerprint=generated["fingerprint"],
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
    told = seed is not None and any(key.startswith("training.settings.") for key in made)
    if made and not told:  # nothing says that other weights are those of another seed
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


def tell_apart(runs: Sequence[Run]) -> list[Run]:
    """Count the weights of runs among how they were made where one seed of the training has led to several.

    Then something else than the seed was another, that no report says: the machine, the data, a version.
    """
    found: dict[Any, set[str | None]] = {}
    for run in runs:
        found.setdefault((tuple(run.made.items()), run.seed), set()).add(run.weights)
    several = {made for (made, _), weights in found.items() if made and len(weights) > 1}
    return [
        replace(run, made={**run.made, "weights_sha256": str(run.weights)})
        if tuple(run.made.items()) in several
        else run
        for run in runs
    ]


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
        its = [runs[i] for i in indices]
        seeds = {run.seed for run in its} - {None}
        label = its[0].label if by_label else ", ".join(run.label for run in its)
        if by_label:
            reason = "that have this label"
        elif len(seeds) > 1:
            reason = f"that differ in the seed of the training ({', '.join(sorted(map(str, seeds)))})"
        else:
            reason = "of one model, whose samples have other seeds"
        flaw = _same_samples(its) or (None if by_label else _unlike_spread(its, len(seeds)))
        groups.append(Group(label, indices, reason, flaw))
    return groups


def _same_samples(runs: Sequence[Run]) -> str | None:
    """Say which two runs have samples in common, which would make their spread too small."""
    for first, second in combinations(runs, 2):
        names = f"{first.name} and {second.name}"
        if first.fingerprint is not None and first.fingerprint == second.fingerprint:
            return f"{names} have the same samples"
        one_model = first.weights is not None and first.weights == second.weights
        if one_model and (common := _common(first.seeds, second.seeds)):
            return (
                f"{names} are of one model and have {common} seeds in common, hence the same noise: generate "
                "with a --seed that is at least the number of samples higher"
            )
    return None


def _unlike_spread(runs: Sequence[Run], num_seeds: int) -> str | None:
    """Say why the spread of runs that were made in the same way is not that over seeds of one kind."""
    models = {run.weights for run in runs}
    if num_seeds > 1 and len(runs) > num_seeds:
        return "of some seed of the training there are several: compare one of each"
    if len(runs) > len(models) and not all(run.seeds for run in runs):
        return "they do not say which seeds their samples have: score again what has a manifest.json"
    return None


def _common(first: Seeds, second: Seeds) -> int:
    """Count the seeds in the ranges of both."""
    overlaps = (min(b, d) - max(a, c) + 1 for (a, b), (c, d) in product(first, second))
    return sum(max(0, overlap) for overlap in overlaps)


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
