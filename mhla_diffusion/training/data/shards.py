"""Data set computed once and kept in files: written by several processes, resumably, and read row by row.

A cache is a folder of ``latents-00000.safetensors`` and so on, each with the tensors of some rows, named
``<row in the file>.<name>``, and ``cache.json``, a record of what it was made from.
"""

from __future__ import annotations

import bisect
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from ...files.writing import write_file
from ...processes import process_state
from ..config import as_dict, with_later_fields
from .stream import UnreadableSampleError

_RECORD = "cache.json"

Row = Mapping[str, Tensor]


class Shards:
    """Rows of a finished cache.

    Attributes:
        record: what it was made from.
        files: in the order of their rows.

    Raises:
        ValueError: when there is no cache, it is not finished, or it has no rows.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / _RECORD).is_file():
            raise ValueError(f"{path} holds no latent cache; make one with scripts/cache_latents.py")
        self.record: dict[str, Any] = json.loads((self.path / _RECORD).read_text())
        self.files = [_shard(self.path, number) for number in range(self.record["num_shards"])]
        if missing := [file for file in self.files if not file.is_file()]:
            raise ValueError(
                f"latent cache {path} lacks {len(missing)} of {len(self.files)} files; run "
                "scripts/cache_latents.py again to finish it"
            )
        self._ends = list(itertools.accumulate(map(_count, self.files)))
        if not self._ends or not self._ends[-1]:
            raise ValueError(f"latent cache {path} is empty: none of its files could be read")
        self._open: dict[tuple[int, int], Any] = {}

    def __len__(self) -> int:
        return self._ends[-1]

    def __getstate__(self) -> dict[str, Any]:
        # Open files do not travel to worker processes.
        return {**self.__dict__, "_open": {}}

    def name(self, index: int) -> str:
        """Return what to call a row in a message."""
        shard, row = self._locate(index)
        return f"{self.files[shard]}, row {row}"

    def read(self, index: int, names: Sequence[str]) -> dict[str, Tensor]:
        """Read some tensors of a row.

        Raises:
            UnreadableSampleError: when its file is damaged.
        """
        shard, row = self._locate(index)
        try:
            file = self._file(shard)
            return {name: file.get_tensor(f"{row}.{name}") for name in names}
        except (OSError, SafetensorError) as error:
            raise UnreadableSampleError(f"{self.name(index)}: {error}") from error

    def shape(self, index: int, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, without reading it."""
        shard, row = self._locate(index)
        return tuple(self._file(shard).get_slice(f"{row}.{name}").get_shape())

    def _locate(self, index: int) -> tuple[int, int]:
        shard = bisect.bisect_right(self._ends, index)
        return shard, index - (self._ends[shard - 1] if shard else 0)

    def _file(self, shard: int) -> Any:
        # Keyed by process: a forked worker must not share its parent's handle.
        key = (os.getpid(), shard)
        if key not in self._open:
            self._open[key] = safe_open(self.files[shard], framework="pt")
        return self._open[key]


def write_shards(
    config: Any,
    *,
    keep: Sequence[str],
    facts: Mapping[str, Any] | None = None,
    num_samples: int,
    make_rows: Callable[[range], Sequence[Row]],
) -> None:
    """Make a cache. Under ``accelerate launch`` its files are shared out among the processes.

    Each file is written under another name and renamed, so that an interrupted run can be started again.

    Args:
        config: dataclass with ``output_dir``, where what is there of the same cache is kept, and
            ``shard_size``, the samples per file.
        keep: fields of the config that the cache depends on.
        facts: what else to record of it.
        num_samples: of the data set.
        make_rows: the rows of some of the samples.

    Raises:
        ValueError: when ``output_dir`` holds another cache, with the keys that differ, or something else.
    """
    folder, shard_size = Path(config.output_dir), config.shard_size
    state, num_shards = process_state(), -(-num_samples // shard_size)
    if state.is_main_process:
        kept = {name: value for name, value in as_dict(config).items() if name in keep}
        _claim(folder, {"config": kept, **(facts or {}), "num_shards": num_shards}, config)
    state.wait_for_everyone()
    numbers = [n for n in range(num_shards) if not _shard(folder, n).is_file()]
    mine = numbers[state.process_index :: state.num_processes]
    for number in tqdm(mine, unit="file", disable=not state.is_main_process):
        first = number * shard_size
        rows = make_rows(range(first, min(first + shard_size, num_samples)))
        # Each in memory of its own, as safetensors needs: an encoder may answer with views, in channels-last.
        tensors = {
            f"{i}.{name}": x.clone(memory_format=torch.contiguous_format)
            for i, row in enumerate(rows)
            for name, x in row.items()
        }
        metadata = {"rows": str(len(rows))}
        write_file(_shard(folder, number), partial(save_file, tensors, metadata=metadata))
    state.wait_for_everyone()


def _claim(folder: Path, record: dict[str, Any], config: Any) -> None:
    """Write cache.json, or make sure that the one there is of the same cache."""
    path = folder / _RECORD
    record = json.loads(json.dumps(record))
    if path.is_file():
        old = json.loads(path.read_text())
        later = with_later_fields(old["config"], config)
        old["config"] = {name: later.get(name) for name in {**old["config"], **record["config"]}}
        keys = sorted(old.keys() | record.keys())
        if changes := [
            f"{key}: {old.get(key)} -> {record.get(key)}" for key in keys if old.get(key) != record.get(key)
        ]:
            raise ValueError(f"{folder} holds another latent cache:\n  " + "\n  ".join(changes))
        return
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no latent cache; choose another --output_dir")
    write_file(path, json.dumps(record, indent=2))


def _shard(folder: Path, number: int) -> Path:
    return folder / f"latents-{number:05d}.safetensors"


def _count(file: Path) -> int:
    with safe_open(file, framework="pt") as tensors:
        return int((tensors.metadata() or {}).get("rows", 0))
