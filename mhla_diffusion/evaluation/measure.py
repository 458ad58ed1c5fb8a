"""One pass over a set of images or clips: features, their statistics, and what was scored."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from numpy.typing import NDArray
from tqdm.auto import tqdm

from ..files.arrays import require_regular
from ..files.sums import file_sha256
from ..processes import process_state
from .networks.extractor import FeatureExtractor
from .scores.frechet import FeatureStatistics, RunningStatistics
from .scores.metrics import Measured
from .sets.samples import (
    EARLIER_CONVERSIONS,
    Pixels,
    SampleKind,
    SampleSet,
    SetSummary,
    SkippedFile,
    one_if_large,
)
from .store import CachedSample, FeatureCache, FeatureFile, Row

logger = logging.getLogger(__name__)

MAX_BYTES = 256 << 20
"""Of prepared samples that wait, and of one forward pass: samples may have a hundred million pixels."""


@dataclass(frozen=True)
class PassSettings:
    """Settings of a pass over a set.

    Args:
        batch_size: samples in one forward pass; changes the score by rounding only.
        num_workers: threads that decode and resize; one per CPU core, at most 8, when None.
        max_skipped: share of a set that may be unreadable; more is an error.
        cache: folder of features that earlier runs found and later ones will need; None for no cache.

    Raises:
        ValueError: for a value out of its range.
    """

    batch_size: int = 16
    num_workers: int | None = None
    max_skipped: float = 0.01
    cache: str | Path | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1 or (self.num_workers is not None and self.num_workers < 1):
            raise ValueError(
                f"batch_size and num_workers must be at least 1, got {self.batch_size} and {self.num_workers}"
            )
        if not 0 <= self.max_skipped <= 1:
            raise ValueError(f"max_skipped is a share and must be in [0, 1], got {self.max_skipped}")


@dataclass(frozen=True)
class Pass:
    """Result of one pass over a set.

    Args:
        measured: by the name of the extractor.
        summary: what was scored.
        indices: of the scored samples in the set, in order.
        digests: hashes of their pixels.
    """

    measured: dict[str, Measured]
    summary: SetSummary
    indices: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)


@dataclass
class _Row:
    """Sample on its way: first what to compute features from, then the features, by extractor."""

    name: str
    digest: bytes = b""
    error: str | None = None
    key: str = ""
    recalled: bool = False
    size: tuple[int, int] | None = None
    prepared: dict[str, NDArray[Any]] = field(default_factory=dict)
    features: dict[str, Row] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Memory that what is prepared takes."""
        return sum(values.nbytes for values in self.prepared.values())


def measure(
    samples: SampleSet,
    extractors: Sequence[FeatureExtractor],
    settings: PassSettings,
    *,
    title: str,
    scratch: Path | None = None,
) -> Pass:
    """Pass over a set once, with all extractors.

    Of several processes each takes every so many-th batch, and the first has the result; the others have one
    without samples.

    Args:
        title: of the set, in logs.
        scratch: folder for features, which are not kept in memory; None to keep statistics alone.

    Raises:
        ValueError: when fewer than two samples or less than ``1 - max_skipped`` of them can be read, or
            features are not finite.
    """
    found = _Found(samples, [_Collected(extractor, scratch, title) for extractor in extractors], title)
    shown = process_state().is_main_process
    with (
        nullcontext() if settings.cache is None else closing(FeatureCache(settings.cache)) as cache,
        tqdm(total=len(samples.names), desc=title, unit=samples.kind.name, disable=not shown) as progress,
    ):
        for rows in _rows(samples, extractors, settings, cache):
            found.add(rows, settings.max_skipped)
            progress.update(len(rows))
    return found.finish()


