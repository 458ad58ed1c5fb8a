"""Scores of models: samples of the same noise, made with the settings of a run, against real ones."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from mhla_diffusion.pipelines import MHLAPipeline

from ..evaluation.sets.samples import holds_statistics
from ..files.sums import file_sha256, short_hash
from ..files.text import flat_dict
from ..files.writing import write_file
from ..processes import in_first_process
from ..scoring import (
    generate_samples,
    load_extractor_of,
    open_set_of,
    open_source,
    require_real,
    score_samples,
    size_beside_config,
    write_statistics,
    write_statistics_of,
)
from ..training.config import parse_config
from ..training.data.captions import texts_of
from ..training.data.fingerprint import file_content, fingerprint

logger = logging.getLogger(__name__)

# Samples at a time.
_BATCH = 16


@dataclass(frozen=True)
class ScoreConfig:
    """Settings of Frechet distances.

    Args:
        num_samples: of each model, sample i from seed i; 0 for no scores.
        held_out: keys that make the run's data those to score against, such as ``{data.split: test}``; for
            models of pixels.
        real: images or videos to score against instead, or their statistics, see ``mhla evaluate``.
        num_real: of the held-out data, evenly spaced.
        extractor: see ``mhla evaluate``.

    Raises:
        ValueError: for samples without something to score against, and for ``real`` without samples.
    """

    num_samples: int = 0
    held_out: dict[str, Any] = field(default_factory=dict)
    real: str | None = None
    num_real: int = 10_000
    extractor: str = "auto"

    def __post_init__(self) -> None:
        alone = self.num_samples > 0 and self.real is None and not self.held_out
        if alone or (self.num_samples < 1 and self.real is not None):
            raise ValueError(
                f"scores need real or held_out, and num_samples, got real {self.real}, held_out "
                f"{self.held_out} and num_samples {self.num_samples}"
            )
        if self.real is not None and self.held_out:
            raise ValueError(f"scores are against real {self.real} or held_out {self.held_out}, not both")
        for name, value in (("num_samples", self.num_samples or 2), ("num_real", self.num_real)):
            if value < 2:
                raise ValueError(f"{name} must be 2 or more, as one sample has no covariance, got {value}")


class Scorer:
    """Frechet distances of models to one store of real statistics; what was scored is kept.

    Args:
        config: see :class:`ScoreConfig`.
        teacher: YAML of the teacher's training run, that ``run`` was read from.
        run: whose settings of sampling all models have.
        out: folder, in which the statistics are kept.

    Raises:
        ValueError: when an extractor or real samples are not there.
    """

    def __init__(self, config: ScoreConfig, teacher: str, run: Any, out: Path) -> None:
        self.config, self.run, self.prompts = config, run, list[str]()
        self.extractor = load_extractor_of(run, config.extractor)
        self.against = None if config.real is None else fingerprint_of_real(config.real, run)
        self.data: dict[str, Any] = {}
        source: Any = None
        if config.held_out:
            # As the file has it: what it leaves to defaults may get other names later.
            values = flat_dict(yaml.safe_load(Path(teacher).read_text()))
            self.data = {key: value for key, value in values.items() if key.startswith(("data.", "model."))}
            source = _held_out(teacher, run, config)
            self.prompts = texts_of(source.captions or ())[: config.num_samples]
        self.real = out / f"real-{short_hash(self._real_facts())}.npz"
        if config.real is not None and holds_statistics(config.real):
            self.real = Path(config.real)
        elif not in_first_process(self.real.is_file):
            self._keep_statistics(source)

    @property
    def facts(self) -> dict[str, Any]:
        """Return what scores depend on beside the models and the data."""
        config, sampling = self.config, self.run.sampling
        own = {"num_samples": config.num_samples, "real": config.real, "held_out": config.held_out}
        if config.held_out:
            own["num_real"] = config.num_real
        return {
            **own, "extractor": self.extractor.name, "num_inference_steps": sampling.num_inference_steps,
            "guidance_scale": sampling.guidance_scale,
        }  # fmt: skip

    def _real_facts(self) -> list[Any]:
        kept = self.against, self.config.held_out, self.config.num_real, *size_beside_config(self.run)
        return [*kept, self.data, self.extractor.name, self.extractor.weights_sha256]

    def _keep_statistics(self, source: Any) -> None:
        open_set = partial(open_set_of, self.run)
        if self.config.real is not None:
            write_statistics(open_set(self.config.real), self.extractor, self.real)
        else:
            write_statistics_of(source, self.config.num_real, open_set, self.extractor, self.real)

    def __call__(self, pipeline: str, folder: Path) -> list[dict[str, Any]]:
        """Return the scores of a pipeline, kept in a folder of its own with its samples."""
        name = short_hash([self._real_facts(), self.facts, self.prompts])
        kept = folder / f"scores-{name}.json"
        if not in_first_process(kept.is_file):
            found = scores(
                MHLAPipeline.from_pretrained(pipeline), str(self.real), folder / f"samples-{name}", self.run,
                self.config.num_samples, prompts=self.prompts, metrics="frechet",
                extractor=self.extractor,
            )  # fmt: skip
            logger.info("%s: %s", pipeline, ", ".join(score["text"] for score in found))
            in_first_process(lambda: write_file(kept, json.dumps(found)))
        return json.loads(kept.read_text())


def _held_out(teacher: str, run: Any, config: ScoreConfig) -> Any:
    """Open the data of a run with other keys."""
    keys = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in
            config.held_out.items()]  # fmt: skip
    source = open_source(parse_config(type(run), ["--config", teacher, *keys])[0])
    require_real(config.num_real, source)
    return source


def fingerprint_of_real(path: str, run: Any) -> str:
    """Return the fingerprint of what samples are scored against.

    Args:
        path: see ``mhla evaluate``.
        run: config of a training run.

    Raises:
        ValueError: when it holds neither samples nor statistics.
    """
    if holds_statistics(path):
        return file_sha256(path)
    found = open_set_of(run, path)
    return fingerprint(found.names, lambda i: file_content(found.file(found.names[i]) or path))


def scores(
    pipeline: Any,
    real: str,
    out: Path,
    run: Any,
    num_samples: int,
    *,
    prompts: Sequence[str] = (),
    **settings: Any,
) -> list[Mapping[str, Any]]:
    """Generate samples with the settings of a run, and score them; what is there is gone on with.

    Args:
        pipeline: makes images or videos, as the run's models do.
        real: see ``mhla evaluate``.
        out: folder of the samples, sample i from seed i.
        run: config of a training run.
        num_samples: to generate, of the prompts in turn, or of all classes.
        prompts: of models of texts; those of the run's sheets by default.
        settings: of :func:`.evaluate_images` or :func:`.evaluate_videos`.
    """
    prompts = list(prompts) or list(run.sampling.prompts)
    generate_samples(run, pipeline, out, num_samples, prompts=prompts, batch_size=_BATCH)
    report = score_samples(run, real, out, **settings)
    return [
        {"name": score.name, "value": score.value, "interval": score.interval, "text": score.text()}
        for score in report.scores
    ]
