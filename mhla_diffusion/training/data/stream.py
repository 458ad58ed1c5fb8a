"""The samples of a run, numbered, and the randomness that belongs to each.

Sample number ``k = step * batch_size + i`` is the i-th of the global batch at that step. Which image it is,
how it is augmented, its time, its noise and whether its label is dropped are functions of the seed and k
alone. So a run is the same on any number of processes, workers and micro-batches, and goes on from any step.
"""

from __future__ import annotations

import atexit
import errno
import itertools
import logging
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

logger = logging.getLogger(__name__)

# What a generator is for; no two share random numbers.
FOR_DATA, FOR_LOSS, FOR_ORDER, FOR_TIME = range(4)


def from_pixels(pixels: Tensor) -> Tensor:
    """Return values 0 to 255 as those of samples, -1 to 1."""
    return pixels.float() / 127.5 - 1


def to_pixels(samples: Tensor) -> Tensor:
    """Return values of samples as uint8, the nearest of -1 to 1."""
    return ((samples + 1) * 127.5).round().clamp(0, 255).byte()


class UnreadableSampleError(Exception):
    """Sample that cannot be decoded; the message names it and says why."""


_OF_DISKS = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EIO, errno.ENODEV, errno.ENXIO),
    *(errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EMFILE, errno.ENFILE),
)


def is_of_disk(error: BaseException | None) -> bool:
    """Return whether a file or its disk is not there, or refuses: what the file holds may be well."""
    while error is not None:
        # FFmpeg's errors are of what a file holds, whatever number they have.
        if isinstance(error, OSError) and not type(error).__module__.startswith("av"):
            return error.errno in _OF_DISKS
        error = error.__cause__
    return False


