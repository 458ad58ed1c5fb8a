"""Sets of images in Hugging Face datasets and parquet."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mhla_diffusion.evaluation.sets.images import open_images

MakePixels = Callable[..., np.ndarray]


def _save(path: Path, pixels: np.ndarray, **columns: Any) -> Path:
    images = datasets.Dataset.from_dict(
        {"image": [Image.fromarray(image) for image in pixels], **columns},
    )
    images.cast_column("image", datasets.Image()).save_to_disk(path)
    return path


def test_splits_are_chosen_and_not_guessed(make_pixels: MakePixels, tmp_path: Path) -> None:
    split = datasets.Dataset.from_dict({"image": [Image.fromarray(image) for image in make_pixels(3)]})
    datasets.DatasetDict(only=split).save_to_disk(tmp_path / "one")
    assert len(open_images(tmp_path / "one").names) == 3
    datasets.DatasetDict(train=split, test=split).save_to_disk(tmp_path / "two")
    with pytest.raises(ValueError, match=r"has the splits train, test: give one, such as .*two/train"):
        open_images(tmp_path / "two")
    assert len(open_images(tmp_path / "two" / "test").names) == 3


def test_of_several_columns_of_images_the_one_called_image_is_read(
    make_pixels: MakePixels, tmp_path: Path
) -> None:
    pixels = make_pixels(3)
    masks = [Image.fromarray(255 - image) for image in pixels]
    images = open_images(_save(tmp_path / "set", pixels, mask=masks))
    np.testing.assert_array_equal([read() for read in images.readers()], pixels)
    assert "the one called image is read" in images.notes[0]
    datasets.load_from_disk(str(tmp_path / "set")).rename_column("image", "photo").save_to_disk(
        tmp_path / "b"
    )
    with pytest.raises(ValueError, match=r"columns of images photo, mask: rename the one"):
        open_images(tmp_path / "b")


@pytest.mark.parametrize(
    ("labels", "expected", "note"),
    [
        (["dog", "cat", "dog"], [1, 0, 1], None),
        ([4, None, 4], None, "1 of 3 rows have no label"),
        ([[1], [2], [1, 2]], None, "neither numbers nor names"),
        ([0.5, 1.5, 2.5], None, "neither numbers nor names"),
    ],
)
def test_labels_of_every_kind(
    labels: list[Any], expected: list[int] | None, note: str | None, make_pixels: MakePixels, tmp_path: Path
) -> None:
    images = open_images(_save(tmp_path / "set", make_pixels(3), label=labels))
    assert images.labels == expected
    assert [note in said for said in images.notes] == ([True] if note else [])
    if expected:
        assert images.class_names == {0: "cat", 1: "dog"}


def test_a_row_without_an_image_is_named(tmp_path: Path) -> None:
    features = datasets.Features(image=datasets.Image())
    datasets.Dataset.from_dict({"image": [None, None]}, features=features).save_to_disk(tmp_path / "set")
    with pytest.raises(ValueError, match="the row has no image"):
        next(iter(open_images(tmp_path / "set").readers()))()


def test_rows_read_no_file_outside_of_the_dataset(make_pixels: MakePixels, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    Image.fromarray(make_pixels(1)[0]).save(secret)
    table = pa.table({"image": [{"bytes": None, "path": str(secret)}]})
    (tmp_path / "theirs").mkdir()
    pq.write_table(table, tmp_path / "theirs" / "0.parquet")
    with pytest.raises(ValueError, match=r"names .*secret\.png, outside of the dataset"):
        next(iter(open_images(tmp_path / "theirs" / "0.parquet").readers()))()


def test_parquet_is_a_set(make_pixels: MakePixels, tmp_path: Path) -> None:
    pixels, encoded = make_pixels(4), []
    for image in pixels:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "png")
        encoded.append(buffer.getvalue())
    (tmp_path / "set").mkdir()
    for part in range(2):
        rows = encoded[2 * part : 2 * part + 2]
        pq.write_table(pa.table({"jpg": rows, "label": [part] * 2}), tmp_path / "set" / f"{part}.parquet")
    images = open_images(tmp_path / "set")
    np.testing.assert_array_equal([read() for read in images.readers()], pixels)
    assert images.labels == [0, 0, 1, 1]
    np.testing.assert_array_equal(next(iter(open_images(tmp_path / "set/1.parquet").readers()))(), pixels[2])
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "set" / "0.parquet").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"cut\.parquet cannot be read as a dataset"):
        open_images(tmp_path / "cut.parquet")