class _Found:
    """Samples that were read so far, and those that could not be."""

    def __init__(self, samples: SampleSet, collected: list[_Collected], title: str) -> None:
        self.samples, self.collected, self.title = samples, collected, title
        self.main = process_state().is_main_process
        self.fingerprint = hashlib.sha256()
        self.skipped: list[SkippedFile] = []
        self.indices: list[int] = []
        self.digests: list[bytes] = []
        self.sizes = Counter[str]()

    def add(self, rows: list[_Row], max_skipped: float) -> None:
        """Add the next rows of the set."""
        for index, row in enumerate(rows, len(self.indices) + len(self.skipped)):
            if row.error is None:
                self.indices.append(index)
                self.digests.append(row.digest)
                self.fingerprint.update(row.digest)
                self.sizes[" x ".join(map(str, row.size)) if row.size else "unknown"] += 1
            else:
                self.skipped.append(SkippedFile(row.name, row.error))
                if self.main:
                    logger.warning("%s: skipped %s: %s", self.title, row.name, row.error)
        self._refuse_too_many_skipped(max_skipped)
        if self.main:
            good = [row for row in rows if row.error is None]
            for part in self.collected:
                part.add([row.features[part.extractor.name] for row in good])

    def _refuse_too_many_skipped(self, share: float) -> None:
        samples, skipped = self.samples, self.skipped
        if len(skipped) > share * len(samples.names) and len(skipped) < len(samples.names) - 1:
            raise ValueError(
                f"{len(skipped)} of the {len(samples.names):,} {samples.kind.name}s in {samples.path} could "
                f"not be read, more than the share max_skipped = {share:g}; the first, {skipped[0].file}: "
                f"{skipped[0].reason}. Mend the set, or score the rest by a larger max_skipped"
            )

    def finish(self) -> Pass:
        """Return what the whole pass found."""
        samples, skipped = self.samples, self.skipped
        if len(self.indices) < 2:
            cause = f" (the first that is not, {skipped[0].file}: {skipped[0].reason})" if skipped else ""
            raise ValueError(
                f"{samples.path} has {len(self.indices)} readable {samples.kind.name}(s) of "
                f"{len(samples.names)}{cause}; a covariance needs at least 2"
            )
        summary = SetSummary(
            source=str(samples.path),
            count=len(self.indices),
            fingerprint=self.fingerprint.hexdigest(),
            skipped=skipped,
            duplicates=len(self.digests) - len(set(self.digests)),
            unlisted=samples.unlisted,
            manifest=samples.manifest,
            left_out=samples.left_out,
            frame_rates=samples.frame_rates,
            sizes=dict(self.sizes.most_common()),
        )
        prompts = [samples.prompts.get(samples.names[index]) for index in self.indices]
        parts = self.collected if self.main else []
        measured = {part.extractor.name: part.finish(summary, samples, prompts) for part in parts}
        return Pass(measured, summary, self.indices, self.digests)


class _Collected:
    """Features and statistics that one extractor gave so far."""

    def __init__(self, extractor: FeatureExtractor, scratch: Path | None, title: str) -> None:
        self.extractor = extractor
        self.running: dict[str, RunningStatistics] = {}
        self.files: dict[str, FeatureFile] = {}
        self.place = None if scratch is None else scratch / f"{title}-{extractor.name}"

    def add(self, rows: list[Row]) -> None:
        """Add the rows of one batch."""
        for output in self.extractor.outputs if rows else ():
            values = np.stack([row[output] for row in rows])
            if output != "logits":
                dimension = self.extractor.dimension if output == "features" else values.shape[1]
                if output not in self.running:
                    self.running[output] = RunningStatistics(dimension, ddof=self.extractor.ddof)
                self.running[output].update(values)
            if self.place is not None:
                if output not in self.files:
                    self.files[output] = FeatureFile(self.place.with_name(f"{self.place.name}-{output}"))
                self.files[output].append(values)

    def finish(self, summary: SetSummary, samples: SampleSet, prompts: list[str | None]) -> Measured:
        """Return statistics and features of the whole set."""
        spatial, running = self.running.get("spatial"), self.running["features"]
        statistics = FeatureStatistics(
            running.mean,
            running.covariance,
            count=running.count,
            extractor=self.extractor.name,
            weights_sha256=self.extractor.weights_sha256,
            fingerprint=summary.fingerprint,
            sampling=samples.kind.sampling,
            reading=how_read(self.extractor, samples.kind),
            spatial=None if spatial is None else FeatureStatistics(spatial.mean, spatial.covariance),
        )
        features = {name: file.read() for name, file in self.files.items()}
        return Measured(statistics, features, prompts=prompts, group=samples.group)


