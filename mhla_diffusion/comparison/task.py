"""What a comparison can be made on: tasks, by name, and the metrics that their runs are judged by."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from ..config import MHLAConfig
    from .variant import Variant

TASKS: dict[str, type[Task]] = {}

_TYPES: dict[Any, str] = {
    int: "an integer", float: "a number", str: "a text", dict: "a map of keys to values", type(None): "null",
}  # fmt: skip


class Measure(NamedTuple):
    """Number of a run's results that tables are made of.

    Args:
        key: in the results.
        title: on the page.
        lower_is_better: whether less is more.
        digits: behind the point.
        paired: whether runs of a seed have so much in common that their difference says more than each.
    """

    key: str
    title: str
    lower_is_better: bool
    digits: int = 3
    paired: bool = True


class Task(ABC):
    """Task of a comparison: a frozen dataclass of its settings, ``class Recall(Task, kind="recall")``.

    Attributes:
        kind: its name, as ``task.kind`` in YAML.
        metrics: of its results, the one that decides first.
        steps: of training.
    """

    kind: ClassVar[str]
    metrics: ClassVar[Sequence[Measure]]
    steps: int

    def __init_subclass__(cls, kind: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if kind:
            cls.kind = kind
            TASKS[kind] = cls

    @property
    def record(self) -> dict[str, Any]:
        """Return everything that results depend on, beside variant and seed, as JSON has it."""
        return {"kind": self.kind, **dataclasses.asdict(self)}  # type: ignore[call-overload]

    @property
    @abstractmethod
    def default_blocks(self) -> Any:
        """Blocks of MHLA in variants that do not say theirs, for :class:`mhla_diffusion.MHLAConfig`."""

    @property
    @abstractmethod
    def tokens(self) -> int:
        """N, of a sample."""

    @property
    @abstractmethod
    def about(self) -> str:
        """Return a sentence about data, budget and metrics, for the page."""

    def replaced(self, settings: dict[str, Any]) -> Task:
        """Return the task with other settings.

        Raises:
            ValueError: for one that it does not have, or a value that is not allowed.
        """
        _require_settings(type(self), settings)
        return dataclasses.replace(self, **settings)  # type: ignore[type-var]

    def shortened(self, share: float) -> Task:
        """Return the task with a share of its steps."""
        return self.replaced({"steps": max(1, round(share * self.steps))})

    @abstractmethod
    def check(self, variant: Variant, config: MHLAConfig | None) -> None:
        """Check that a variant, whose layers have these settings, can be trained.

        Raises:
            ValueError: otherwise.
        """

    def prepare(self, out: Path) -> None:  # noqa: B027 (most tasks need nothing)
        """Check that data and networks are there, before anything is trained, and make what all runs share.

        Args:
            out: folder of the runs.

        Raises:
            ValueError: when something is missing; ImportError for packages.
        """

    @abstractmethod
    def train(self, variant: Variant, seed: int, folder: Path, device: str) -> dict[str, Any]:
        """Train one model and return its results.

        Args:
            variant: of attention.
            seed: of weights and data.
            folder: its own, to go on from when it was stopped; not there yet, or as it was left.
            device: of torch.

        Returns:
            A value of each metric, ``seconds_per_step``, ``parameters`` and what else the page knows.

        Raises:
            ValueError: when the loss is not finite.
        """

    def trained(self, variant: Variant, folder: Path) -> Any:
        """Return the model that a run which is done has left in its folder, None where nothing is kept.

        Args:
            variant, folder: of the run, as in :meth:`train`.
        """
        return None


def task_of(settings: dict[str, Any] | Task) -> Task:
    """Return the task of settings from YAML; without a ``kind`` it is recall.

    Raises:
        ValueError: for an unknown kind or setting.
    """
    if isinstance(settings, Task):
        return settings
    if not isinstance(settings, Mapping):  # one of them on a command line replaces what the YAML has
        raise ValueError(
            f"task must map all of its settings to values, got {settings!r}: change one in the YAML file, or "
            "by --comparison.settings '{KEY: [VALUE]}'"
        )
    values = dict(settings)
    kind = values.pop("kind", "recall")
    if kind not in TASKS:
        raise ValueError(f"task.kind must be one of {', '.join(sorted(TASKS))}, got {kind!r}")
    cls: Any = TASKS[kind]
    _require_settings(cls, values)
    required = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory]
    if missing := [name for name in required if name not in values]:
        raise ValueError(f"the task {kind} needs {', '.join(missing)}")
    return cls(**values)


def _require_settings(cls: Any, settings: dict[str, Any]) -> None:
    """Refuse settings that a task does not have, and values of another type than is declared."""
    fields, hints = [f.name for f in dataclasses.fields(cls)], get_type_hints(cls)
    if unknown := sorted(set(settings) - set(fields)):
        known = ", ".join(sorted(fields))
        raise ValueError(f"unknown settings {', '.join(unknown)}; the task {cls.kind} has {known}")
    for name, value in settings.items():
        hint = hints[name]
        kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        wanted = {get_origin(kind) or kind for kind in kinds}
        given = float if wanted == {float} and type(value) is int else type(value)
        if wanted <= _TYPES.keys() and given not in wanted:
            types = " or ".join(its for kind, its in _TYPES.items() if kind in wanted)
            raise ValueError(f"{name} of the task {cls.kind} must be {types}, got {value!r}")
