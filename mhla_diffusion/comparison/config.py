"""What a comparison is: variants of attention, a task and its settings, and seeds."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..config import WINDOW_ONLY, MHLAConfig
from .screen import Screen
from .task import Task, task_of

ATTENTIONS = ("softmax", "linear", "mhla")


@dataclass(frozen=True)
class Variant:
    """Attention of one row of the table.

    Args:
        name: of the row, and of the folder of its runs.
        attention: ``softmax``, ``linear`` (MHLA with one block) or ``mhla``.
        mhla: settings of :class:`mhla_diffusion.MHLAConfig`; without ``blocks`` they are those of the task.
            Softmax takes those beside the operator, such as cpe, gate and qk_norm.
        training: keys of the training run that are its own, such as
            ``{trainer.optimizer.mixing_rate: 10}``; for tasks that have one.
    """

    name: str
    attention: str = "mhla"
    mhla: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w+. ()-]+", self.name):
            raise ValueError(f"the name of a variant has letters, digits and +.()_- alone, got {self.name!r}")
        if self.attention not in ATTENTIONS:
            raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, got {self.attention!r}")
        self.config(MHLAConfig().blocks)

    def config(self, blocks: Any) -> MHLAConfig | None:
        """Settings of the layers, None for softmax with nothing beside it.

        Args:
            blocks: of MHLA where the variant does not say its own.
        """
        if self.attention == "mhla":
            return MHLAConfig.from_dict({"blocks": blocks, **self.mhla})
        if self.attention == "linear":
            return MHLAConfig.from_dict({**self.mhla, "blocks": 1})
        return MHLAConfig.from_dict({**self.mhla, "blocks": 1, "local": WINDOW_ONLY}) if self.mhla else None

    @property
    def record(self) -> dict[str, Any]:
        """Values as JSON holds them; those of before there was ``training`` stay what they were."""
        values = {"name": self.name, "attention": self.attention, "mhla": self.mhla}
        return values | ({"training": self.training} if self.training else {})


@dataclass(frozen=True)
class Comparison:
    """Every variant in every setting with every seed.

    Args:
        name: of the page.
        variants: rows of the tables.
        task: settings that all runs share: ``kind``, recall by default, images or videos, and those of
            :class:`Recall`, :class:`Images` or :class:`Videos`.
        settings: lists of values of the task's settings, which are combined: ``{"side": [16, 32]}``.
        seeds: of data and weights; the same for all variants. Three or more, or nothing is claimed.
        screen: rule of ``--screen``, see :class:`.screen.Screen`.
    """

    name: str
    variants: list[Variant]
    task: Any = field(default_factory=dict)
    settings: dict[str, list[Any]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    screen: Screen = field(default_factory=Screen)

    def __post_init__(self) -> None:
        names = [variant.name for variant in self.variants]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"variants must have names of their own, got {names}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be one or more and all different, got {self.seeds}")
        if not all(isinstance(values, list) and values for values in self.settings.values()):
            raise ValueError(
                f"settings need a list of one value or more, such as side: [16], got {self.settings}"
            )
        if unknown := sorted(set(self.screen.keep) - set(names)):
            raise ValueError(f"screen.keep must name variants, got {', '.join(unknown)}")
        object.__setattr__(self, "task", task_of(self.task))
        for task in self.tasks():  # refuses what cannot be, before anything runs
            for variant in self.variants:
                task.check(variant, variant.config(task.default_blocks))

    def tasks(self) -> Iterator[Task]:
        """Yield the settings of the task, in the order of the lists."""
        for values in itertools.product(*self.settings.values()):
            yield self.task.replaced(dict(zip(self.settings, values, strict=True)))
