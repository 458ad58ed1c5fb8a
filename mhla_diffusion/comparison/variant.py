"""Variant: the attention of one row of a comparison's tables."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from ..config import WINDOW_ONLY, MHLAConfig

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
