"""Runs of a comparison: side by side as processes of one thread, each done once, whatever stops them."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import tqdm

from ..files.locking import only_writer
from ..files.writing import write_file
from .config import Comparison, Variant
from .screen import left_out, screening_runs
from .task import Task

logger = logging.getLogger(__name__)


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
        """Return its task and variant, as :func:`.screen.left_out` names them."""
        return json.dumps(self.task.record, sort_keys=True), self.variant.name

    @property
    def path(self) -> Path:
        """Path of its result: under the variant, by what it was run with."""
        text = json.dumps(self.record, sort_keys=True)
        return Path(self.variant.name) / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def runs_of(comparison: Comparison) -> Iterator[Run]:
    """Yield the runs, all variants of a setting and a seed behind each other, short tasks first."""
    for task in sorted(comparison.tasks(), key=lambda task: (task.tokens, task.steps)):
        for seed in comparison.seeds:
            for variant in comparison.variants:
                yield Run(task, variant, seed)


def compare_attention(
    comparison: Comparison, out: Path, *, processes: int = 1, device: str = "cpu", screen: bool = False
) -> list[dict[str, Any]]:
    """Make the runs that are missing.

    A run is a file below ``out``, named by its settings: what was done is not done again, and a comparison
    with other settings or more variants shares what both have. A run that was stopped goes on in its folder
    beside that file.

    Args:
        comparison: see :class:`Comparison`.
        out: folder of the runs.
        processes: that run at a time, each with one thread.
        device: of torch.
        screen: run each variant short and once, and those alone over all seeds that are not clearly beaten,
            see :class:`.screen.Screen`.

    Returns:
        A record of each run that is done: ``task``, ``variant``, ``seed``, ``device`` and the results of
        :meth:`.Task.train`.

    Raises:
        ValueError: for fewer than one process, when another process writes to ``out``, data or networks are
            missing, and, once all others are done, when runs failed, as where a loss is not finite.
    """
    if processes < 1:
        raise ValueError(f"processes must be 1 or more, got {processes}")
    with only_writer(out):
        beaten = set[tuple[str, str]]()
        if screen:
            make(screening_runs(comparison), out, processes=processes, device=device)
            beaten |= set(screened_out(comparison, out))
        runs = [run for run in runs_of(comparison) if run.key not in beaten]
        make(runs, out, processes=processes, device=device)
    return records(comparison, out)


def make(runs: Sequence[Run], out: Path, *, processes: int, device: str) -> None:
    """Make those of the runs that are missing; see :func:`compare_attention`."""
    missing = [run for run in runs if not (out / run.path).exists()]
    logger.info("%d runs, %d of them to be done", len(runs), len(missing))
    for task in {json.dumps(run.task.record): run.task for run in missing}.values():
        task.prepare(out)
    failed: list[str] = []
    with _workers(min(processes, max(1, len(missing))), device) as pool:
        tasks = {pool.submit(_train, run, out, device): run for run in missing}
        for future in tqdm.tqdm(as_completed(tasks), "runs", len(tasks), disable=not tasks):
            run = tasks[future]
            try:
                found = future.result()
            except (ValueError, ArithmeticError) as error:  # of this run: the others go on
                failed.append(f"{run.variant.name}, seed {run.seed}: {error}")
                logger.warning("failed: %s", failed[-1])
                continue
            result = {**run.record, "device": device, **found}
            write_file(out / run.path, json.dumps(result, indent=1) + "\n")
    if failed:
        raise ValueError(f"{len(failed)} of {len(missing)} runs failed, the others are done: {failed[0]}")


@contextmanager
def _workers(processes: int, device: str) -> Iterator[ProcessPoolExecutor]:
    """Processes of one thread each; stopped, they are asked to save what they have and to end."""
    # Forks of a process that has imported everything, and has no threads yet.
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload([__package__])
    with ProcessPoolExecutor(
        processes, mp_context=context, initializer=_start_worker, initargs=(device,)
    ) as pool:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)


def _start_worker(device: str) -> None:
    torch.set_num_threads(1)
    if device == "cpu":  # where there is a GPU, accelerate would take it
        os.environ["ACCELERATE_USE_CPU"] = "true"


def _train(run: Run, out: Path, device: str) -> dict[str, Any]:
    return run.task.train(run.variant, run.seed, (out / run.path).with_suffix(""), device)


def records(comparison: Comparison, out: Path) -> list[dict[str, Any]]:
    """Return the records of the runs that are done."""
    return _read(runs_of(comparison), out)


def screened_out(comparison: Comparison, out: Path) -> dict[tuple[str, str], float]:
    """Return what the short runs that are done leave out, see :func:`.screen.left_out`."""
    return left_out(comparison, _read(screening_runs(comparison), out))


def _read(runs: Iterable[Run], out: Path) -> list[dict[str, Any]]:
    paths = [out / run.path for run in runs]
    return [json.loads(path.read_text()) for path in paths if path.exists()]
