"""Experiment: what conversion loses, by form, with and without alignment, chosen and by pattern, over seeds.

A teacher is trained once. For each seed its layers are aligned, and every variant, a form for each layer, is
distilled for the same few steps. What is done is not done again: stopped anywhere, the same call goes on.
"""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mhla_diffusion.pipelines import MHLAPipeline

from ..attention import MHLAConfig
from ..backbones import load_transformer
from ..backbones.teacher import load_teacher
from ..files.text import markdown_table
from ..files.writing import write_file
from ..planning import Plan, plan
from ..processes import in_first_process, process_state
from ..training import train
from ..training.checkpoints import list_checkpoints
from ..training.export import read_run_config
from .align import align, load_candidates
from .calls import TIME_BUCKETS, DataCalls
from .choose import assemble, describe, layer_errors, save_student
from .costs import layer_costs
from .job import AlignConfig
from .knapsack import STOCK, Limits, frontier, within
from .linearize import LinearizeConfig, distil
from .measures import losses, ratio, scores
from .report import plain
from .trial import prediction_error

logger = logging.getLogger(__name__)

# Behind the calls that layers were aligned on.
_FIRST_CALL = 1_000_000
FORMS = ("linear", "mhla", "mhla-local")


@dataclass(frozen=True)
class ExperimentConfig:
    """Settings of the experiment.

    Args:
        teacher: YAML of the training run of a teacher with softmax attention in all layers.
        out: folder of everything.
        height, width, frames, vae_stride: of the output, that costs are for, see ``mhla plan``.
        candidates: YAML of the forms ``linear``, ``mhla`` and ``mhla-local``.
        seeds: of alignment and distillation.
        align: see :class:`AlignConfig`.
        steps: of distillation; at most 5 % of the teacher's, or it says nothing about cheap conversion.
        learning_rate: of distillation.
        calls: in each tenth of the time, that losses are measured on.
        real, num_samples: images or videos to score against, see ``mhla evaluate``, and how many samples of
            each model; no scores by default.

    Raises:
        ValueError: for no seed, steps or calls, or scores of no samples.
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
    learning_rate: float = 1e-4
    calls: int = 20
    real: str | None = None
    num_samples: int = 0

    def __post_init__(self) -> None:
        if not self.seeds or self.steps < 1 or self.calls < 1:
            raise ValueError("the experiment needs a seed, and steps and calls of 1 or more")
        if (self.real is None) != (self.num_samples < 1):
            raise ValueError(
                f"scores need real and num_samples, got real {self.real} and num_samples {self.num_samples}"
            )


@dataclass(frozen=True)
class Variant:
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
    if set(forms) != set(FORMS):
        raise ValueError(f"{config.candidates} must have {', '.join(FORMS)}, it has {', '.join(forms)}")
    teacher_folder = out / "teacher"
    if not (teacher_folder / "pipeline").is_dir():
        whole = replace(run, output_dir=str(teacher_folder))
        if stopped := train(whole, resume="latest" if list_checkpoints(teacher_folder) else None):
            raise KeyboardInterrupt(stopped)
    path = str(teacher_folder / "pipeline")
    size = plan(path, config.height, config.width, config.frames, vae_stride=config.vae_stride)
    results = [] if config.real is None else [_teacher_scores(config, run, path)]
    for seed in config.seeds:
        results += _Seed(config, run, forms, path, size, seed).results().values()
    content = {
        "teacher": config.teacher, "steps": config.steps, "teacher_steps": run.trainer.max_steps,
        "seeds": list(config.seeds), "size": size.size, "results": results,
    }  # fmt: skip
    in_first_process(lambda: write_file(out / "results.json", json.dumps(content, indent=2)))
    in_first_process(lambda: write_file(out / "results.md", table(content)))
    logger.info("Results: %s", out / "results.md")
    return content


def _teacher_scores(config: ExperimentConfig, run: Any, path: str) -> dict[str, Any]:
    """The teacher's row: its scores, beside which those of students stand."""
    kept = Path(config.out) / "teacher.json"
    if not kept.is_file():
        found = _scores(config, run, path, Path(config.out) / "teacher-samples")
        in_first_process(lambda: write_file(kept, json.dumps(found)))
    exact = {"value": 1.0, "interval": [1.0, 1.0]}
    scored = json.loads(kept.read_text())
    return {"seed": None, "variant": "teacher", "error": 0.0, "before": 0.0, "ratio": exact, "scores": scored}


