"""Two sets of files in, a report out."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mhla_diffusion.evaluation import (
    FeatureExtractor,
    FeatureStatistics,
    compute_statistics,
    evaluate_images,
    frechet_distance,
)

MakePixels = Callable[..., np.ndarray]
WriteFolder = Callable[..., Path]


def test_score_is_the_distance_of_the_features(
    extractor: FeatureExtractor, make_pixels: MakePixels, write_folder: WriteFolder
) -> None:
    a, b = make_pixels(30, seed=0), make_pixels(25, seed=1, brightness=40)
    real, generated = write_folder("real", a), write_folder("generated", b)
    report = evaluate_images(real, generated, extractor=extractor, batch_size=7, num_workers=3)
    features = [extractor(np.stack([extractor.prepare(pixels) for pixels in images])) for images in (a, b)]
    moments = [
        (x.astype(np.float64).mean(axis=0), np.cov(x, rowvar=False, dtype=np.float64)) for x in features
    ]
    assert report.scores[0].name == "fd_mean_colours"
    assert report.scores[0].value == pytest.approx(frechet_distance(*moments[0], *moments[1]), rel=1e-6)
    assert (report.real.count, report.generated.count) == (30, 25)


def test_folder_and_npz_of_the_same_images_are_the_same(
    extractor: FeatureExtractor, make_pixels: MakePixels, write_folder: WriteFolder, tmp_path: Path
) -> None:
    pixels = make_pixels(20)
    np.savez(tmp_path / "real.npz", arr_0=pixels)
    report = evaluate_images(tmp_path / "real.npz", write_folder("same", pixels), extractor=extractor)
    assert report.scores[0].value == 0.0
    assert report.real.fingerprint == report.generated.fingerprint


def test_batch_size_and_threads_do_not_change_the_score(
    extractor: FeatureExtractor, make_pixels: MakePixels, write_folder: WriteFolder
) -> None:
    folders = write_folder("real", make_pixels(30)), write_folder("generated", make_pixels(30, seed=1))
    one = evaluate_images(*folders, extractor=extractor, batch_size=1, num_workers=1)
    many = evaluate_images(*folders, extractor=extractor, batch_size=64, num_workers=4)
    assert one.scores[0].value == pytest.approx(many.scores[0].value, rel=1e-6)
    assert one.generated.fingerprint == many.generated.fingerprint


def test_unreadable_files_are_named_skipped_and_counted(
    extractor: FeatureExtractor,
    make_pixels: MakePixels,
    write_folder: WriteFolder,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pixels = make_pixels(12)
    real, generated = write_folder("real", pixels), write_folder("generated", pixels)
    whole = (generated / "0003.png").read_bytes()
    (generated / "0003.png").write_bytes(whole[: len(whole) // 2])
    (generated / "0005.png").write_text("not an image")
    (generated / "0007.png").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        report = evaluate_images(real, generated, extractor=extractor, batch_size=4)
    assert [file.file for file in report.generated.skipped] == ["0003.png", "0005.png", "0007.png"]
    assert all(file.reason for file in report.generated.skipped)
    assert report.generated.count == 9
    assert "skipped 0003.png" in caplog.text
    kept = write_folder("kept", np.delete(pixels, [3, 5, 7], axis=0))
    expected = evaluate_images(real, kept, extractor=extractor)
    assert report.scores[0].value == pytest.approx(expected.scores[0].value, rel=1e-6)


def test_a_listed_file_that_is_not_there_is_skipped(
    extractor: FeatureExtractor,
    make_pixels: MakePixels,
    write_folder: WriteFolder,
    write_manifest: Callable[..., None],
) -> None:
    generated = write_folder("generated", make_pixels(5))
    write_manifest(generated, [0] * 6)
    report = evaluate_images(generated, generated, extractor=extractor)
    assert [file.file for file in report.generated.skipped] == ["0005.png"]
    assert report.generated.manifest["num_inference_steps"] == 20


def test_sizes_may_differ(
    extractor: FeatureExtractor, make_pixels: MakePixels, write_folder: WriteFolder
) -> None:
    folder = write_folder("real", make_pixels(6))
    Image.fromarray(make_pixels(1)[0]).resize((300, 7)).save(folder / "wide.jpg")
    Image.fromarray(make_pixels(1)[0]).resize((1, 1)).save(folder / "dot.webp", lossless=True)
    assert compute_statistics(folder, extractor=extractor).count == 8


def test_nothing_readable_is_an_error_that_names_the_first(
    extractor: FeatureExtractor, make_pixels: MakePixels, write_folder: WriteFolder
) -> None:
    real, generated = write_folder("real", make_pixels(3)), write_folder("generated", make_pixels(2))
    (generated / "0001.png").write_text("no image")
    with pytest.raises(ValueError, match=r"1 readable image\(s\) of 2 .*0001\.png.*at least 2"):
        evaluate_images(real, generated, extractor=extractor)


def test_nan_features_are_an_error(
    extractor: FeatureExtractor, make_pixels: MakePixels, write_folder: WriteFolder
) -> None:
    broken = dataclasses.replace(extractor, network=lambda x: extractor.network(x) * float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        compute_statistics(write_folder("real", make_pixels(3)), extractor=broken)


def test_too_few_images_are_flagged_beside_the_score(
    extractor: FeatureExtractor,
    make_pixels: MakePixels,
    write_folder: WriteFolder,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    rng = np.random.default_rng(0)
    many = tmp_path / "many.npz"
    np.savez(many, arr_0=rng.integers(0, 256, (2048, 2, 2, 3), dtype=np.uint8))
    with caplog.at_level(logging.INFO):
        report = evaluate_images(many, write_folder("few", make_pixels(10)), extractor=extractor)
    (flag,) = report.scores[0].flags
    assert "Only 10 generated images for 12-dimensional features" in flag
    assert flag in caplog.text
    assert flag in report.to_html()
    assert evaluate_images(many, many, extractor=extractor).scores[0].flags == []


def test_saved_statistics_stand_for_the_images(
    extractor: FeatureExtractor, make_pixels: MakePixels, write_folder: WriteFolder, tmp_path: Path
) -> None:
    real, generated = (
        write_folder("real", make_pixels(20)),
        write_folder("generated", make_pixels(20, seed=1)),
    )
    report = evaluate_images(real, generated, extractor=extractor)
    report.real_statistics.save(tmp_path / "real.npz")
    again = evaluate_images(tmp_path / "real.npz", generated, extractor=extractor)
    assert again.scores[0] == report.scores[0]
    assert (again.real.count, again.real.fingerprint) == (20, report.real.fingerprint)
    assert again.pictures[0].real == []
    assert len(again.pictures[0].generated) == 20


@pytest.mark.parametrize(
    ("dimension", "stated", "message"),
    [
        (5, {"extractor": "mean_colours"}, "5 dimensions, the extractor mean_colours gives 12"),
        (12, {}, "does not state its extractor"),
        (12, {"extractor": "inception"}, "was made with the extractor inception"),
        (12, {"extractor": "mean_colours", "weights_sha256": "f" * 64}, "weights sha256 ffff"),
    ],
)
def test_statistics_of_something_else_are_refused(
    dimension: int,
    stated: dict[str, str],
    message: str,
    extractor: FeatureExtractor,
    make_pixels: MakePixels,
    write_folder: WriteFolder,
    tmp_path: Path,
) -> None:
    FeatureStatistics(np.zeros(dimension), np.eye(dimension), **stated).save(tmp_path / "real.npz")
    with pytest.raises(ValueError, match=message):
        evaluate_images(tmp_path / "real.npz", write_folder("g", make_pixels(3)), extractor=extractor)


def test_trusted_statistics_are_flagged(
    extractor: FeatureExtractor, make_pixels: MakePixels, write_folder: WriteFolder, tmp_path: Path
) -> None:
    np.savez(tmp_path / "real.npz", mu=np.zeros(12), sigma=np.eye(12))
    report = evaluate_images(
        tmp_path / "real.npz", write_folder("g", make_pixels(3)), extractor=extractor, trust_statistics=True
    )
    assert "does not state its extractor" in report.scores[0].flags[0]
    assert "number of real images is not stated" in report.scores[0].flags[1]
    assert report.real.count is None
    assert "not stated" in report.to_html()


@pytest.mark.parametrize("real_names", [["a", "b", "c"], ["zero", "one", "two"]], ids=["by_id", "by_name"])
def test_pictures_are_aligned_by_class(
    real_names: list[str],
    extractor: FeatureExtractor,
    make_pixels: MakePixels,
    write_folder: WriteFolder,
    write_manifest: Callable[..., None],
) -> None:
    real = write_folder("real", make_pixels(9), classes=real_names)
    generated = write_folder("generated", make_pixels(4))
    write_manifest(generated, [2, 0, 2, 0], names={0: "zero", 2: "two"})
    rows = evaluate_images(real, generated, extractor=extractor).pictures
    assert {row.label for row in rows} == {"zero", "two"}
    for row in rows:
        assert [p.name for p in row.generated] == {
            "zero": ["0001.png", "0003.png"],
            "two": ["0000.png", "0002.png"],
        }[row.label]
        # By id the folders a, b, c are the classes 0, 1, 2.
        folder = row.label if row.label in real_names else {"zero": "a", "two": "c"}[row.label]
        assert [p.name.split("/")[0] for p in row.real] == [folder] * 3
