"""What a comparison is: variants of attention, settings of a task, and seeds."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..config import MHLAConfig

ATTENTIONS = ("softmax", "linear", "mhla")
DISTANCES = ("near", "far", "anywhere")


@dataclass(frozen=True)
class Variant:
    """Attention of one row of the table.

    Args:
        name: of the row, and of the folder of its runs.
        attention: ``softmax``, ``linear`` (MHLA with one block) or ``mhla``.
        mhla: settings of :class:`mhla_diffusion.MHLAConfig`; without ``blocks`` they are those of the task.
    """

    name: str
    attention: str = "mhla"
    mhla: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w+. ()-]+", self.name):
            raise ValueError(f"the name of a variant has letters, digits and +.()_- alone, got {self.name!r}")
        if self.attention not in ATTENTIONS:
            raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, got {self.attention!r}")
        MHLAConfig.from_dict(self.mhla)

    def config(self, task: Recall) -> MHLAConfig | None:
        """Settings of the layers for a task, None for softmax."""
        if self.attention == "softmax":
            return None
        if self.attention == "linear":
            return MHLAConfig.from_dict({**self.mhla, "blocks": 1})
        return MHLAConfig.from_dict({"blocks": [task.blocks, task.blocks], **self.mhla})


@dataclass(frozen=True)
class Recall:
    """Associative recall on a grid.

    Each cell carries a key, a random direction, and one of ``values`` values. ``queries`` cells show the key
    of another cell and no value: the answer is the value of that cell. Chance is right in 1 of ``values``.

    Args:
        side: the grid is ``side x side``.
        distance: where the other cell lies: ``near`` (in the query's block), ``far`` (in another block) or
            ``anywhere``.
        head_dim: d; N / d says how many associations a summary has to hold for each of its columns.
        blocks: along each axis, of the task and of MHLA.
        heads, layers, key_dim, values, queries: of model and task.
        steps, batch_size, learning_rate: of training, AdamW with a cosine schedule.
    """

    side: int = 16
    distance: str = "anywhere"
    head_dim: int = 32
    blocks: int = 4
    heads: int = 2
    layers: int = 2
    key_dim: int = 16
    values: int = 16
    queries: int = 32
    steps: int = 1500
    batch_size: int = 32
    learning_rate: float = 2e-3

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if name != "distance" and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value!r}")
        if self.distance not in DISTANCES:
            raise ValueError(f"distance must be one of {', '.join(DISTANCES)}, got {self.distance!r}")
        if self.blocks < 2 or self.side % self.blocks:
            raise ValueError(
                f"blocks must be 2 or more and divide side, got {self.blocks} blocks on a side of {self.side}"
            )
        if self.queries > self.side**2 // 2:
            raise ValueError(
                f"queries may be half of the {self.side**2} cells, as the others answer, got {self.queries}"
            )


@dataclass(frozen=True)
class Comparison:
    """Every variant in every setting with every seed.

    Args:
        name: of the page.
        variants: rows of the tables.
        task: settings that all runs share, see :class:`Recall`.
        settings: lists of values of the task's settings, which are combined: ``{"side": [16, 32]}``.
        seeds: of data and weights; the same for all variants. Three or more, or nothing is claimed.
    """

    name: str
    variants: list[Variant]
    task: Recall = Recall()
    settings: dict[str, list[Any]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])

    def __post_init__(self) -> None:
        names = [variant.name for variant in self.variants]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"variants must have names of their own, got {names}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be one or more and all different, got {self.seeds}")
        if not self.settings or not all(self.settings.values()):
            raise ValueError(
                f"settings need a list of one value or more, such as side: [16], got {self.settings}"
            )
        known = {f.name for f in dataclasses.fields(Recall)}
        if unknown := sorted(set(self.settings) - known):
            raise ValueError(
                f"unknown settings {', '.join(unknown)}; the task has {', '.join(sorted(known))}"
            )
        for task in self.tasks():  # refuses what cannot be, before anything runs
            for variant in self.variants:
                if (config := variant.config(task)) is not None:
                    config.layout((task.side, task.side))

    def tasks(self) -> Iterator[Recall]:
        """Yield the settings of the task, in the order of the lists."""
        for values in itertools.product(*self.settings.values()):
            yield dataclasses.replace(self.task, **dict(zip(self.settings, values, strict=True)))