class SampleSource(Protocol):
    """Source of samples: a map from 0 .. len - 1 to dicts of tensors, numbers and texts."""

    @property
    def buckets(self) -> Sequence[int] | None:
        """Number of the shape of each sample, as a batch has one shape; None when all are alike."""
        ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Return what to call a sample in a message."""
        ...

    def load(self, index: int, generator: torch.Generator) -> Mapping[str, Any]:
        """Sample number ``index``, every random choice drawn from the generator.

        Raises:
            UnreadableSampleError: when it cannot be decoded; training goes on without it.
        """
        ...


def sample_generator(seed: int, number: int, purpose: int) -> torch.Generator:
    """Generator of one sample of a run for one purpose, on the CPU."""
    state = np.random.SeedSequence((seed, number, purpose)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


@dataclass(frozen=True)
class BatchShare:
    """Division of the global batch: process r takes a part of each of the micro-batches.

    Args:
        batch_size: samples per optimizer step, over all processes.
        num_processes, process_index: of the run.
        micro_batches: forward passes per optimizer step.

    Raises:
        ValueError: when the batch does not divide evenly.
    """

    batch_size: int
    num_processes: int = 1
    process_index: int = 0
    micro_batches: int = 1

    def __post_init__(self) -> None:
        parts = self.num_processes * self.micro_batches
        if self.batch_size % parts:
            raise ValueError(
                f"batch_size {self.batch_size} (over all processes) does not divide by {self.num_processes} "
                f"processes x {self.micro_batches} gradient accumulation steps; the nearest that do are "
                f"{max(1, self.batch_size // parts) * parts} and {(self.batch_size // parts + 1) * parts}"
            )

    @property
    def micro_batch_size(self) -> int:
        """Samples per process and forward pass."""
        return self.batch_size // (self.num_processes * self.micro_batches)

    def numbers(self, step: int, micro_batch: int) -> range:
        """Samples of one forward pass of this process."""
        part = micro_batch * self.num_processes + self.process_index
        first = step * self.batch_size + part * self.micro_batch_size
        return range(first, first + self.micro_batch_size)


class StreamSampler(Sampler[list[tuple[int, int]]]):
    """Micro-batches of (sample number, index in the source), each epoch a new permutation.

    An epoch may end inside a batch: the next one fills it up. With buckets, each global batch is of one
    bucket, and a bucket's last batch is filled up from its own first samples.

    Args:
        source: the samples.
        share: how the batch divides.
        steps: the optimizer steps to serve.
        seed: of the run.
    """

    def __init__(self, source: SampleSource, share: BatchShare, steps: range, *, seed: int) -> None:
        self.share, self.steps, self.seed = share, steps, seed
        buckets = torch.as_tensor(source.buckets if source.buckets is not None else [0] * len(source))
        self._members = [torch.nonzero(buckets == bucket).flatten() for bucket in buckets.unique()]
        self._bucketed = len(self._members) > 1
        batches = sum(-(-len(members) // share.batch_size) for members in self._members)
        self._epoch_length = batches * share.batch_size if self._bucketed else len(source)
        self._epoch = -1
        self._order: list[int] = []

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in self.steps:
            for micro_batch in range(self.share.micro_batches):
                yield [(number, self._index(number)) for number in self.share.numbers(step, micro_batch)]

    def _index(self, number: int) -> int:
        epoch, position = divmod(number, self._epoch_length)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = self._permute(sample_generator(self.seed, epoch, FOR_ORDER))
        return self._order[position]

    def _permute(self, generator: torch.Generator) -> list[int]:
        shuffled = [members[torch.randperm(len(members), generator=generator)] for members in self._members]
        if not self._bucketed:
            return shuffled[0].tolist()
        size = self.share.batch_size
        whole = [members.repeat(-(-size // len(members)) + 1) for members in shuffled]
        batches = [
            batch
            for members, repeated in zip(shuffled, whole, strict=True)
            for batch in repeated[: -(-len(members) // size) * size].split(size)
        ]
        order = torch.randperm(len(batches), generator=generator)
        return torch.cat([batches[i] for i in order]).tolist()


class _NumberedSamples(Dataset[Any]):
    """A source read by (sample number, index)."""

    def __init__(self, source: SampleSource, seed: int) -> None:
        self.source = source
        self.seed = seed

    def __getitem__(self, item: tuple[int, int]) -> tuple[int, Mapping[str, Any], list[tuple[int, str]]]:
        number, index = item
        sample, _, unreadable = load_readable(
            self.source, index, lambda: sample_generator(self.seed, number, FOR_DATA)
        )
        return number, sample, unreadable


def load_readable(
    source: SampleSource, index: int, draw: Callable[[], torch.Generator]
) -> tuple[Mapping[str, Any], torch.Generator, list[tuple[int, str]]]:
    """Load a sample, or in its place the next of its bucket that can be read.

    Args:
        source: of the samples.
        index: of the sample.
        draw: makes the generator that a sample is loaded with.

    Returns:
        The sample, the generator behind it, and the number and reason of each that cannot be read.

    Raises:
        ValueError: when none can.
    """
    unreadable: list[tuple[int, str]] = []
    for candidate in _candidates(source, index):
        generator = draw()
        try:
            return source.load(candidate, generator), generator, unreadable
        except UnreadableSampleError as error:
            unreadable.append((candidate, str(error)))
    raise ValueError(f"none of the {len(unreadable)} samples can be read, first {unreadable[0][1]}")


def _candidates(source: SampleSource, index: int) -> Iterator[int]:
    buckets, count = source.buckets, len(source)
    for candidate in itertools.chain(range(index, count), range(index)):
        if buckets is None or buckets[candidate] == buckets[index]:
            yield candidate


class SampleStream:
    """Batches of one process for a range of steps.

    Args:
        source: the data.
        share: how the batch divides.
        steps: the optimizer steps to serve, ``range(first, last)``.
        seed: of the run.
        num_workers: processes that read ahead; 0 reads in this one.
        pin_memory: see :class:`torch.utils.data.DataLoader`.
        unreadable: what could not be read so far, by number in the source; it grows.
    """

    def __init__(
        self,
        source: SampleSource,
        share: BatchShare,
        steps: range,
        *,
        seed: int,
        num_workers: int = 0,
        pin_memory: bool = False,
        unreadable: dict[int, str] | None = None,
    ) -> None:
        self.unreadable = {} if unreadable is None else unreadable
        self._loader = DataLoader(
            _NumberedSamples(source, seed),
            batch_sampler=StreamSampler(source, share, steps, seed=seed),
            num_workers=num_workers,
            pin_memory=pin_memory,
            collate_fn=_collate,
            worker_init_fn=_leave_signals_to_parent,
            # Its own, as a loader draws a seed when it starts and would move the global one.
            generator=torch.Generator(),
        )

    def __iter__(self) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """``(sample numbers, batch)``, a batch being a dict of tensors with one row per sample."""
        batches = iter(self._loader)
        # Workers do not hear SIGTERM, by which multiprocessing ends those that an error leaves, and waits for
        # them for ever.
        end = getattr(batches, "_shutdown_workers", lambda: None)
        atexit.register(end)
        try:
            for numbers, batch, unreadable in batches:
                for index, message in unreadable:
                    if index not in self.unreadable:
                        self.unreadable[index] = message
                        logger.warning("skipped, number %d: %s", len(self.unreadable), message)
                yield numbers, batch
        except ValueError as error:  # which torch puts the traceback of a worker in
            raise ValueError(str(error).rpartition("ValueError: ")[2].strip()) from error
        finally:
            atexit.unregister(end)
            end()


def _collate(
    items: list[tuple[int, Mapping[str, Any], list[tuple[int, str]]]],
) -> tuple[list[int], Any, list[tuple[int, str]]]:
    numbers, samples, unreadable = zip(*items, strict=True)
    return list(numbers), default_collate(list(samples)), [line for lines in unreadable for line in lines]


def _leave_signals_to_parent(worker_id: int) -> None:
    # Ctrl-C reaches the whole process group. The trainer still needs its workers to finish the step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
