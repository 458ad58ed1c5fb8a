"""What an analysis found, as JSON for programs and as one self-contained page for people."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..files.pages import data_uri, render
from ..files.writing import write_together
from .matrices import MatrixStatistics, MixingAudit, mean_statistics

FILE_NAMES = ("report.json", "report.html")


@dataclass(frozen=True)
class LayerAnalysis:
    """Analysis of one attention layer.

    Args:
        name: of the module.
        kind: ``"mhla"``, ``"linear"`` (one block), ``"softmax"`` or ``"local"`` (with a softmax window): what
            the layer does in the model.
        grid, blocks: of its tokens. For softmax layers the blocks are the recommended ones, with the locality
            start.
        extra: how many tokens beside those of the grid, which are a block of their own.
        rank_bound: what the rank of MHLA cannot exceed, ``min(N, sum_b min(n_b, d))``.
        matrices: of ``softmax``, ``linear`` and ``mhla`` attention on this layer's queries and keys, and of
            ``local`` where that is its kind.
        mixing: of layers that mix.
        mixing_map: PNG of the mixing matrix: one tile for each query block, where it lies on the grid; in it
            the weights of all key blocks, as they lie on the grid (figure 4b). Frames stand side by side.
    """

    name: str
    kind: str
    grid: tuple[int, ...]
    blocks: tuple[int, ...]
    rank_bound: int
    matrices: dict[str, MatrixStatistics]
    mixing: MixingAudit | None = None
    mixing_map: bytes | None = None
    extra: int = 0

    @property
    def num_tokens(self) -> int:
        return math.prod(self.grid) + self.extra

    @property
    def mixing_map_uri(self) -> str | None:
        """Mixing map as a data URI, for a page."""
        if self.mixing_map is None:
            return None
        return data_uri(self.mixing_map)


@dataclass(frozen=True)
class Analysis:
    """Analyses of all attention layers of a model, and what it was called with."""

    layers: list[LayerAnalysis]
    settings: dict[str, Any]

    def mean(self, kind: str) -> MatrixStatistics:
        """Over layers, of the matrices of one kind."""
        return mean_statistics([layer.matrices[kind] for layer in self.layers])

    def to_dict(self) -> dict[str, Any]:
        """Return the content of report.json."""
        layers = [asdict(layer) for layer in self.layers]
        for layer in layers:
            del layer["mixing_map"]
        return {"settings": self.settings, "layers": layers}

    def to_html(self) -> str:
        """Return the content of report.html, which needs no other file and no network.

        Raises:
            ImportError: when jinja2 is not installed.
        """
        return render(__package__, "report.html", analysis=self, log=math.log)

    def save(self, out: str | Path, *, overwrite: bool = False) -> None:
        """Write report.json and report.html to the folder ``out``.

        Raises:
            ValueError: when ``out`` holds a report and ``overwrite`` is false.
        """
        contents = json.dumps(self.to_dict(), indent=2), self.to_html()
        write_together(out, dict(zip(FILE_NAMES, contents, strict=True)), overwrite=overwrite)
