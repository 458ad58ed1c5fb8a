"""Which images a set has, in which order, with which classes, and how they become RGB."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from mhla_diffusion.evaluation.sets import samples
from mhla_diffusion.evaluation.sets.images import open_images, read_image
from mhla_diffusion.evaluation.sets.samples import class_notes, common_classes, holds_statistics

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
        (Image.fromarray(np.concatenate([RGB, np.full_like(GRAY, 255)[..., None]], axis=-1)), RGB),
        (Image.fromarray(np.stack([GRAY, np.zeros_like(GRAY)], axis=-1)), np.full((4, 6, 3), 255)),
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
    np.testing.assert_array_equal(read_image(tmp_path / "turned.png"), np.rot90(RGB, -1))
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
    requests = images.manifest.pop("requests_sha256")
    assert images.manifest == {"model": "runs/<digits>", "num_inference_steps": 20, "seeds": [[7, 9]]}
    write_manifest(folder, [3, 3, 1], names={3: "three"})
    assert open_images(folder).manifest["requests_sha256"] == requests  # in whatever order
    write_manifest(folder, [3, 1, 1], names={3: "three"})
    assert open_images(folder).manifest["requests_sha256"] != requests


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


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(GRAY.astype(np.int32)),
        Image.fromarray(GRAY.astype(np.uint16)),
        Image.fromarray(GRAY.astype(np.uint16) * 16),
    ],
    ids=["32_bits", "8_of_16", "12_of_16"],
)
def test_integers_that_would_become_black_are_refused(image: Image.Image, tmp_path: Path) -> None:
    image.save(tmp_path / "image.tif")
    with pytest.raises(ValueError, match="would become nearly black"):
        read_image(tmp_path / "image.tif")


def test_a_black_picture_of_16_bits_is_black(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 6), np.uint16)).save(tmp_path / "image.png")
    assert not read_image(tmp_path / "image.png").any()


def test_pictures_of_every_suffix_that_pillow_reads_belong_to_the_set(tmp_path: Path) -> None:
    for name in ("a.avif", "b.jfif", "c.jp2", "d.qoi", "e.tga", "f.JPE", "g.dib", "h.webp", "i.apng"):
        Image.fromarray(RGB).save(tmp_path / name)
    for name in ("x.heic", "y.svg", "z.mp4", "w.mp4", "eps.eps", "SHA256SUMS"):
        (tmp_path / name).touch()
    images = open_images(tmp_path)
    assert [name[0] for name in images.names] == list("abcdefghi")
    assert all(read().shape == (4, 6, 3) for read in images.readers())
    assert images.left_out == {".mp4": 2, ".heic": 1, ".svg": 1, ".eps": 1}
    assert images.notes[0].startswith("Files that are not read as images are left out: 2 .mp4, 1 .")


def test_no_program_is_run_for_a_picture_that_is_called_png(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 4\n%%EndComments\n")
    with pytest.raises(OSError, match="cannot identify image file"):
        read_image(tmp_path / "image.png")


def test_a_png_with_much_text_and_a_large_profile_is_read(tmp_path: Path) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * (3 << 20), zip=True)
    text.add_itxt("prompt", "y" * (2 << 20), zip=True)
    Image.fromarray(RGB).save(tmp_path / "image.png", pnginfo=text, icc_profile=bytes(5 << 20))
    np.testing.assert_array_equal(read_image(tmp_path / "image.png"), RGB)


def test_shards_are_no_classes(
    write_folder: Callable[..., Path], make_pixels: Callable[..., np.ndarray]
) -> None:
    for number, names in enumerate((["000000", "001000"], ["shard-0", "shard-1"], ["part_00", "part_01"])):
        assert open_images(write_folder(f"set{number}", make_pixels(4), classes=names)).labels is None
    for number, names in enumerate((["0", "1"], ["000", "001"], ["n01440764", "n01443537"])):
        assert open_images(write_folder(f"classes{number}", make_pixels(4), classes=names)).labels is not None


def test_classes_of_two_folders_are_matched_by_name_alone(
    write_folder: Callable[..., Path],
    make_pixels: Callable[..., np.ndarray],
    write_manifest: Callable[..., None],
) -> None:
    animals = open_images(write_folder("animals", make_pixels(4), classes=["cat", "dog"]))
    plants = open_images(write_folder("plants", make_pixels(4), classes=["fern", "moss"]))
    assert common_classes(animals, plants) is None
    assert "match neither by name nor by id" in class_notes(animals, plants)[0]
    write_folder("generated", make_pixels(4))
    for ids, matched in (([0, 1, 0, 1], True), ([0, 1, 0, 7], False)):
        write_manifest(animals.path.parent / "generated", ids)
        generated = open_images(animals.path.parent / "generated")
        assert (common_classes(animals, generated) is not None) is matched
        assert ("in the order of their names" in class_notes(animals, generated)[0]) is matched
    assert class_notes(animals, animals) == []


@pytest.mark.parametrize(
    "file", ["/etc/passwd", "../secret.png", "a/../../secret.png", "link.png", "out/secret.png"]
)
def test_a_manifest_leads_nowhere_out_of_its_folder(
    file: str, write_folder: Callable[..., Path], make_pixels: Callable[..., np.ndarray]
) -> None:
    folder = write_folder("generated", make_pixels(2))
    outside = write_folder("outside", make_pixels(1)) / "0000.png"
    outside.rename(folder.parent / "secret.png")
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    (folder / "out").symlink_to(folder.parent)
    rows = [{"file": "0000.png"}, {"file": file}]
    (folder / "manifest.json").write_text(json.dumps({"images": rows}))
    with pytest.raises(ValueError, match="leads out of its folder"):
        open_images(folder)


def test_links_out_of_a_folder_are_counted(
    write_folder: Callable[..., Path], make_pixels: Callable[..., np.ndarray]
) -> None:
    folder, other = write_folder("real", make_pixels(2)), write_folder("other", make_pixels(3))
    assert open_images(folder).notes == []
    (folder / "link.png").symlink_to(other / "0000.png")
    (folder / "inner.png").symlink_to(folder / "0000.png")
    assert open_images(folder).notes == ["1 of the files are links to places outside of the folder."]
    (folder / "more").symlink_to(other)
    assert open_images(folder).notes == ["4 of the files are links to places outside of the folder."]


def test_pipes_and_devices_are_not_opened(
    write_folder: Callable[..., Path], make_pixels: Callable[..., np.ndarray]
) -> None:
    folder = write_folder("real", make_pixels(1))
    os.mkfifo(folder / "pipe.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    for read in list(open_images(folder).readers())[1:]:
        with pytest.raises(ValueError, match="no regular file"):
            read()


@pytest.mark.parametrize("line", ["{digest}  {name}", "{digest} *./{name}"])
def test_a_picture_that_was_changed_and_can_be_read_is_told_by_its_hash(
    write_folder: Callable[..., Path], make_pixels: Callable[..., np.ndarray], line: str
) -> None:
    folder = write_folder("made", make_pixels(3))
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    listed = [line.format(digest=digest, name=name) for name, digest in digests.items()][:2]
    (folder / "SHA256SUMS").write_text("\n".join(listed))
    assert len(_read_all(folder)) == 3
    Image.fromarray(RGB).save(folder / listed[0].split()[-1].strip("*./"))
    with pytest.raises(ValueError, match="not the file that SHA256SUMS beside it records"):
        _read_all(folder)
    (folder / "SHA256SUMS").unlink()
    assert len(_read_all(folder)) == 3


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_class_folder_that_must_not_be_read_is_named() -> None:
    with tempfile.TemporaryDirectory() as name:
        for part in ("a", "b"):
            (Path(name) / part).mkdir()
            Image.fromarray(RGB).save(Path(name) / part / "0.png")
        os.chmod(name, 0o755)
        os.chmod(Path(name) / "b", 0o700)
        os.seteuid(65534)
        try:
            with pytest.raises(ValueError, match=r"/b cannot be read .*make it readable"):
                open_images(name)
        finally:
            os.seteuid(0)


def _pngs(pixels: np.ndarray) -> list[bytes]:
    found = []
    for image in pixels:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "png")
        found.append(buffer.getvalue())
    return found


def _write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_members_that_lead_out_of_an_archive_are_read_in_place(
    make_pixels: Callable[..., np.ndarray], tmp_path: Path
) -> None:
    pixels = make_pixels(2)
    _write_tar(tmp_path / "set.tar", dict(zip(("../../0.png", "1.png"), _pngs(pixels), strict=True)))
    images = open_images(tmp_path / "set.tar")
    assert images.names == ["../../0.png", "1.png"]
    np.testing.assert_array_equal([read() for read in images.readers()], pixels)


def test_zip_and_webdataset_are_sets(make_pixels: Callable[..., np.ndarray], tmp_path: Path) -> None:
    pixels = make_pixels(4)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for index, content in enumerate(_pngs(pixels)):
            archive.writestr(f"{'cat' if index < 2 else 'dog'}/{index}.png", content)
        archive.writestr("notes.md", "no image")
    images = open_images(tmp_path / "set.zip")
    np.testing.assert_array_equal([read() for read in images.readers()], pixels)
    assert images.labels == [0, 0, 1, 1]
    assert images.notes == []
    (tmp_path / "shards").mkdir()
    for shard in range(2):
        files = {}
        for index in (2 * shard, 2 * shard + 1):
            files |= {f"{index}.png": _pngs(pixels)[index], f"{index}.cls": b"%d" % (7 + shard)}
            files[f"{index}.txt"] = f"prompt {index}".encode()
        _write_tar(tmp_path / "shards" / f"{shard:06d}.tar", files)
    images = open_images(tmp_path / "shards")
    np.testing.assert_array_equal([read() for read in images.readers()], pixels)
    assert images.labels == [7, 7, 8, 8]
    assert images.prompts["000001.tar/3.png"] == "prompt 3"


def test_archives_that_are_damaged_or_hostile_are_refused(
    make_pixels: Callable[..., np.ndarray], tmp_path: Path
) -> None:
    files = {f"{index}.png": content for index, content in enumerate(_pngs(make_pixels(3)))}
    _write_tar(tmp_path / "set.tar", files)
    content = (tmp_path / "set.tar").read_bytes()
    second = content.index(b"1.png")
    for name, damaged in (
        ("in_file", content[: second + 700]),
        ("in_header", content[: second + 100]),
        ("between", content[:second]),
        ("header", content[:second] + b"x" + content[second + 1 :]),
    ):
        (tmp_path / f"{name}.tar").write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{name}\.tar is not a whole archive"):
            open_images(tmp_path / f"{name}.tar")
    with tarfile.open(tmp_path / "links.tar", "w") as tar:
        link = tarfile.TarInfo("passwd.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(ValueError, match="holds no image"):
        open_images(tmp_path / "links.tar")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr("0.png", files["0.png"])
    flipped = bytearray((tmp_path / "set.zip").read_bytes())
    flipped[300] ^= 1
    (tmp_path / "flipped.zip").write_bytes(flipped)
    with pytest.raises(ValueError, match=r"0\.png in .*flipped\.zip cannot be read: .*CRC"):
        next(iter(open_images(tmp_path / "flipped.zip").readers()))()


def test_arrays_are_checked_before_the_work(make_pixels: Callable[..., np.ndarray], tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", arr_0=make_pixels(5))
    content = bytearray((tmp_path / "set.npz").read_bytes())
    (tmp_path / "renamed.bin").write_bytes(content)
    assert len(open_images(tmp_path / "renamed.bin").names) == 5
    content[len(content) // 2] ^= 1
    (tmp_path / "flipped.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"flipped\.npz is not a whole npz file .*(checksum|CRC)"):
        open_images(tmp_path / "flipped.npz")
    (tmp_path / "page.npz").write_text("<!doctype html><title>404</title>")
    with pytest.raises(ValueError, match="it is a web page"):
        open_images(tmp_path / "page.npz")
    header = io.BytesIO()
    absurd = {"descr": "|u1", "fortran_order": False, "shape": (10**12, 512, 512, 3)}
    np.lib.format.write_array_header_1_0(header, absurd)
    with zipfile.ZipFile(tmp_path / "absurd.npz", "w") as archive:
        archive.writestr("arr_0.npy", header.getvalue() + bytes(100))
    with pytest.raises(ValueError, match="something else follows"):
        open_images(tmp_path / "absurd.npz")


def test_an_archive_of_a_generated_folder_has_its_manifest(
    write_folder: Callable[..., Path],
    make_pixels: Callable[..., np.ndarray],
    write_manifest: Callable[..., None],
) -> None:
    folder = write_folder("generated", make_pixels(4))
    write_manifest(folder, [3, 1, 3], names={3: "three"})
    with zipfile.ZipFile(folder.with_suffix(".zip"), "w") as archive:
        for file in sorted(folder.iterdir())[:-2]:
            archive.write(file, file.name)
        archive.write(folder / "manifest.json", "manifest.json")
    images = open_images(folder.with_suffix(".zip"))
    expected = open_images(folder)
    assert (images.names, images.labels) == (expected.names, expected.labels)
    assert (images.class_names, images.manifest) == (expected.class_names, expected.manifest)


def test_pictures_that_unpack_to_gigabytes_are_refused_and_large_ones_decoded_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("L", (20_000, 10_000)).save(tmp_path / "bomb.png")
    with pytest.raises(Image.DecompressionBombError):
        read_image(tmp_path / "bomb.png")
    Image.fromarray(RGB).save(tmp_path / "image.png")
    lock, at_once, most = threading.Lock(), 0, 0
    convert = Image.Image.convert

    def counted(image: Image.Image, mode: str) -> Image.Image:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        time.sleep(0.05)
        with lock:
            at_once -= 1
        return convert(image, mode)

    monkeypatch.setattr(Image.Image, "convert", counted)
    for large, together in ((samples._LARGE, True), (0, False)):
        monkeypatch.setattr(samples, "_LARGE", large)
        most = 0
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(read_image, [tmp_path / "image.png"] * 4))
        assert (most > 1) is together


def test_what_systems_put_beside_images_is_none_of_the_set(tmp_path: Path) -> None:
    for name in ("a.png", ".a.png", ".ipynb_checkpoints/a.png", "@eaDir/a.png", "__MACOSX/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "Thumbs.db").write_bytes(b"")
    assert open_images(tmp_path).names == ["a.png"]
