"""Variant: the attention of one row of a comparison's tables."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any

from ..config import WINDOW_ONLY, MHLAConfig
from ..files.text import flat_dict

_STEPS = "trainer.max_steps"

ATTENTIONS = ("softmax", "linear", "mhla")
# Settings of MHLA beside its operator, and those of the operator over one block.
_BESIDE = ("cpe", "qk_conv", "qk_norm", "gate", "output_norm", "layers")
_TAKEN = {"softmax": _BESIDE, "linear": ("feature_map", "normalizer", "center_keys", "eps", *_BESIDE)}


@dataclass(frozen=True)
class Variant:
    """Attention of one row of the table.

    Args:
        name: of the row, and of the folder of its runs.
        attention: ``softmax``, ``linear`` (MHLA with one block) or ``mhla``.
        mhla: settings of :class:`mhla_diffusion.MHLAConfig`; without ``blocks`` they are those of the task.
            Linear attention takes none of blocks and windows, softmax those beside the operator alone.
        training: keys of the training run that are its own, such as
            ``{trainer.optimizer.mixing_rate: 10}``; for tasks that have one.

    Raises:
        ValueError: for a name that is none of a folder, and settings that the attention does not have.
    """

    name: str
    attention: str = "mhla"
    mhla: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\(?\w[\w+. ()-]*", self.name):
            raise ValueError(
                "the name of a variant begins with a letter or digit and has these and +.()_- alone, got "
                f"{self.name!r}"
            )
        if self.attention not in ATTENTIONS:
            raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, got {self.attention!r}")
        taken = _TAKEN.get(self.attention, self.mhla)
        if refused := [name for name in self.mhla if name not in taken]:
            raise ValueError(
                f"{self.name}: {self.attention} attention takes {', '.join(taken)} of the settings in mhla, "
                f"got {', '.join(refused)}"
            )
        try:
            self.config(MHLAConfig().blocks)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error

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

    def shortened(self, share: float) -> Variant:
        """Return it with a share of the steps of its own, if it has some."""
        training = flat_dict(self.training)
        if (steps := training.get(_STEPS)) is None:
            return self
        return replace(self, training=training | {_STEPS: max(1, round(share * steps))})

    @property
    def record(self) -> dict[str, Any]:
        """Values as JSON holds them; those of before there was ``training`` stay what they were."""
        values = {"name": self.name, "attention": self.attention, "mhla": self.mhla}
        return values | ({"training": self.training} if self.training else {})
