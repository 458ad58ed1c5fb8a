"""Tasks of generation, whatever the medium: a run of the trainer, and what its samples are scored against."""

from __future__ import annotations

import dataclasses
import functools
import math
import tempfile
from abc import abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml

from ..backbones.layer_plan import check_blocks
from ..config import MHLAConfig
from ..files.sums import short_hash
from ..files.text import flat_dict, sizes_text
from ..scoring import (
    FPS,
    generate_samples,
    load_extractor_of,
    open_set_of,
    open_source,
    require_real,
    score_samples,
    write_statistics_of,
)
from ..training.config import parse_config
from ..training.data.captions import texts_of
from .measured import MeasuredRun
from .task import Measure, Task
from .variant import Variant

_BLOCKS = "model.mhla.blocks"
# Where things lie is recorded by the last part of it.
_NAMED = {"data.path": "data.name", "data.captions": "captions.name"}
# Of how often something is told or kept results do not depend.
_NOT_RECORDED = (
    "output_dir", *_NAMED, "trainer.log_every", "trainer.checkpoint_every",
    "trainer.keep_checkpoints", "trainer.num_workers", "trainer.trackers", "trainer.seed", "sampling.every",
    "sampling.max_share", "sampling.class_labels", "sampling.images_per_class", "sampling.seed",
)  # fmt: skip


