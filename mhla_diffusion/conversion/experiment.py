"""Experiment: what conversion loses, by form, with and without alignment, chosen and by pattern, over seeds.

A teacher is trained once. For each seed its layers are aligned, and every variant, a form for each layer, is
distilled for the same few steps. What is done is not done again: stopped anywhere, the same call goes on.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import yaml

from ..arguments import MAX_NUMPY_SEED, require_seed
from ..backbones import load_transformer
from ..backbones.teacher import load_teacher
from ..config import MHLAConfig
from ..files.text import changes
from ..files.writing import write_file
from ..planning import Plan, plan
from ..processes import in_first_process, process_state
from ..training import DistillationConfig, train
from ..training.config import as_dict, forbidden_changes
from ..training.export import read_run_config
from .align import align, load_candidates
from .calls import TIME_BUCKETS, DataCalls, fresh_numbers
from .choose import assemble, describe, layer_errors, save_student
from .costs import layer_costs
from .findings import findings, table
from .job import AlignConfig
from .knapsack import STOCK, Choice, Limits, frontier, within
from .linearize import LinearizeConfig, distil
from .measures import by_time, losses, ratio, training_hours
from .report import plain
from .scores import ScoreConfig, Scorer
from .trial import Trial, prediction_error

logger = logging.getLogger(__name__)

RECORD = "experiment.json"
# Settings that every student and every loss depend on. What alignment depends on is in align.json.
_KEPT = (
    "height", "width", "frames", "vae_stride", "steps", "batch_size", "learning_rate", "distillation",
    "check", "calls",
)  # fmt: skip
# Candidates, and the words of variants that need them.
FORMS = {"linear": "linear", "mhla": "", "mhla-local": "local", "mhla-wide": "wide"}
VARIANTS = (
    "half, chosen", "half, every second", "half, every second from the first", "half, chosen, not aligned",
    "all local", "all MHLA", "all MHLA, not aligned", "all linear", "half, chosen, local",
    "half, chosen, wide", "all wide", "all softmax",
)  # fmt: skip
"""Students: forms of the layers that are chosen, or lie in a pattern, or of all. The last is the teacher,
trained as all others are: what it loses is not of any conversion."""


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig(ScoreConfig):
    """Settings of the experiment; see also :class:`.ScoreConfig`.

    Args:
        teacher: YAML of the training run of a teacher with softmax attention in all layers.
        out: folder of everything.
        height, width, frames, vae_stride: of the output, that costs are for, see ``mhla plan``.
        candidates: YAML of the forms that the variants need, of ``linear``, ``mhla``, ``mhla-local`` and
            ``mhla-wide``, a window with a margin.
        seeds: of alignment and distillation.
        align: see :class:`AlignConfig`.
        steps: of distillation; at most 5 % of the teacher's, or it says nothing about cheap conversion.
        batch_size: of distillation; the teacher's by default.
        learning_rate: of distillation.
        distillation: see :class:`LinearizeConfig`.
        check: calls that assembled models are measured on to choose layers, as ``mhla choose`` does; 0 for
            none, and the choice is by the errors of layers alone.
        calls: in each tenth of the time, that losses are measured on.
        variants: students, see :data:`VARIANTS`; the first eight of them by default. More may be added later.
        scored: variants that are scored beside the teacher; all by default.

    Raises:
        ValueError: for no seed, steps or calls, variants that are not known, or scores of no samples.
    """

    teacher: str
    out: str
    height: int
    width: int
    candidates: str
    frames: int | None = None
    vae_stride: int | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    align: AlignConfig = field(default_factory=AlignConfig)
    steps: int = 500
    batch_size: int | None = None
    learning_rate: float = 1e-4
    distillation: DistillationConfig | None = None
    check: int = 8
    calls: int = 20
    variants: tuple[str, ...] = VARIANTS[:8]
    scored: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.seeds or self.steps < 1 or self.calls < 1:
            raise ValueError("the experiment needs a seed, and steps and calls of 1 or more")
        for seed in self.seeds:
            require_seed(seed, "each of seeds", most=MAX_NUMPY_SEED)
        for name, few in (("variants", VARIANTS), ("scored", self.variants)):
            if unknown := [variant for variant in getattr(self, name) if variant not in few]:
                raise ValueError(f"{name} must be of {'; '.join(few)}, got {'; '.join(unknown)}")
        if not self.variants:
            raise ValueError(f"variants must name one or more of {'; '.join(VARIANTS)}")


@dataclass(frozen=True)
class Student:
    """Student of the experiment: a form for each layer, and whether its layers are aligned first."""

    forms: tuple[str, ...]
    aligned: bool = True


def experiment(config: ExperimentConfig) -> dict[str, Any]:
    """Run the experiment, and write results.json and results.md into its folder.

    Returns:
        The content of results.json.

    Raises:
        ValueError: for other candidates, a teacher that is not of softmax layers, or another experiment in
            ``out``.
    """
    out = Path(config.out)
    run: Any = read_run_config(config.teacher)
    forms = load_candidates(config.candidates)
    if missing := [form for form in _needed(config.variants) if form not in forms]:
        raise ValueError(f"{config.candidates} has {', '.join(forms)} and lacks {', '.join(missing)}")
    in_first_process(lambda: _claim(out, config, run))
    scorer = Scorer(config, config.teacher, run, out) if config.num_samples else None
    teacher_folder = out / "teacher"
    if not in_first_process((teacher_folder / "pipeline").is_dir):
        whole = replace(run, output_dir=str(teacher_folder))
        if stopped := train(whole, resume="auto"):
            raise KeyboardInterrupt(stopped)
    path = str(teacher_folder / "pipeline")
    size = plan(path, config.height, config.width, config.frames, vae_stride=config.vae_stride)
    results: list[dict[str, Any]] = []
    for seed in config.seeds:
        results += _Seed(config, run, forms, path, size, seed).results()
    facts: dict[str, Any] = {}
    if scorer is not None:
        results, facts = _scored(config, scorer, path, results), {"sampling": scorer.facts}
    content: dict[str, Any] = {
        "teacher": config.teacher, "steps": config.steps, "teacher_steps": run.trainer.max_steps,
        "seeds": list(config.seeds), "size": size.size, **facts, "results": results,
    }  # fmt: skip
    content["findings"] = findings(content)
    in_first_process(lambda: write_file(out / "results.json", json.dumps(content, indent=2)))
    in_first_process(lambda: write_file(out / "results.md", table(content)))
    logger.info("Results: %s", out / "results.md")
    return content


def _claim(out: Path, config: ExperimentConfig, run: Any) -> None:
    """Write experiment.json, or make sure that the experiment in ``out`` and its teacher are the same."""
    record = {name: value for name, value in as_dict(config).items() if name in _KEPT}
    old = json.loads((out / RECORD).read_text()) if (out / RECORD).is_file() else record
    others = changes({key: old.get(key) for key in record}, record)
    trained = out / "teacher" / "config.yaml"
    if trained.is_file():
        saved = yaml.safe_load(trained.read_text(encoding="utf-8"))
        others += [f"teacher: {change}" for change in forbidden_changes(saved, run)]
        if (steps := saved["trainer"]["max_steps"]) != run.trainer.max_steps:
            others.append(f"teacher: trainer.max_steps: {steps} -> {run.trainer.max_steps}")
    if others:
        raise ValueError(
            f"{out} holds an experiment with other settings: choose another folder as out, or set these as "
            "they were:\n  " + "\n  ".join(others)
        )
    write_file(out / RECORD, json.dumps(record, indent=2))


def _scored(
    config: ExperimentConfig, scorer: Scorer, teacher: str, records: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The teacher's row, and those of students, with the scores of those that are scored."""
    exact = {"value": 1.0, "interval": [1.0, 1.0]}
    row = {"seed": None, "variant": "teacher", "error": 0.0, "before": 0.0, "ratio": exact}
    rows = [{**row, "scores": scorer(teacher, Path(config.out) / "teacher-scores")}]
    for record in records:
        rows.append(record)
        if not config.scored or record["variant"] in config.scored:
            folder = variant_folder(Path(config.out), record["seed"], record["distilled_as"])
            rows[-1] = {**record, "scores": scorer(str(folder / "distilled" / "pipeline"), folder)}
    return rows


