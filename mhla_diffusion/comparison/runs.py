"""Runs of a comparison: side by side as processes of one thread, each done once, whatever stops them."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import tqdm

from ..devices import resolve_device
from ..files.locking import only_writer
from ..files.writing import write_file
from .config import Comparison, Run, key_of, runs_of, screening_runs

logger = logging.getLogger(__name__)


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
        ValueError: for fewer than one process, when there is no such device, another process writes to
            ``out``, data or networks are missing, and, once all others are done, when runs failed, as where a
            loss is not finite.
    """
    if processes < 1:
        raise ValueError(f"processes must be 1 or more, got {processes}")
    device = resolve_device(device)
    with only_writer(out):
        failed, beaten = list[str](), set[tuple[str, str]]()
        if screen:
            short = screening_runs(comparison)
            failed += make(list(short.values()), out, processes=processes, device=device)
            beaten |= {key for key, run in short.items() if not (out / run.path).exists()}
            beaten |= set(screened_out(comparison, out))
        runs = [run for run in runs_of(comparison) if run.key not in beaten]
        failed += make(runs, out, processes=processes, device=device)
    if failed:
        raise ValueError(f"{len(failed)} runs failed, the others are done: {failed[0]}")
    return records(comparison, out)


def make(runs: Sequence[Run], out: Path, *, processes: int, device: str) -> list[str]:
    """Make those of the runs that are missing, and return what failed; see :func:`compare_attention`."""
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
            except BrokenProcessPool:
                raise ValueError(
                    "a process of the runs was killed, as where memory is short: what was done is kept, take "
                    f"fewer --processes than {processes}"
                ) from None
            except Exception as error:  # of this run: the others go on
                failed.append(f"{run.variant.name}, seed {run.seed}: {error}")
                theirs = isinstance(error, (ValueError, ArithmeticError))
                logger.warning("failed: %s", failed[-1], exc_info=None if theirs else error)
                continue
            result = {**run.record, "device": device, **found}
            write_file(out / run.path, json.dumps(result, indent=1) + "\n")
    return sorted(failed)


@contextmanager
def _workers(processes: int, device: str) -> Iterator[ProcessPoolExecutor]:
    """Processes of one thread each; stopped, they are asked to save what they have and to end."""
    # Forks of a process that has imported everything, and has no threads yet. Where a GPU is, that import
    # has asked CUDA for it, after which no fork can use it.
    forks = device == "cpu" and "forkserver" in multiprocessing.get_all_start_methods()
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
            for worker in multiprocessing.active_children():
                worker.terminate()
            pool.shutdown(cancel_futures=True)  # the folder is theirs for as long as they write
            raise
        finally:
            signal.signal(signal.SIGTERM, before)


def _start_worker(device: str) -> None:
    torch.set_num_threads(1)
    if device == "cpu":  # where there is a GPU, accelerate would take it
        os.environ["ACCELERATE_USE_CPU"] = "true"
    parent = multiprocessing.parent_process()
    assert parent is not None, "this runs in processes of the pool"
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process behind the comparison, whatever ended that: a pool leaves workers waiting for ever."""
    wait([parent])
    os.kill(os.getpid(), signal.SIGTERM)  # what is being trained is saved
    with _training:
        os._exit(1)


_training = threading.Lock()
_stopped = False


def _train(run: Run, out: Path, device: str) -> dict[str, Any]:
    """Train in this process, or in none that was stopped: the pool hands it the next run before."""
    global _stopped
    if _stopped:
        raise KeyboardInterrupt
    try:
        with _training:
            return run.task.train(run.variant, run.seed, (out / run.path).with_suffix(""), device)
    except KeyboardInterrupt:
        _stopped = True
        raise


def records(comparison: Comparison, out: Path) -> list[dict[str, Any]]:
    """Return the records of the runs that are done."""
    return _read(runs_of(comparison), out)


def screened_out(comparison: Comparison, out: Path) -> dict[tuple[str, str], float]:
    """Return what the short runs that are done leave out, see :func:`left_out`."""
    return left_out(comparison, _read(screening_runs(comparison).values(), out))


def _read(runs: Iterable[Run], out: Path) -> list[dict[str, Any]]:
    return [_record(path) for path in (out / run.path for run in runs) if path.exists()]


def _record(path: Path) -> dict[str, Any]:
    with suppress(ValueError):
        if isinstance(found := json.loads(path.read_text()), dict):
            return found
    raise ValueError(f"{path} is damaged: remove it, and the run is made again")


def left_out(comparison: Comparison, found: Iterable[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """Return what is clearly beaten: for the record of a task, as JSON, and a variant its value.

    Args:
        comparison: what is screened.
        found: records of its short runs. What is beaten by some is so by all, whichever are missing.
    """
    metric, by_run = comparison.task.metrics[0], {key_of(record): record for record in found}
    beaten: dict[tuple[str, str], float] = {}
    for task in comparison.tasks():
        short = json.dumps(task.shortened(comparison.screen.share).record, sort_keys=True)
        keys = {variant.name: (short, variant.name) for variant in comparison.variants}
        values = {name: by_run[key][metric.key] for name, key in keys.items() if key in by_run}
        whole = json.dumps(task.record, sort_keys=True)
        beaten |= {(whole, name): values[name] for name in comparison.screen.beaten(values, metric)}
    return beaten
