"""Cache of activations: what goes into layers of the teacher and what comes out, for some calls."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backbones.teacher import layer_calls
from ..training.config import as_dict
from ..training.data.shards import Shards, read_record, write_shards
from ..training.data.stream import UnreadableSampleError
from .calls import Calls

# Activations of this many bytes are kept in memory while a layer is trained.
_IN_MEMORY = 2 << 30
# What a cache depends on.
_KEEP = ("teacher", "calls", "layers", "samples", "dtype", "shard_size")
_NAME = re.compile(r"activations-\d{3,}")
_FILE = re.compile(r"cache\.json|latents-\d+\.safetensors|\..*")


@dataclass(frozen=True)
class CacheConfig:
    """Cache to be made.

    Args:
        output_dir: where it goes.
        teacher: fingerprint of the model.
        calls: facts of what it is called with.
        layers: their names.
        samples: calls.
        dtype: of what is stored.
        shard_size: samples in a file.
    """

    output_dir: str
    teacher: str
    calls: Mapping[str, Any]
    layers: tuple[str, ...]
    samples: int
    dtype: str = "bfloat16"
    shard_size: int = 8

    kind = "cache of activations"  # in messages


def sample_bytes(tokens: int, width: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Count the bytes of a sample in a layer: its input and its output."""
    return 2 * tokens * width * dtype.itemsize


def require_disk_space(folder: Path, needed: int) -> None:
    """Check that a disk has room.

    Raises:
        OSError: when it has not.
    """
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"the activations that are missing take {needed / 1e9:.3g} GB, but {folder} has {free / 1e9:.3g} "
            "GB free: make room, or give less --disk, and layers are cached in smaller groups"
        )


def write_activations(model: Any, calls: Calls, config: CacheConfig) -> None:
    """Run the teacher and keep what goes into and out of layers; see :func:`write_shards`.

    Raises:
        ValueError: for activations that are not finite, when the folder holds those of another teacher,
            other data or layers, and when not one sample could be read.
        OSError: when the disk is full; what is written stays, and the next run goes on from there.
    """
    dtype = getattr(torch, config.dtype)

    def make_rows(numbers: range) -> list[dict[str, Tensor]]:
        return [_activations(model, calls, number, config.layers, dtype) for number in numbers]

    write_shards(
        config,
        keep=_KEEP,
        num_samples=config.samples,
        make_rows=make_rows,
    )


def cache_folder(out: Path, number: int) -> Path:
    """Return where the cache goes whose first layer has this number."""
    return out / f"activations-{number:03d}"


def cached_layers(folder: Path) -> tuple[str, ...]:
    """Return the layers of a cache that is there, whole or in part; none when its record is broken."""
    return tuple(_stored_config(folder).get("layers") or ())


def is_begun(config: CacheConfig) -> bool:
    """Return True when the folder of a cache holds it, whole or in part."""
    kept = {name: value for name, value in as_dict(config).items() if name in _KEEP}
    return _stored_config(Path(config.output_dir)) == json.loads(json.dumps(kept))


def _stored_config(folder: Path) -> dict[str, Any]:
    try:
        return read_record(folder)["config"]
    except (OSError, ValueError):
        return {}


def written_bytes(config: CacheConfig) -> int:
    """Count the bytes of a cache that are on the disk already."""
    return sum(path.stat().st_size for path in Path(config.output_dir).glob("latents-*.safetensors"))


def caches_in(out: Path) -> Iterator[Path]:
    """Find the folders of caches, by their names and as nothing but files of caches is in them."""
    for folder in sorted(out.glob("activations-*")):
        own = _NAME.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink()
        if own and all(_FILE.fullmatch(path.name) for path in folder.iterdir()):
            yield folder


def remove_caches(out: Path, but: CacheConfig | None = None) -> None:
    """Remove all caches, or all but one: they can be made again, and nothing else needs them.

    This process must be the only writer of ``out``.
    """
    for folder in caches_in(out):
        if but is None or folder != Path(but.output_dir) or not is_begun(but):
            shutil.rmtree(folder)


def _activations(
    model: Any, calls: Calls, number: int, names: Sequence[str], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Input and output ``[N, D]`` of each layer in a call, of frames that attend apart one in turn."""
    row: dict[str, Tensor] = {}
    for name, call in layer_calls(model, calls(number), names).items():
        for key, value in (("input", call.inputs), ("output", call.outputs)):
            stored = value[number % len(value)].to(dtype).cpu()
            if not stored.isfinite().all():
                what = f"the {key} of layer {name} is not finite in call {number}"
                if value.isfinite().all():
                    raise ValueError(f"{what} as {dtype}: give bfloat16 or float32 as dtype of activations")
                raise ValueError(
                    f"{what}: load the teacher in a wider dtype than {value.dtype}, or look for broken "
                    "weights in it"
                )
            row[f"{name}.{key}"] = stored
    return row


class Activations:
    """Activations of one layer.

    Args:
        shards: of the cache.
        name: of the layer.
    """

    def __init__(self, shards: Shards, name: str) -> None:
        self.shards, self.name = shards, name
        shape = shards.shape(0, f"{name}.input")
        self._kept: dict[int, tuple[Tensor, Tensor]] | None = None
        if len(shards) * 8 * shape[0] * shape[1] <= _IN_MEMORY:
            self._kept = {}

    def read(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return inputs and outputs of samples, ``[B, N, D]``, float32.

        Raises:
            ValueError: for a file that is damaged or holds what is not finite, naming layer and file.
        """
        inputs, outputs = zip(*(self._sample(number) for number in numbers), strict=True)
        return torch.stack(inputs).float(), torch.stack(outputs).float()

    def _sample(self, number: int) -> tuple[Tensor, Tensor]:
        if self._kept is not None and number in self._kept:
            return self._kept[number]
        try:
            found = self.shards.read(number, (f"{self.name}.input", f"{self.name}.output"))
        except UnreadableSampleError as error:
            raise ValueError(
                f"activations of layer {self.name} are damaged, run again to make them: {error}"
            ) from error
        pair = found[f"{self.name}.input"], found[f"{self.name}.output"]
        if not all(tensor.isfinite().all() for tensor in pair):
            raise ValueError(
                f"activations of layer {self.name} in {self.shards.name(number)} are not finite: remove the "
                "file and run again"
            )
        if self._kept is not None:
            self._kept[number] = pair
        return pair
