"""Caches of latents whose files are no longer what was written."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from mhla_diffusion.training.data.shards import Shards, write_shards
from mhla_diffusion.training.data.stream import UnreadableSampleError


@dataclass(frozen=True)
class Config:
    output_dir: str
    shard_size: int = 3


def write(config: Config, factor: float = 1.0) -> None:
    def rows(numbers: range) -> list[dict[str, torch.Tensor]]:
        return [
            {
                "mean": torch.full((2, 2), n * factor).half(),
                "text": torch.zeros(n % 2, 3, dtype=torch.bfloat16),
                "label": torch.tensor(n),
            }
            for n in numbers
        ]

    write_shards(config, keep=("shard_size",), facts={"factor": factor}, num_samples=8, make_rows=rows)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = Config(str(tmp_path / "cache"))
    write(config)
    return config


def is_noticed(folder: Path, number: int) -> bool:
    """A damaged file is refused by name when the cache is opened, or its rows are, when they are read."""
    path = folder / f"latents-{number:05d}.safetensors"
    try:
        shards = Shards(folder)
    except ValueError as error:
        return f"{path} is damaged" in str(error) and "mhla cache-latents makes it again" in str(error)
    assert len(shards) == 8
    noticed = False
    for index in range(8):
        try:
            shards.read(index, ("mean", "text", "label"))
        except UnreadableSampleError as error:
            noticed |= f"{path}, row {index - 3 * number}" in str(error)
    return noticed


def test_a_bit_flipped_anywhere_is_noticed_and_the_file_made_again(config: Config) -> None:
    folder = Path(config.output_dir)
    path = folder / "latents-00001.safetensors"
    content = path.read_bytes()
    assert not is_noticed(folder, 1)
    for position in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        assert is_noticed(folder, 1), position
        if position % 5 == 0:
            write(config)
            assert path.read_bytes() == content
    for damaged in (b"", content[: len(content) // 2], content + b"x"):
        path.write_bytes(damaged)
        assert is_noticed(folder, 1)
        write(config)
        assert path.read_bytes() == content


def test_exchanged_files_are_noticed_and_made_again(config: Config, tmp_path: Path) -> None:
    folder, other = Path(config.output_dir), Config(str(tmp_path / "other"))
    write(other, factor=2.0)
    path = folder / "latents-00001.safetensors"
    content = path.read_bytes()
    for source in (folder / "latents-00000.safetensors", Path(other.output_dir) / path.name):
        shutil.copy(source, path)
        assert is_noticed(folder, 1)
        write(config)
        assert path.read_bytes() == content
    assert not is_noticed(folder, 1)


def test_a_cache_of_an_earlier_version_is_read_and_finished_without_hashes(config: Config) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(config.output_dir)
    record = json.loads((folder / "cache.json").read_text())
    del record["id"]
    (folder / "cache.json").write_text(json.dumps(record))
    for number, path in enumerate(sorted(folder.glob("*.safetensors"))):
        save_file(load_file(path), path, metadata={"rows": "2" if number == 2 else "3"})
    (folder / "latents-00001.safetensors").unlink()
    kept = (folder / "latents-00000.safetensors").stat().st_mtime_ns
    write(config)
    assert (folder / "latents-00000.safetensors").stat().st_mtime_ns == kept
    assert [int(Shards(folder).read(index, ("label",))["label"]) for index in range(8)] == list(range(8))
