"""The cache of features: what it holds is right, or computed again, and never blamed on a picture."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mhla_diffusion.evaluation import FeatureExtractor, evaluate_images

MakePixels = Callable[..., np.ndarray]
WriteFolder = Callable[..., Path]


@pytest.fixture
def folder(make_pixels: MakePixels, write_folder: WriteFolder) -> Path:
    return write_folder("images", make_pixels(8))


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE features SET data = substr(data, 1, 47)",
        "UPDATE features SET data = substr(data, 1, 44)",
        "UPDATE features SET data = CAST(x'00' || substr(data, 2) AS BLOB)",
        "UPDATE features SET data = CAST(x'0000c07f' || substr(data, 5) AS BLOB), checksum = NULL",
        "UPDATE features SET digest = x'00'",
        "UPDATE features SET output = 'other'",
    ],
    ids=["odd", "short", "flipped", "nan", "digest", "output"],
)
def test_damaged_rows_are_computed_again(
    damage: str, folder: Path, extractor: FeatureExtractor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = evaluate_images(folder, folder, extractor=extractor, cache=tmp_path / "cache")
    with sqlite3.connect(tmp_path / "cache" / "features.sqlite") as connection:
        connection.execute(damage)
    connection.close()
    with caplog.at_level(logging.WARNING):
        again = evaluate_images(folder, folder, extractor=extractor, cache=tmp_path / "cache")
    assert again.scores == first.scores
    assert again.real == first.real
    assert "is damaged; it is computed again" in caplog.text


def test_a_cache_of_an_earlier_version_is_gone_on_with(
    folder: Path, extractor: FeatureExtractor, tmp_path: Path
) -> None:
    evaluate_images(folder, folder, extractor=extractor, cache=tmp_path / "cache")
    with sqlite3.connect(tmp_path / "cache" / "features.sqlite") as connection:
        connection.execute("ALTER TABLE features DROP COLUMN checksum")
    connection.close()

    def never(*_: object) -> None:
        raise AssertionError

    idle = FeatureExtractor(**{**vars(extractor), "network": never})
    assert evaluate_images(folder, folder, extractor=idle, cache=tmp_path / "cache").real.count == 8


def test_a_cache_that_is_damaged_as_a_whole_is_named(
    folder: Path, extractor: FeatureExtractor, tmp_path: Path
) -> None:
    evaluate_images(folder, folder, extractor=extractor, cache=tmp_path / "cache")
    path = tmp_path / "cache" / "features.sqlite"
    content = path.read_bytes()
    path.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))
    with pytest.raises(ValueError, match=r"features\.sqlite is (damaged|not a cache).*remove it"):
        evaluate_images(folder, folder, extractor=extractor, cache=tmp_path / "cache")
