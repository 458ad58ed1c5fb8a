"""What a comparison is: variants of attention, a task and its settings, and seeds; and its runs."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..arguments import MAX_NUMPY_SEED, require_seed
from ..files.sums import short_hash
from .screen import Screen
from .task import Task, task_of
from .variant import Variant


@dataclass(frozen=True)
class Comparison:
    """Every variant in every setting with every seed.

    Args:
        name: of the page.
        variants: rows of the tables.
        task: settings that all runs share: ``kind``, recall by default, images, videos, classification or
            language, and those of :class:`Recall`, :class:`Images`, :class:`Videos`,
            :class:`Classification` or :class:`Language`.
        settings: lists of values of the task's settings, which are combined: ``{"side": [16, 32]}``.
        seeds: of data and weights; the same for all variants. Three or more, or nothing is claimed.
        screen: rule of ``--screen``, see :class:`.screen.Screen`.
        against: names of the variants that all others are compared with seed by seed; those of linear
            attention and softmax by default, or the first of all.
    """

    name: str
    variants: list[Variant]
    task: Any = field(default_factory=dict)
    settings: dict[str, list[Any]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    screen: Screen = field(default_factory=Screen)
    against: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ValueError(
                "the name of a comparison is that of a file, of letters, digits and ._- alone, got "
                f"{self.name!r}"
            )
        names = [variant.name for variant in self.variants]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"variants must have names of their own, got {names}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be one or more and all different, got {self.seeds}")
        for seed in self.seeds:
            require_seed(seed, "each of seeds", most=MAX_NUMPY_SEED)
        if not all(isinstance(values, list) and values for values in self.settings.values()):
            raise ValueError(
                f"settings need a list of one value or more, such as side: [16], got {self.settings}"
            )
        for key, named in (("screen.keep", self.screen.keep), ("against", self.against)):
            if unknown := sorted(set(named) - set(names)):
                raise ValueError(
                    f"{key} must name variants, which are {', '.join(names)}, got {', '.join(unknown)}"
                )
        object.__setattr__(self, "task", task_of(self.task))
        for task in self.tasks():  # refuses what cannot be, before anything runs
            for variant in self.variants:
                task.check(variant, variant.config(task.default_blocks))

    @property
    def references(self) -> list[str]:
        """Names of the variants that all others are compared with seed by seed."""
        controls = [variant.name for variant in self.variants if variant.attention != "mhla"]
        return self.against or controls or [self.variants[0].name]

    def tasks(self) -> Iterator[Task]:
        """Yield the settings of the task, in the order of the lists."""
        for values in itertools.product(*self.settings.values()):
            yield self.task.replaced(dict(zip(self.settings, values, strict=True)))


class Run(NamedTuple):
    """Training of one variant in one setting with one seed."""

    task: Task
    variant: Variant
    seed: int

    @property
    def record(self) -> dict[str, Any]:
        """Values that say what was run, as JSON holds them."""
        return {"task": self.task.record, "variant": self.variant.record, "seed": self.seed}

    @property
    def key(self) -> tuple[str, str]:
        """Return its task and variant, see :func:`key_of`."""
        return key_of(self.record)

    @property
    def path(self) -> Path:
        """Path of its result: under the variant, by what it was run with."""
        return Path(self.variant.name) / f"{short_hash(self.record)}.json"


def key_of(record: dict[str, Any]) -> tuple[str, str]:
    """Return the task, as JSON, and the variant's name, of a run's record."""
    return json.dumps(record["task"], sort_keys=True), record["variant"]["name"]


def runs_of(comparison: Comparison) -> Iterator[Run]:
    """Yield the runs, all variants of a setting and a seed behind each other, short tasks first."""
    for task in sorted(comparison.tasks(), key=lambda task: (task.tokens, task.steps)):
        for seed in comparison.seeds:
            for variant in comparison.variants:
                yield Run(task, variant, seed)


def screening_runs(comparison: Comparison) -> dict[tuple[str, str], Run]:
    """Return the short runs of a comparison, each by the key of those that it is short of."""
    share, seed = comparison.screen.share, comparison.seeds[0]
    return {
        Run(task, variant, seed).key: Run(task.shortened(share), variant.shortened(share), seed)
        for task in comparison.tasks()
        for variant in comparison.variants
    }