def _scores(config: ExperimentConfig, run: Any, path: str, folder: Path) -> list[Mapping[str, Any]]:
    assert config.real is not None
    return scores(MHLAPipeline.from_pretrained(path), config.real, folder, run, config.num_samples)


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
        self.forms = forms
        self.config, self.path, self.size, self.seed = config, path, size, seed
        self.run = replace(run, trainer=replace(run.trainer, seed=seed))
        self.folder = Path(config.out) / f"seed-{seed}"
        self.teacher = load_teacher(path, device=process_state().device)
        self.calls = DataCalls(self.teacher, self.run, seed=seed)
        self.numbers = range(_FIRST_CALL, _FIRST_CALL + TIME_BUCKETS * config.calls)

    def results(self) -> dict[str, dict[str, Any]]:
        """Align, and return what each variant comes to."""
        settings = replace(self.config.align, seed=self.seed)
        self.record = align(
            self.teacher, self.calls, self.folder / "aligned", candidates=self.forms,
            config=settings, name=self.path,
        )  # fmt: skip
        return {name: self._result(name, variant) for name, variant in self._variants().items()}

    def _variants(self) -> dict[str, Variant]:
        count = len(self.teacher.layer_attention)
        errors = layer_errors(self.record, count)
        tables = [{form: table[form] for form in (STOCK, "mhla")} for table in errors]
        costs = layer_costs(self.teacher, self.record, self.size, errors, by="flops")
        every_second = tuple("mhla" if number % 2 else STOCK for number in range(count))
        self.limits = Limits(errors, costs, budget=1.0)
        chosen = within(frontier(tables, costs), self.limits.choice(every_second).cost)
        return {
            "half, chosen": Variant(chosen.forms),
            "half, every second": Variant(every_second),
            "half, chosen, not aligned": Variant(chosen.forms, aligned=False),
            "all local": Variant(("mhla-local",) * count),
            "all MHLA": Variant(("mhla",) * count),
            "all MHLA, not aligned": Variant(("mhla",) * count, aligned=False),
            "all linear": Variant(("linear",) * count),
        }

    def _result(self, name: str, variant: Variant) -> dict[str, Any]:
        """Distil a variant, unless its result is there."""
        folder = self.folder / name.replace(", ", "-").replace(" ", "-")
        if (folder / "result.json").is_file():
            return json.loads((folder / "result.json").read_text())
        chosen = self.limits.choice(variant.forms)
        facts = describe(
            self.record, self.size, chosen, frontier(self.limits.errors, self.limits.costs), self.limits
        )
        if variant.aligned:
            start = assemble(self.teacher, variant.forms, self.record, self.folder / "aligned")
        else:
            start = plain(self.teacher, facts)
        if not (folder / "student").is_dir():
            in_first_process(lambda: save_student(start, facts, self.path, folder / "student"))
        settings = LinearizeConfig(
            steps=self.config.steps, learning_rate=self.config.learning_rate, batch_size=None
        )
        if stopped := distil(self.path, self.run, folder, settings):
            raise KeyboardInterrupt(stopped)
        student = load_transformer(str(folder / "distilled" / "pipeline")).eval().to(self.teacher.device)
        result = {
            "seed": self.seed, "variant": name, "forms": list(variant.forms),
            "before": prediction_error(self.teacher, start, self.calls, self.numbers[:TIME_BUCKETS]),
            "error": prediction_error(self.teacher, student, self.calls, self.numbers[:TIME_BUCKETS]),
            **self._losses(student),
        }  # fmt: skip
        if self.config.real is not None:
            pipeline = str(folder / "distilled" / "pipeline")
            result["scores"] = _scores(self.config, self.run, pipeline, folder / "samples")
        in_first_process(lambda: write_file(folder / "result.json", json.dumps(result)))
        return result

    def _losses(self, student: Any) -> dict[str, Any]:
        teacher = losses(self.teacher, self.calls, self.numbers)
        values = losses(student, self.calls, self.numbers)
        return {"loss": sum(values) / len(values), "ratio": ratio(values, teacher)}


def table(content: Mapping[str, Any]) -> str:
    """Return results as a table in Markdown: mean over seeds, and the least and the most."""
    by_variant: dict[str, list[Mapping[str, Any]]] = {}
    for record in content["results"]:
        by_variant.setdefault(record["variant"], []).append(record)
    head = ["variant", "loss over the teacher's", "error of prediction", "before distillation"]
    names = [score["name"] for score in content["results"][0].get("scores", [])]
    rows = [
        [
            name,
            _spread([record["ratio"]["value"] for record in records]),
            _spread([record["error"] for record in records]),
            _spread([record["before"] for record in records]),
            *(
                _spread([record["scores"][number]["value"] for record in records])
                for number in range(len(names))
            ),
        ]
        for name, records in by_variant.items()
    ]
    share = 100 * content["steps"] / content["teacher_steps"]
    return (
        f"{content['size']}; {content['steps']} steps of distillation, {share:.3g} % of the teacher's; seeds "
        f"{', '.join(map(str, content['seeds']))}\n\n{markdown_table([head + names, *rows])}\n"
    )


def _spread(values: Sequence[float]) -> str:
    mean = statistics.mean(values)
    return f"{mean:.4g}" if len(values) == 1 else f"{mean:.4g} ({min(values):.4g} to {max(values):.4g})"
