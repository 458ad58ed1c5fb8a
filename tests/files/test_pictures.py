"""Pictures as pixels, the same for training and for scoring."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from mhla_diffusion.evaluation.sets.images import open_images as open_scored
from mhla_diffusion.files.pictures import background_color, flat_picture, read_picture
from mhla_diffusion.files.videos import open_video
from mhla_diffusion.training import DataConfig
from mhla_diffusion.training.data import ImageSamples, open_images
from mhla_diffusion.training.data.stream import UnreadableSampleError

GRAY = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)
RGB = np.stack([GRAY, GRAY + 5, 255 - GRAY], axis=-1)
TURNED = Image.Exif()
TURNED[0x0112] = 6  # by a quarter


def _turned(path: Path) -> None:
    Image.fromarray(RGB).save(path, exif=TURNED)


def _transparent(path: Path) -> None:
    Image.fromarray(np.concatenate([RGB, GRAY[..., None]], axis=-1)).save(path)


def _palette_with_a_hole(path: Path) -> None:
    Image.fromarray(RGB).quantize(16).save(path, transparency=3)


def _deep(path: Path) -> None:
    Image.fromarray(GRAY.astype(np.uint16) * 256 + 200).save(path)


def _gray(path: Path) -> None:
    Image.fromarray(GRAY).save(path)


def _as_scored(folder: Path) -> np.ndarray:
    (read,) = open_scored(folder).readers()
    return read()


def _as_trained(config: DataConfig) -> np.ndarray:
    """What training sees of the one picture, its side 4 being what it has."""
    sample = ImageSamples(open_images(config), channels=3, sizes=[(4, 4)]).load(0, torch.Generator())
    return ((sample["samples"] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()


def _square(pixels: np.ndarray) -> np.ndarray:
    """The middle 4 x 4."""
    top, left = ((side - 4) // 2 for side in pixels.shape[:2])
    return pixels[top : top + 4, left : left + 4]


@pytest.mark.parametrize("make", [_turned, _transparent, _palette_with_a_hole, _deep, _gray])
def test_every_source_and_scoring_see_the_same_pixels(make: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / "set" / "a").mkdir(parents=True)
    make(tmp_path / "set" / "a" / "0.png")
    scored = _square(_as_scored(tmp_path / "set"))
    np.testing.assert_array_equal(_as_trained(DataConfig("folder", str(tmp_path / "set"))), scored)
    frame = open_video(tmp_path / "set" / "a").read([0])[0]
    np.testing.assert_array_equal(_square(frame), scored)
    rows = {"image": [str(tmp_path / "set" / "a" / "0.png")], "label": [0]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a"])})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "rows")
    np.testing.assert_array_equal(_as_trained(DataConfig("huggingface", str(tmp_path / "rows"))), scored)
    np.testing.assert_array_equal(_square(_as_scored(tmp_path / "rows")), scored)


def test_pictures_are_shown_upright(tmp_path: Path) -> None:
    _turned(tmp_path / "turned.png")
    np.testing.assert_array_equal(np.asarray(read_picture(tmp_path / "turned.png")), np.rot90(RGB, -1))


@pytest.mark.parametrize(
    "tags", [b"Exif\0\0broken", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12", b"\xff" * 40]
)
def test_a_picture_whose_tags_are_damaged_is_as_it_is(tags: bytes, tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "image.png", exif=tags)
    np.testing.assert_array_equal(np.asarray(read_picture(tmp_path / "image.png")), RGB)


@pytest.mark.parametrize("background", ["white", "#000000", "rgb(10, 200, 30)"])
def test_transparent_pixels_show_the_background(background: str, tmp_path: Path) -> None:
    _transparent(tmp_path / "image.png")
    alpha = GRAY[..., None] / 255
    expected = RGB * alpha + np.array(background_color(background)) * (1 - alpha)
    found = np.asarray(read_picture(tmp_path / "image.png", background))
    np.testing.assert_allclose(found, expected, atol=1)
    config = DataConfig("npz", str(tmp_path / "image.npz"), background=background)
    np.savez(
        tmp_path / "image.npz",
        arr_0=np.concatenate([RGB, GRAY[..., None]], axis=-1)[None],
        labels=np.array([0]),
    )
    np.testing.assert_array_equal(_as_trained(config), _square(found))
    (read,) = open_scored(tmp_path, background).readers()
    np.testing.assert_array_equal(read(), found)
    np.testing.assert_array_equal(open_video(tmp_path, background=background).read([0])[0], found)


def test_what_is_transparent_in_16_bits_shows_the_background(tmp_path: Path) -> None:
    values = GRAY.astype(np.uint16) * 256 + 200
    Image.fromarray(values).save(tmp_path / "image.png", transparency=int(values[1, 2]))
    assert Image.open(tmp_path / "image.png").mode.startswith("I")
    found = np.asarray(read_picture(tmp_path / "image.png", "rgb(10, 200, 30)"))
    clear = values == values[1, 2]
    assert clear.any()
    assert (found[clear] == (10, 200, 30)).all()
    np.testing.assert_array_equal(found[~clear], np.repeat(GRAY[~clear][:, None], 3, 1))


@pytest.mark.parametrize("background", ["nope", "#ffffff80", ""])
def test_what_is_no_background_is_refused(background: str) -> None:
    with pytest.raises(ValueError, match=r"background must be a colour such as white, .* got '"):
        DataConfig("folder", "images", background=background)


def test_pictures_without_alpha_are_untouched() -> None:
    for image in (Image.fromarray(GRAY), Image.fromarray(RGB)):
        flat = flat_picture(image, "red")
        assert flat.mode == image.mode
        np.testing.assert_array_equal(np.asarray(flat), np.asarray(image))


@pytest.mark.parametrize(
    ("values", "suffix", "reason"),
    [
        (GRAY.astype(np.float32), "tif", "no defined range"),
        (GRAY.astype(np.uint16), "png", "would become nearly black"),
    ],
)
def test_training_names_pictures_whose_values_would_be_lost(
    values: np.ndarray, suffix: str, reason: str, tmp_path: Path
) -> None:
    (tmp_path / "a").mkdir()
    Image.fromarray(values).save(tmp_path / "a" / f"0.{suffix}")
    with pytest.raises(UnreadableSampleError, match=rf"a/0\.{suffix}: .*{reason}"):
        _as_trained(DataConfig("folder", str(tmp_path)))


def _rows(
    path: Path, pictures: list[Image.Image | None], labels: list[object], feature: object
) -> DataConfig:
    features = datasets.Features({"image": datasets.Image(), "kind": feature})
    datasets.Dataset.from_dict({"image": pictures, "kind": labels}, features=features).save_to_disk(path)
    return DataConfig("huggingface", str(path), label_column="kind")


@pytest.mark.parametrize(
    ("labels", "feature", "said"),
    [
        ([0, -1, -1], datasets.ClassLabel(names=["a"]), r"row 1: the label is -1 \(and 1 more rows"),
        ([0, 0, None], datasets.ClassLabel(names=["a"]), "row 2: the label is None; take out"),
        (["a", None, "b"], datasets.Value("string"), "row 1: the label is None"),
    ],
)
def test_a_row_without_a_label_is_named(
    labels: list[object], feature: object, said: str, tmp_path: Path
) -> None:
    config = _rows(tmp_path / "rows", [Image.fromarray(RGB)] * 3, labels, feature)
    with pytest.raises(ValueError, match=said):
        open_images(config)


def test_a_label_of_an_archive_that_is_none_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "images.npz", arr_0=np.stack([RGB] * 3), labels=np.array([0, 1, -1]))
    with pytest.raises(ValueError, match=r"images\.npz, row 2: the label is -1"):
        open_images(DataConfig("npz", str(tmp_path / "images.npz")))


def test_a_row_without_a_picture_is_named_and_skipped(tmp_path: Path) -> None:
    config = _rows(tmp_path / "rows", [Image.fromarray(RGB), None], ["a", "b"], datasets.Value("string"))
    samples = ImageSamples(open_images(config), channels=3, sizes=[(4, 4)])
    samples.load(0, torch.Generator())
    with pytest.raises(UnreadableSampleError, match="rows, row 1: the row has no picture"):
        samples.load(1, torch.Generator())
