"""Features on disk for the time of a run, and in a cache from one run to the next."""

from __future__ import annotations

import logging
import sqlite3
import threading
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..files.writing import disk_errors, require_folder, require_writable

logger = logging.getLogger(__name__)

Row = Mapping[str, NDArray[np.float32]]
"""What an extractor gives of one sample: its outputs by name, ``[d]`` each."""


class FeatureFile:
    """File of features that are written row by row and read as one array, without being held in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._dimension = 0

    def append(self, rows: NDArray[np.float32]) -> None:
        """Add ``[B, d]``."""
        self._dimension = rows.shape[1]
        with disk_errors(self.path), open(self.path, "ab") as file:
            file.write(np.ascontiguousarray(rows, dtype=np.float32).tobytes())

    def read(self) -> NDArray[np.float32]:
        """Read all rows, ``[N, d]``; the system reads the parts that are used. Changes stay in memory."""
        return np.memmap(self.path, np.float32, mode="c").reshape(-1, self._dimension)


@dataclass(frozen=True)
class CachedSample:
    """Record of a sample from an earlier run: the hash of its pixels, its features, its height and width."""

    digest: bytes
    features: Row
    size: tuple[int, int] | None = None


class FeatureCache:
    """Cache of features, by the hash of the file and everything that they depend on besides it.

    A SQLite file in ``folder``: what was stored is there after a crash, nothing else, and several processes
    may use it at once.

    Raises:
        ValueError: when ``folder`` is a file, or holds another kind of cache.
    """

    def __init__(self, folder: str | Path) -> None:
        require_writable(Path(folder))
        path = require_folder(folder) / "features.sqlite"
        self._lock, self._path = threading.Lock(), path
        try:
            self._connection = sqlite3.connect(path, timeout=60, check_same_thread=False)
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS features (protocol TEXT, sample TEXT, output TEXT, digest BLOB, "
                "data BLOB, PRIMARY KEY (protocol, sample, output)) WITHOUT ROWID"
            )
            for column in ("checksum INTEGER", "height INTEGER", "width INTEGER"):
                with suppress(sqlite3.OperationalError):  # it is there, but for caches of earlier versions
                    self._connection.execute(f"ALTER TABLE features ADD COLUMN {column}")
        except sqlite3.DatabaseError as error:
            raise self._error(error) from error

    def find(self, protocol: str, sample: str, dimensions: Mapping[str, int | None]) -> CachedSample | None:
        """Find what is stored of a sample; None when nothing is, or it is damaged, which is logged.

        Args:
            dimensions: length of each output that is expected, None where any is.

        Raises:
            ValueError: when the file is damaged as a whole.
        """
        query = (
            "SELECT output, digest, data, checksum, height, width FROM features "
            "WHERE protocol = ? AND sample = ?"
        )
        try:
            with self._lock:
                found = self._connection.execute(query, (protocol, sample)).fetchall()
        except sqlite3.DatabaseError as error:
            raise self._error(error) from error
        if not found:
            return None
        known = [
            (output, digest, np.frombuffer(data, np.float32))
            for output, digest, data, checksum, _, _ in found
            if len(digest) == 32 and len(data) % 4 == 0 and checksum in (None, _checksum(digest, data))
        ]
        features = {output: values for output, _, values in known if np.isfinite(values).all()}
        for output, dimension in dimensions.items():
            if output not in features or dimension not in (None, len(features[output])):
                logger.warning("%s: what is kept of %s is damaged; it is computed again", self._path, sample)
                return None
        height, width = found[0][4:]
        return CachedSample(known[0][1], features, None if height is None else (height, width))

    def store(self, protocol: str, samples: Iterable[tuple[str, CachedSample]]) -> None:
        """Keep samples, all or none.

        Raises:
            OSError: when the disk is full.
            ValueError: when the file is damaged as a whole.
        """
        rows = []
        for sample, known in samples:
            for output, values in known.features.items():
                data = np.asarray(values, np.float32).tobytes()
                checksum = _checksum(known.digest, data)
                rows.append(
                    (protocol, sample, output, known.digest, data, checksum, *(known.size or (None, None)))
                )
        try:
            with self._lock, self._connection:
                self._connection.executemany(
                    "INSERT OR REPLACE INTO features "
                    "(protocol, sample, output, digest, data, checksum, height, width) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    rows,
                )
        except sqlite3.DatabaseError as error:
            raise self._error(error) from error

    def _error(self, error: sqlite3.DatabaseError) -> Exception:
        """Tell a file that is none of ours, or damaged, from a disk that is full or cannot be read."""
        if isinstance(error, sqlite3.OperationalError):
            return OSError(
                f"the cache {self._path} cannot be used ({error}): is the disk full, or read-only?"
            )
        return ValueError(f"{self._path} is not a cache of features, or damaged ({error}): remove it")

    def close(self) -> None:
        """Release the file."""
        self._connection.close()


def _checksum(digest: bytes, data: bytes) -> int:
    return zlib.crc32(data, zlib.crc32(digest))