def _needed(variants: Sequence[str]) -> list[str]:
    """The forms of variants: MHLA, which layers are chosen by, and others if they are asked for."""
    return [form for form, word in FORMS.items() if any(word in variant for variant in variants)]


def variant_folder(out: Path, seed: int, variant: str) -> Path:
    """Return where a variant of a seed is."""
    return out / f"seed-{seed}" / variant.replace(", ", "-").replace(" ", "-")


class _Seed:
    """Experiment of one seed."""

    def __init__(
        self,
        config: ExperimentConfig,
        run: Any,
        forms: Mapping[str, MHLAConfig],
        path: str,
        size: Plan,
        seed: int,
    ) -> None:
        self.forms = {form: forms[form] for form in _needed(config.variants)}
        self.config, self.path, self.size, self.seed = config, path, size, seed
        self.run = replace(run, trainer=replace(run.trainer, seed=seed))
        self.folder = Path(config.out) / f"seed-{seed}"
        self.teacher = load_teacher(path, device=process_state().device)
        self.calls = DataCalls(self.teacher, self.run, seed=seed)
        self.numbers = fresh_numbers(config.calls)

    def results(self) -> list[dict[str, Any]]:
        """Align, and return what each variant comes to."""
        settings = replace(self.config.align, seed=self.seed)
        self.record = align(
            self.teacher, self.calls, self.folder / "aligned", candidates=self.forms,
            config=settings, name=self.path,
        )  # fmt: skip
        found = self._variants()
        variants = {name: found[name] for name in self.config.variants}
        # The choice may be one of the patterns, which is not distilled twice.
        first = {variant: name for name, variant in reversed(variants.items())}
        results = {name: self._result(name, variants[name]) for name in first.values()}
        return [
            {**results[first[variant]], "variant": name, "distilled_as": first[variant]}
            for name, variant in variants.items()
        ]

    def _variants(self) -> dict[str, Student]:
        count = len(self.teacher.layer_attention)
        errors = layer_errors(self.record, count)
        costs = layer_costs(self.teacher, self.record, self.size, errors, by="flops")
        self.limits = Limits(errors, costs, budget=1.0)
        every_second = tuple("mhla" if number % 2 else STOCK for number in range(count))
        # At equal cost where the number of layers is even.
        from_first = (*every_second[1:], every_second[0]) if count % 2 == 0 else every_second
        chosen = self._chosen(self.limits.choice(every_second).cost).forms
        return {
            "half, chosen": Student(chosen),
            "half, every second": Student(every_second),
            "half, every second from the first": Student(from_first),
            "half, chosen, not aligned": Student(chosen, aligned=False),
            "all local": Student(("mhla-local",) * count),
            "all MHLA": Student(("mhla",) * count),
            "all MHLA, not aligned": Student(("mhla",) * count, aligned=False),
            "all linear": Student(("linear",) * count),
            "all wide": Student(("mhla-wide",) * count),
            **{
                f"half, chosen, {word}": Student(
                    tuple(f"mhla-{word}" if form == "mhla" else form for form in chosen)
                )
                for word in ("local", "wide")
            },
            "all softmax": Student((STOCK,) * count),
        }

    def _chosen(self, budget: float) -> Choice:
        """The layers that are MHLA within a budget, as ``mhla choose`` takes them; the choice is kept."""
        kept = self.folder / "chosen.json"

        def choose() -> None:
            if not kept.is_file():
                chosen, notes = self._choose(budget)
                write_file(kept, json.dumps({"chosen": asdict(chosen), "check": notes}, indent=2))

        in_first_process(choose)
        return self.limits.choice(json.loads(kept.read_text())["chosen"]["forms"])

    def _choose(self, budget: float) -> tuple[Choice, dict[str, Any]]:
        errors = [{form: table[form] for form in (STOCK, "mhla")} for table in self.limits.errors]
        limits = Limits(errors, self.limits.costs, budget)
        choices = frontier(errors, limits.costs)
        chosen = within(choices, budget)
        if not self.config.check:
            return chosen, {}
        made = partial(assemble, record=self.record, aligned=self.folder / "aligned")
        trial = Trial.of_aligned(self.teacher, self.calls, self.record, self.config.check, made)
        return trial.check(choices, chosen, limits, repairs=20)

    def _result(self, name: str, variant: Student) -> dict[str, Any]:
        """Distil a variant, unless its result is there."""
        folder = variant_folder(Path(self.config.out), self.seed, name)
        kept, student_folder = folder / "result.json", folder / "student"
        if known := in_first_process(lambda: json.loads(kept.read_text()) if kept.is_file() else None):
            return known
        chosen = self.limits.choice(variant.forms)
        facts = describe(
            self.record, self.size, chosen, frontier(self.limits.errors, self.limits.costs), self.limits
        )
        if variant.aligned:
            start = assemble(self.teacher, variant.forms, self.record, self.folder / "aligned")
        else:
            start = plain(self.teacher, facts)

        def save() -> None:
            if not student_folder.is_dir():
                save_student(start, facts, self.path, student_folder)

        in_first_process(save)
        settings = LinearizeConfig(
            steps=self.config.steps, learning_rate=self.config.learning_rate,
            batch_size=self.config.batch_size, distillation=self.config.distillation,
        )  # fmt: skip
        if stopped := distil(self.path, self.run, folder, settings):
            raise KeyboardInterrupt(stopped)
        student = load_transformer(str(folder / "distilled" / "pipeline")).eval().to(self.teacher.device)
        result = {
            "seed": self.seed, "variant": name, "forms": list(variant.forms), "cost": chosen.cost,
            "hours": training_hours(folder / "distilled"),
            "before": prediction_error(self.teacher, start, self.calls, self.numbers[:TIME_BUCKETS]),
            "error": prediction_error(self.teacher, student, self.calls, self.numbers[:TIME_BUCKETS]),
            **self._losses(student),
        }  # fmt: skip
        in_first_process(lambda: write_file(kept, json.dumps(result)))
        return result

    def _losses(self, student: Any) -> dict[str, Any]:
        values, teacher = losses(student, self.calls, self.numbers), self._teacher_losses
        return {
            "loss": sum(values) / len(values), "ratio": ratio(values, teacher),
            "by_time": by_time(values, self.numbers), "teacher_by_time": by_time(teacher, self.numbers),
        }  # fmt: skip

    @cached_property
    def _teacher_losses(self) -> list[float]:
        return losses(self.teacher, self.calls, self.numbers)
