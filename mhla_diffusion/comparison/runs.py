"""Runs of a comparison: side by side as processes of one thread, each done once, whatever stops them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch
import tqdm

from ..files.locking import only_writer
from ..files.writing import write_file
from .config import Comparison, Recall, Variant
from .recall import train_recall

logger = logging.getLogger(__name__)


class Run(NamedTuple):
    """Training of one variant in one setting with one seed."""

    task: Recall
    variant: Variant
    seed: int

    @property
    def record(self) -> dict[str, Any]:
        """Values that say what was run, as JSON holds them."""
        return {
            "task": dataclasses.asdict(self.task),
            "variant": dataclasses.asdict(self.variant),
            "seed": self.seed,
        }

    @property
    def path(self) -> Path:
        """Path of its result: under the variant, by what it was run with."""
        text = json.dumps(self.record, sort_keys=True)
        return Path(self.variant.name) / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def runs_of(comparison: Comparison) -> Iterator[Run]:
    """Yield the runs, all variants of a setting and a seed behind each other, short tasks first."""
    for task in sorted(comparison.tasks(), key=lambda task: (task.side, task.steps)):
        for seed in comparison.seeds:
            for variant in comparison.variants:
                yield Run(task, variant, seed)


def compare_attention(
    comparison: Comparison, out: Path, *, processes: int = 1, device: str = "cpu"
) -> list[dict[str, Any]]:
    """Make the runs that are missing.

    A run is a file below ``out``, named by its settings: what was done is not done again, and a comparison
    with other settings or more variants shares what both have.

    Args:
        comparison: see :class:`Comparison`.
        out: folder of the runs.
        processes: that run at a time, each with one thread.
        device: of torch.

    Returns:
        A record of each run: ``task``, ``variant``, ``seed``, ``device`` and the results of
        :func:`train_recall`.

    Raises:
        ValueError: for fewer than one process, and when another process writes to ``out``.
    """
    if processes < 1:
        raise ValueError(f"processes must be 1 or more, got {processes}")
    missing = [run for run in runs_of(comparison) if not (out / run.path).exists()]
    logger.info(
        "%s: %d runs, %d of them to be done", comparison.name, len(list(runs_of(comparison))), len(missing)
    )
    with only_writer(out):
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(
            processes, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            tasks = {pool.submit(train_recall, *run, device): run for run in missing}
            try:
                for future in tqdm.tqdm(as_completed(tasks), "runs", len(tasks), disable=not tasks):
                    run = tasks[future]
                    result = {**run.record, "device": device, **future.result()}
                    write_file(out / run.path, json.dumps(result, indent=1) + "\n")
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return records(comparison, out)


def records(comparison: Comparison, out: Path) -> list[dict[str, Any]]:
    """Return the records of the runs that are done."""
    paths = [out / run.path for run in runs_of(comparison)]
    return [json.loads(path.read_text()) for path in paths if path.exists()]