def _rows(
    samples: SampleSet,
    extractors: Sequence[FeatureExtractor],
    settings: PassSettings,
    cache: FeatureCache | None,
) -> Iterator[list[_Row]]:
    """Yield all samples with features, in the order of the set: batches of one process after the other."""
    state = process_state()
    own = _own_rows(samples, extractors, settings, cache)
    rounds = -(-len(samples.names) // (settings.batch_size * state.num_processes))
    for _ in range(rounds):
        rows = list[_Row]()
        for part in _parts(islice(own, settings.batch_size)):
            _add_features(part, extractors)
            rows += part
        if cache is not None:
            _remember(rows, extractors, samples.kind, cache)
        yield rows if state.num_processes == 1 else gather_object(rows)


def _parts(rows: Iterator[_Row]) -> Iterator[list[_Row]]:
    """Cut a batch where what is prepared of it becomes large, as photos and long clips do."""
    part, size = list[_Row](), 0
    for row in rows:
        if part and size + row.nbytes > MAX_BYTES:
            yield part
            part, size = [], 0
        part.append(row)
        size += row.nbytes
    if part:
        yield part


def _own_rows(
    samples: SampleSet,
    extractors: Sequence[FeatureExtractor],
    settings: PassSettings,
    cache: FeatureCache | None,
) -> Iterator[_Row]:
    """Yield this process's samples, batch after batch; threads prepare the next ones while one is used."""
    state, load = process_state(), _Loader(samples, extractors, cache)
    workers = settings.num_workers or min(os.cpu_count() or 1, 8)
    pending: deque[Future[_Row]] = deque()
    # How large samples are is known once one is there.
    largest, ahead = 1, min(workers, 2 * settings.batch_size)
    # Pillow, PyAV and hashlib release the interpreter lock, so threads use all cores and copy nothing.
    with ThreadPoolExecutor(workers) as pool:
        for number, (name, read) in enumerate(zip(samples.names, samples.readers(), strict=True)):
            if number // settings.batch_size % state.num_processes != state.process_index:
                continue
            while len(pending) >= ahead:
                row = pending.popleft().result()
                largest = max(largest, row.nbytes)
                ahead = max(1, min(2 * settings.batch_size, MAX_BYTES // largest))
                yield row
            pending.append(pool.submit(load, name, read))
        while pending:
            yield pending.popleft().result()


class _Loader:
    """Reads and prepares samples, or finds their features in the cache; called in any thread."""

    def __init__(
        self, samples: SampleSet, extractors: Sequence[FeatureExtractor], cache: FeatureCache | None
    ) -> None:
        self.samples, self.extractors, self.cache = samples, extractors, cache
        self.by_name = samples.kind.sampling is not None

    def __call__(self, name: str, read: Callable[[], Pixels]) -> _Row:
        row, file = _Row(name), self.samples.file(name)
        try:
            if self.cache is not None and file is not None:
                row.key = self._key(name, file)
        except (OSError, ValueError) as error:
            row.error = f"{type(error).__name__}: {error}"
            return row
        if row.key and self._recall(row):
            return row
        try:
            pixels = read()
        except ImportError:  # a decoder that is not installed is not the file's fault
            raise
        except Exception as error:  # on a broken file Pillow's plugins raise whatever they stumble over
            row.error = f"{type(error).__name__}: {error}"
            return row
        digest = hashlib.sha256(str(pixels.shape).encode())
        digest.update(np.ascontiguousarray(pixels).data)
        row.digest, row.size = digest.digest(), pixels.shape[-3:-1]
        if self.cache is not None:
            row.key = row.key or row.digest.hex()
            if (file is None and self._recall(row)) or self._recall(row, row.digest):
                return row
        with one_if_large(pixels.nbytes):
            row.prepared = {extractor.name: extractor.prepare(pixels) for extractor in self.extractors}
        return row

    def _key(self, name: str, file: Path) -> str:
        key = file_sha256(require_regular(file))
        if not self.by_name:
            return key
        # Where in a video its clip begins depends on the file's name too, which need not be text.
        called = name if self.samples.names_repeat else file.name
        return f"{key} {called.encode('utf-8', 'backslashreplace').decode()}"

    def _recall(self, row: _Row, of_pixels: bytes | None = None) -> bool:
        """Take the features from the cache, if those of all extractors are there.

        Args:
            of_pixels: the hash of the sample's pixels, for features of earlier versions, which read some
                pictures otherwise: they hold where the pixels are the same.
        """
        assert self.cache is not None
        kind = self.samples.kind
        if of_pixels is not None:
            kind = replace(kind, conversion=EARLIER_CONVERSIONS["video" if self.by_name else "image"])
        for extractor in self.extractors:
            dimensions = {
                output: extractor.dimension if output == "features" else None for output in extractor.outputs
            }
            known = self.cache.find(_cache_protocol(extractor, kind), row.key, dimensions)
            if known is None or of_pixels not in (None, known.digest):
                return False
            row.digest, row.features[extractor.name] = known.digest, known.features
            row.size = row.size or known.size
        row.recalled = of_pixels is None  # what is found so is kept anew
        return True


def _add_features(rows: list[_Row], extractors: Sequence[FeatureExtractor]) -> None:
    """Run each extractor on what was prepared for it, samples of equal shape together."""
    for extractor in extractors:
        waiting = [row for row in rows if extractor.name in row.prepared]
        for _, group in groupby(waiting, key=lambda row: row.prepared[extractor.name].shape):
            equal = list(group)
            found = extractor.extract(np.stack([row.prepared[extractor.name] for row in equal]))
            for i, row in enumerate(equal):
                row.features[extractor.name] = {output: found[output][i] for output in extractor.outputs}
    for row in rows:
        row.prepared = {}


def how_read(extractor: FeatureExtractor, kind: SampleKind) -> str:
    """Return how pixels become what an extractor is given, in words."""
    return "; ".join((kind.conversion, extractor.resize, extractor.normalization))


def _cache_protocol(extractor: FeatureExtractor, kind: SampleKind) -> str:
    """Return everything besides the file that features depend on."""
    parts = (extractor.name, extractor.weights_sha256, extractor.resize, extractor.normalization)
    return "\n".join((*parts, kind.conversion, kind.sampling or ""))


def _remember(
    rows: list[_Row], extractors: Sequence[FeatureExtractor], kind: SampleKind, cache: FeatureCache
) -> None:
    for extractor in extractors:
        new = [
            (row.key, CachedSample(row.digest, row.features[extractor.name], row.size))
            for row in rows
            if row.error is None and not row.recalled
        ]
        cache.store(_cache_protocol(extractor, kind), new)
