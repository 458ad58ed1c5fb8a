"""Data set computed once and kept in files: written by several processes, resumably, and read row by row.

A cache is a folder of ``latents-00000.safetensors`` and so on, each with the tensors of some rows, named
``<row in the file>.<name>``, and ``cache.json``, a record of what it was made from. The metadata of a file
has a hash of each tensor and of its place in the cache, which is checked whenever the tensor is read.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from ...files.locking import only_writer
from ...files.sums import short_hash
from ...files.text import changes
from ...files.writing import write_file
from ...processes import in_first_process, one_fate, process_state, wait_for_all
from ..config import as_dict, with_later_fields
from .fingerprint import file_content, fingerprint
from .stream import UnreadableSampleError

logger = logging.getLogger(__name__)

_RECORD = "cache.json"

Row = Mapping[str, Tensor]


class Shards:
    """Rows of a finished cache.

    Attributes:
        record: what it was made from.
        files: in the order of their rows.

    Raises:
        ValueError: when there is no cache, it is not finished, one of its files is damaged so that it cannot
            be opened, or it has no rows.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / _RECORD).is_file():
            raise ValueError(f"{path} holds no latent cache; make one with mhla cache-latents")
        self.record: dict[str, Any] = read_record(self.path)
        if "id" not in self.record:
            logger.warning("%s has no hashes, as earlier versions wrote none: it cannot be checked", path)
        self.files = [_shard(self.path, number) for number in range(self.record["num_shards"])]
        if missing := [file for file in self.files if not file.is_file()]:
            raise ValueError(
                f"latent cache {path} lacks {len(missing)} of {len(self.files)} files; run "
                "mhla cache-latents again to finish it"
            )
        self._ends = list(itertools.accumulate(map(self._count, range(len(self.files)))))
        if not self._ends or not self._ends[-1]:
            raise ValueError(f"latent cache {path} is empty: none of its files could be read")
        self._open: dict[tuple[int, int], _Shard] = {}

    def _count(self, shard: int) -> int:
        try:
            return _Shard(self.files[shard], self.record.get("id"), shard).num_rows
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.files[shard]} is damaged ({error}); mhla cache-latents makes it again"
            ) from error

    def __len__(self) -> int:
        return self._ends[-1]

    def __getstate__(self) -> dict[str, Any]:
        # Open files do not travel to worker processes.
        return {**self.__dict__, "_open": {}}

    def name(self, index: int) -> str:
        """Return what to call a row in a message."""
        shard, row = self._locate(index)
        return f"{self.files[shard]}, row {row}"

    def fingerprint(self) -> str:
        names = [(file.name, end) for file, end in zip(self.files, self._ends, strict=True)]
        return fingerprint([self.record.get("id"), *names], lambda index: file_content(self.files[index - 1]))

    def read(self, index: int, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Read some tensors of a row, or all.

        Raises:
            UnreadableSampleError: when its file is damaged.
        """
        shard, row = self._locate(index)
        try:
            file = self._file(shard)
            return {name: file.read(row, name) for name in names or sorted(file.names(row))}
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise UnreadableSampleError(f"{self.name(index)}: {error}") from error

    def shape(self, index: int, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, without reading it."""
        shard, row = self._locate(index)
        return self._file(shard).shape(row, name)

    def names(self, index: int) -> set[str]:
        """Return the names of a row's tensors."""
        shard, row = self._locate(index)
        return self._file(shard).names(row)

    def _locate(self, index: int) -> tuple[int, int]:
        shard = bisect.bisect_right(self._ends, index)
        return shard, index - (self._ends[shard - 1] if shard else 0)

    def _file(self, shard: int) -> _Shard:
        # Keyed by process: a forked worker must not share its parent's handle.
        key = (os.getpid(), shard)
        if key not in self._open:
            self._open[key] = _Shard(self.files[shard], self.record.get("id"), shard)
        return self._open[key]


class _Shard:
    """One file, its tensors checked as they are read.

    Args:
        path: of the file.
        cache: what cache.json calls the cache; None for one of an earlier version, without hashes.
        number: of the file in the cache.

    Raises:
        OSError, SafetensorError, ValueError: when it is damaged.
    """

    def __init__(self, path: Path, cache: str | None, number: int) -> None:
        self._tensors = safe_open(path, framework="pt")
        self._cache, self._number = cache, number
        metadata = self._tensors.metadata() or {}
        # One entry alone, as safetensors writes several in any order.
        self._sums: list[dict[str, str]] = json.loads(metadata["sums"]) if cache else []
        self.num_rows = len(self._sums) if cache else int(metadata.get("rows", 0))

    def read(self, row: int, name: str) -> Tensor:
        tensor = self._tensors.get_tensor(f"{row}.{name}")
        if self._cache and self._sums[row].get(name) != _sum(tensor, self._cache, self._number, row, name):
            raise ValueError("it is not what was written")
        return tensor

    def shape(self, row: int, name: str) -> tuple[int, ...]:
        return tuple(self._tensors.get_slice(f"{row}.{name}").get_shape())

    def names(self, row: int) -> set[str]:
        if self._sums:
            return set(self._sums[row])
        keys = (key.partition(".") for key in self._tensors.keys())  # noqa: SIM118 (it is no dict)
        return {name for number, _, name in keys if number == str(row)}

    def check(self) -> None:
        """Read everything."""
        for row, sums in enumerate(self._sums):
            for name in sums:
                self.read(row, name)


def _sum(tensor: Tensor, cache: str, number: int, row: int, name: str) -> str:
    """Hash a tensor and its place."""
    digest = hashlib.blake2b(
        f"{cache}/{number}/{row}/{name} {tensor.dtype} {list(tensor.shape)}".encode(), digest_size=8
    )
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_shards(
    config: Any,
    *,
    keep: Sequence[str],
    facts: Mapping[str, Any] | None = None,
    num_samples: int,
    rows_per_sample: int = 1,
    data: str | None = None,
    make_rows: Callable[[range], Sequence[Row]],
) -> None:
    """Make a cache. Its files are shared out among the processes.

    Each file is written under another name and renamed, so that an interrupted run can be started again.
    Files that are missing or damaged are made then.

    Args:
        config: dataclass with ``output_dir``, where what is there of the same cache is kept, and
            ``shard_size``, the samples per file.
        keep: fields of the config that the cache depends on.
        facts: what else to record of it.
        num_samples: of the data set.
        rows_per_sample: of each sample that can be read.
        data: fingerprint of the data set; None where the config says it all.
        make_rows: the rows of some of the samples.

    Raises:
        ValueError: when ``output_dir`` holds another cache or one of other data, with what differs, or
            something else; or when another process is writing there, or not one sample could be read.
        ConnectionError: when another process of this run has ended.
    """
    folder, shard_size = Path(config.output_dir), config.shard_size
    num_shards = -(-num_samples // shard_size)
    kept = {name: value for name, value in as_dict(config).items() if name in keep}
    record = {"config": kept, **(facts or {}), "num_shards": num_shards, "num_samples": num_samples}
    record |= {} if data is None else {"data": data}
    state = process_state()
    with one_fate(), ExitStack() as stack:

        def enter() -> tuple[str | None, list[int]]:
            stack.enter_context(only_writer(folder))
            cache = _claim(folder, record, config)
            return cache, [number for number in range(num_shards) if not _is_whole(folder, cache, number)]

        cache, numbers = in_first_process(enter)
        mine = numbers[state.process_index :: state.num_processes]
        for number in tqdm(mine, unit="file", disable=not state.is_main_process):
            first = number * shard_size
            _write_shard(
                _shard(folder, number),
                make_rows(range(first, min(first + shard_size, num_samples))),
                cache,
                number,
            )
        wait_for_all()
        expected = (num_samples, rows_per_sample)
        in_first_process(lambda: _require_samples(folder, cache, num_shards, *expected))


def _require_samples(
    folder: Path, cache: str | None, num_shards: int, num_samples: int, rows_per_sample: int
) -> None:
    """Refuse a cache of nothing, and leave no files of it: they would count as done."""
    shards = (_Shard(_shard(folder, number), cache, number) for number in range(num_shards))
    kept = sum(shard.num_rows for shard in shards) // rows_per_sample
    if kept:
        logger.info("%s is complete: %d files, %d samples", folder, num_shards, kept)
        if kept < num_samples:
            logger.warning(
                "%d of %d samples could not be read, and are not in %s: make another cache once they can",
                num_samples - kept, num_samples, folder,
            )  # fmt: skip
        return
    for number in range(num_shards):
        _shard(folder, number).unlink()
    (folder / _RECORD).unlink()
    raise ValueError(
        f"not one of {num_samples} samples could be read (above: why), so that nothing is left in {folder}"
    )


def _write_shard(path: Path, rows: Sequence[Row], cache: str | None, number: int) -> None:
    # Each in memory of its own, as safetensors needs: an encoder may answer with views, in channels-last.
    tensors = {
        f"{i}.{name}": x.clone(memory_format=torch.contiguous_format)
        for i, row in enumerate(rows)
        for name, x in row.items()
    }
    if cache is None:  # of an earlier version, to be finished in its form
        metadata = {"rows": str(len(rows))}
    else:
        sums = [
            {name: _sum(x, cache, number, i, name) for name, x in row.items()} for i, row in enumerate(rows)
        ]
        metadata = {"sums": json.dumps(sums)}
    write_file(path, partial(save_file, tensors, metadata=metadata))


def _is_whole(folder: Path, cache: str | None, number: int) -> bool:
    path = _shard(folder, number)
    if not path.is_file():
        return False
    try:
        _Shard(path, cache, number).check()
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s is damaged and will be made again: %s", path, error)
        return False
    return True


def _claim(folder: Path, record: dict[str, Any], config: Any) -> str | None:
    """Write cache.json, or make sure that the one there is of the same cache; return what it calls it."""
    path = folder / _RECORD
    record = json.loads(json.dumps(record))
    if path.is_file():
        old = read_record(folder)
        cache = old.pop("id", None)
        later = with_later_fields(old["config"], config)
        old["config"] = {name: later.get(name) for name in {**old["config"], **record["config"]}}
        # What earlier versions did not write.
        if others := _changes({name: record.get(name) for name in ("num_samples", "data")} | old, record):
            raise ValueError(
                f"{folder} holds another {_kind(config)}; choose another folder, or what it was made of:\n  "
                + "\n  ".join(others)
            )
        return cache
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no {_kind(config)}; choose another --output_dir")
    cache = short_hash(record)
    write_file(path, json.dumps({**record, "id": cache}, indent=2))
    return cache


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """List where the records of two caches differ, a line each, without hashes."""
    told = ("components", "config", "data")
    parts = old.get("components", {})
    parts_now = new.get("components", {}) if parts else {}  # as hashes came later
    others = [
        f"{name}: not the one that it was made with"
        for name in sorted({**parts, **parts_now})
        if parts.get(name) != parts_now.get(name)
    ]
    if old.get("data") != new.get("data"):
        others.append("data: other samples, captions or contents than those that it was made of")
    before, after = (
        {key: value for key, value in {**record["config"], **record}.items() if key not in told}
        for record in (old, new)
    )
    return others + changes(before, after)


def _kind(config: Any) -> str:
    """What messages call the cache: ``kind`` of its config."""
    return getattr(config, "kind", "latent cache")


def read_record(folder: Path) -> dict[str, Any]:
    """Return what a cache was made from.

    Raises:
        ValueError: when the record is damaged.
    """
    path = folder / _RECORD
    try:
        record = json.loads(path.read_text())
        if not isinstance(record.get("components", {}), dict):
            raise ValueError(f"components is {record['components']!r}")
        return {**record, "config": dict(record["config"]), "num_shards": int(record["num_shards"])}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}): make the cache again in another folder") from error


def _shard(folder: Path, number: int) -> Path:
    return folder / f"latents-{number:05d}.safetensors"
