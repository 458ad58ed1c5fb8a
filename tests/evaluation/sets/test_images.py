"""Which images a set has, in which order, with which classes, and how they become RGB."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mhla_diffusion.evaluation.sets.images import open_images, read_image
from mhla_diffusion.evaluation.sets.samples import holds_statistics

GRAY = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)
RGB = np.stack([GRAY, GRAY + 5, 255 - GRAY], axis=-1)


def _read_all(path: Path) -> list[np.ndarray]:
    return [read() for read in open_images(path).readers()]


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.fromarray(GRAY), np.stack([GRAY] * 3, axis=-1)),
        (Image.fromarray(GRAY.astype(np.uint16) * 256 + 200), np.stack([GRAY] * 3, axis=-1)),
        (Image.fromarray(RGB), RGB),
        (Image.fromarray(np.concatenate([RGB, GRAY[..., None]], axis=-1)), RGB),
        (Image.fromarray(np.stack([GRAY, 255 - GRAY], axis=-1)), np.stack([GRAY] * 3, axis=-1)),
        (Image.fromarray(RGB).quantize(64), RGB),
        (Image.fromarray((GRAY > 100) * np.uint8(255)).convert("1"), np.stack([(GRAY > 100) * 255] * 3, -1)),
    ],
    ids=["L", "I;16", "RGB", "RGBA", "LA", "P", "1"],
)
def test_every_mode_becomes_rgb(image: Image.Image, expected: np.ndarray, tmp_path: Path) -> None:
    image.save(tmp_path / "image.png")
    pixels = read_image(tmp_path / "image.png")
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, expected)


def test_orientation_frames_and_inks(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.fromarray(RGB).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "turned.png"), RGB)
    frames = [Image.fromarray(RGB).quantize(64), Image.fromarray(255 - RGB).quantize(64)]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(read_image(tmp_path / "two.gif"), np.asarray(frames[0].convert("RGB")))
    inks = Image.fromarray(np.stack([GRAY, 255 - GRAY, GRAY, GRAY // 2], axis=-1), mode="CMYK")
    inks.save(tmp_path / "inks.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "inks.tif"), np.asarray(inks.convert("RGB")))


def test_float_images_are_refused(tmp_path: Path) -> None:
    Image.fromarray(GRAY.astype(np.float32)).save(tmp_path / "image.tif")
    with pytest.raises(ValueError, match="no defined range"):
        read_image(tmp_path / "image.tif")


def test_folders_are_read_in_order_with_subfolders_as_classes(
    write_folder: Callable[..., Path], make_pixels: Callable[..., np.ndarray]
) -> None:
    folder = write_folder("real", make_pixels(5), classes=["dog", "cat"])
    (folder / "cat" / "notes.txt").write_text("no image")
    (folder / "cat" / "._0001.png").write_text("what macOS leaves behind")
    images = open_images(folder)
    assert images.names == ["cat/0001.png", "cat/0003.png", "dog/0000.png", "dog/0002.png", "dog/0004.png"]
    assert images.labels == [0, 0, 1, 1, 1]
    assert images.class_names == {0: "cat", 1: "dog"}
    Image.fromarray(make_pixels(1)[0]).save(folder / "outside.png")
    assert open_images(folder).labels is None


def test_a_loop_of_links_ends(
    write_folder: Callable[..., Path], make_pixels: Callable[..., np.ndarray]
) -> None:
    folder = write_folder("real", make_pixels(2), classes=["a"])
    (folder / "a" / "loop").symlink_to(folder)
    (folder / "b").symlink_to(folder / "a")
    assert open_images(folder).names == ["a/0000.png", "a/0001.png", "b/0000.png", "b/0001.png"]


def test_a_manifest_says_what_belongs_to_the_set(
    write_folder: Callable[..., Path],
    make_pixels: Callable[..., np.ndarray],
    write_manifest: Callable[..., None],
) -> None:
    folder = write_folder("generated", make_pixels(4))
    write_manifest(folder, [3, 1, 3], names={3: "three"})
    images = open_images(folder)
    assert images.names == ["0000.png", "0001.png", "0002.png"]
    assert images.labels == [3, 1, 3]
    assert images.class_names == {3: "three"}
    assert images.unlisted == 1
    assert images.manifest == {"model": "runs/<digits>", "num_inference_steps": 20}


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not valid JSON"), ('{"images": [{"seed": 1}]}', "that each have 'file'")]
)
def test_a_broken_manifest_is_an_error(
    text: str, message: str, write_folder: Callable[..., Path], make_pixels: Callable[..., np.ndarray]
) -> None:
    folder = write_folder("generated", make_pixels(2))
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_images(folder)


@pytest.mark.parametrize("shape", [(3, 20, 24, 3), (3, 20, 24, 1), (3, 20, 24)])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_images(shape: tuple[int, ...], save: Callable[..., None], tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    save(tmp_path / "images.npz", arr_0=pixels, labels=np.array([2, 0, 1]))
    images = open_images(tmp_path / "images.npz")
    assert images.labels == [2, 0, 1]
    expected = np.broadcast_to(pixels.reshape(3, 20, 24, -1), (3, 20, 24, 3))
    np.testing.assert_array_equal(_read_all(tmp_path / "images.npz"), expected)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros(3)}, "no arr_0"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.float32)}, r"float32 \[2, 4, 4, 3\]; uint8"),
        ({"arr_0": np.zeros((2, 3, 4, 4), np.uint8)}, r"uint8 \[2, 3, 4, 4\]"),
        ({"arr_0": np.zeros((0, 4, 4, 3), np.uint8)}, "N > 0"),
        ({"arr_0": np.asfortranarray(np.zeros((2, 4, 4, 3), np.uint8))}, "Fortran"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "labels": np.zeros(3, int)}, "2 integers"),
    ],
)
def test_other_npz_layouts_are_refused(arrays: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "images.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        open_images(tmp_path / "images.npz")


def test_what_is_missing_empty_or_cut_short_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for place, message in (
        ("empty", "empty holds no image"),
        ("nowhere", "nowhere is neither"),
        ("nowhere.npz", "npz is neither"),
    ):
        with pytest.raises(ValueError, match=message):
            open_images(tmp_path / place)
    buffer = io.BytesIO()
    np.savez(buffer, arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    (tmp_path / "half.npz").write_bytes(buffer.getvalue()[:200])
    with pytest.raises(ValueError, match=r"half\.npz is not a whole npz"):
        open_images(tmp_path / "half.npz")


def test_statistics_are_told_from_images(tmp_path: Path) -> None:
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(2), sigma=np.eye(2))
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    assert holds_statistics(tmp_path / "statistics.npz")
    assert not holds_statistics(tmp_path / "images.npz")
    assert not holds_statistics(tmp_path)