@dataclass(frozen=True)
class GenerationTask(Task):
    """Task of training runs, :class:`.measured.MeasuredRun`, that differ in attention.

    Args:
        base: YAML of a training run, in float32 where it says bf16 and the machine has none. Its
            ``model.attention`` and ``model.mhla`` are the variants', but for ``model.mhla.blocks``, which are
            those of variants that do not say theirs.
        training: keys of it that are others here, such as ``{model.patch_size: 1}``. Lists of them can stand
            among the ``settings`` of a comparison.
        held_out: keys that make its data those that are not trained on, such as ``{data.split: test}``.
        num_samples: generated with ``sampling`` of the base, sample i from seed i in all runs.
        num_real: of the held-out data that they are scored against, evenly spaced.
        extractor: of the Frechet distance, see ``mhla evaluate``.
        calls: of the validation loss, in each tenth of the time.
        analyzed: heads in which rank and entropy of each layer are measured; 0 for none, as it takes minutes
            beyond 1,024 tokens.
    """

    metrics: ClassVar = (
        Measure("frechet", "Frechet distance", lower_is_better=True, digits=1),
        Measure("loss", "Validation loss", lower_is_better=True, digits=4),
    )
    config_class: ClassVar[type[Any]]
    batch_size: ClassVar[int]
    """Samples that are generated at a time."""

    base: str
    held_out: dict[str, Any]
    extractor: str
    training: dict[str, Any] = field(default_factory=dict)
    num_samples: int = 2048
    num_real: int = 10_000
    calls: int = 50
    analyzed: int = 4

    def __post_init__(self) -> None:
        for name, least in (("num_samples", 2), ("num_real", 2), ("calls", 1), ("analyzed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be {least} or more, got {getattr(self, name)}")
        if not self.held_out:
            raise ValueError(
                "held_out must say which data are not trained on, such as {data.split: test}, got "
                f"{self.held_out}"
            )
        self._stated  # noqa: B018 (read now, as it may not be there)

    @property
    def _stated(self) -> dict[str, Any]:
        """Keys and values of the base and what is others here."""
        path = Path(self.base)
        if not path.is_file():
            raise ValueError(f"base must be the YAML file of a training run, and {self.base} is no file")
        try:
            values = yaml.safe_load(path.read_text())
        except (yaml.YAMLError, UnicodeDecodeError):
            values = None
        if not isinstance(values, dict):
            raise ValueError(f"base must be the YAML file of a training run, and {self.base} holds none")
        return flat_dict(values) | flat_dict(self.training)

    @property
    def values(self) -> dict[str, Any]:
        """Return keys and values of the run that all variants share."""
        values = self._stated
        if values.get("trainer.mixed_precision") == "bf16" and not _has_bfloat16():
            values["trainer.mixed_precision"] = "no"
        return {key: value for key, value in values.items() if not key.startswith("model.mhla.")}

    @property
    def record(self) -> dict[str, Any]:
        own = ("num_samples", "num_real", "calls", "extractor", "held_out", "analyzed")
        found: dict[str, Any] = {"kind": self.kind, "data.name": ""}
        found |= {name: Path(self._stated[key]).name for key, name in _NAMED.items() if self._stated.get(key)}
        if _BLOCKS in self._stated:
            found[_BLOCKS] = self._stated[_BLOCKS]
        found |= {name: getattr(self, name) for name in own}
        return found | {key: value for key, value in self.values.items() if key not in _NOT_RECORDED}

    @property
    def default_blocks(self) -> Any:
        return self._stated.get(_BLOCKS, MHLAConfig().blocks)

    @property
    def steps(self) -> int:  # type: ignore[override]
        return self.values["trainer.max_steps"]

    @property
    @abstractmethod
    def grid(self) -> tuple[int, ...]:
        """Tokens along each axis."""

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def about(self) -> str:
        values = self.values
        tokens = sizes_text(self.grid)
        return (
            f"{values.get('data.source')} data, {tokens} tokens, {self.steps:,} steps of batch size "
            f"{values['trainer.batch_size']}; {self.num_samples:,} samples from the same seeds against "
            f"{self.num_real:,} held-out ones, features of {self.extractor}; loss on {self.calls} held-out "
            "samples in each tenth of the time."
        )

    def replaced(self, settings: dict[str, Any]) -> GenerationTask:
        keys = {key: value for key, value in settings.items() if "." in key}
        own = {key: value for key, value in settings.items() if "." not in key}
        task: Any = super().replaced(own)
        return dataclasses.replace(task, training=flat_dict(task.training) | keys)

    def shortened(self, share: float) -> GenerationTask:
        return self.replaced({"trainer.max_steps": max(1, round(share * self.steps))})

    def check(self, variant: Variant, config: MHLAConfig | None) -> None:
        self.config(variant, 0, Path())
        self.real_config(Path())
        if config is not None:
            check_blocks(config, self.grid)

    def config(self, variant: Variant, seed: int, folder: Path) -> Any:
        """Return the config of a variant's run, which writes to a folder.

        Raises:
            ValueError: naming the key and what is allowed.
        """
        run = _parsed(self.config_class, self.values | flat_dict(variant.training))
        log_every, config = max(1, run.trainer.max_steps // 100), variant.config(self.default_blocks)
        trainer = dataclasses.replace(run.trainer, seed=seed, log_every=log_every, keep_checkpoints=1)
        attention = "mhla" if variant.attention == "softmax" and config else variant.attention
        return dataclasses.replace(
            run, output_dir=str(folder), trainer=trainer,
            model=dataclasses.replace(run.model, attention=attention, mhla=config),
        )  # fmt: skip

    def train(self, variant: Variant, seed: int, folder: Path, device: str) -> dict[str, Any]:
        return MeasuredRun(self, self.config(variant, seed, folder / "training"), folder, device).results()

    def trained(self, variant: Variant, folder: Path) -> Any:
        run = MeasuredRun(self, self.config(variant, 0, folder / "training"), folder, "cpu")
        return run.model if run.pipeline_folder.is_dir() else None

    def captions(self, run: MeasuredRun) -> list[str]:
        """Return the captions of the first of the held-out samples; none where these have classes."""
        return texts_of(run.calls.source.captions or ())[: self.num_samples]

    def real_config(self, folder: Path) -> Any:
        """Return the config of a run on what is held out, which is never trained."""
        values = self.values | flat_dict(self.held_out) | {"model.attention": "linear"}  # fits any grid
        return dataclasses.replace(_parsed(self.config_class, values), output_dir=str(folder))

    def held_out_config(self, config: Any) -> Any:
        """Return the config of a variant's run on what is held out."""
        return dataclasses.replace(config, data=self.real_config(Path()).data)

    def prepare(self, out: Path) -> None:
        """Open the data and the extractor, and make the statistics of what is held out, which are kept."""
        held_out = self.real_config(Path())
        extractor = load_extractor_of(held_out, self.extractor, device="cpu")
        open_source(self.config(Variant("linear", "linear"), 0, Path()))
        source = open_source(held_out)
        require_real(self.num_real, source)
        if not (out / self.real_name).is_file():
            open_set = functools.partial(open_set_of, held_out)
            write_statistics_of(source, self.num_real, open_set, extractor, out / self.real_name)

    def generate(self, run: MeasuredRun, folder: Path) -> None:
        """Generate the samples of a run into a folder: of all classes in turn, or of held-out captions."""
        generate_samples(
            run.config, run.pipeline, folder, self.num_samples, prompts=self.captions(run),
            batch_size=self.batch_size, fps=FPS,
        )  # fmt: skip

    def score(self, run: MeasuredRun, real: Path, folder: Path) -> float:
        """Return the Frechet distance of samples to held-out statistics."""
        report = score_samples(
            run.config, real, folder, metrics="frechet", extractor=self.extractor, bootstrap=0, num_workers=1,
            device=run.device,
        )  # fmt: skip
        return report.scores[0].value

    def describe(self, run: MeasuredRun, folder: Path) -> dict[str, Any]:
        """Return what else is known of the samples of a run in a folder."""
        return {}

    @property
    def real_name(self) -> str:
        """Name of the file of statistics of what is held out."""
        data = {key: value for key, value in self.values.items() if key.startswith(("data.", "model."))}
        return f"real-{short_hash([self.kind, self.extractor, self.num_real, data, self.held_out])}.npz"


def _parsed(config_class: Any, values: dict[str, Any]) -> Any:
    """Return the config of a training run with these values of dotted keys."""
    nested: dict[str, Any] = {}
    for key, value in values.items():
        *sections, last = key.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return _parsed_text(config_class, yaml.safe_dump(nested))


@functools.lru_cache(maxsize=64)  # takes a while, and variants share it
def _parsed_text(config_class: Any, text: str) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_text(text)
        return parse_config(config_class, ["--config", str(path)])[0]


def _has_bfloat16() -> bool:
    """Tell machines that compute in bfloat16 from those that emulate it, slower than float32."""
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.cuda.is_available() or any(there for name, there in known.items() if "bf16" in name)
