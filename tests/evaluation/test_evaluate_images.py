"""Two sets of files in, a report out."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from mhla_diffusion.commands import evaluate
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


def test_a_package_that_a_score_needs_is_missed_before_any_work(
    extractor: FeatureExtractor,
    make_pixels: MakePixels,
    write_folder: WriteFolder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.metric_kid", None)
    monkeypatch.setattr("mhla_diffusion.evaluation.evaluate.measure", lambda *_, **__: pytest.fail("work"))
    folders = write_folder("real", make_pixels(6)), write_folder("generated", make_pixels(6, seed=1))
    with pytest.raises(ImportError, match="torch_fidelity is not installed"):
        evaluate_images(*folders, extractor=extractor, metrics=["frechet", "kid"])


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


def test_what_is_no_path_is_named(extractor: FeatureExtractor, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"generated must be the path of a set, .* got list: save samples to"
    ):
        evaluate_images(tmp_path, [tmp_path / "0.png"], extractor=extractor)  # type: ignore[arg-type]


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
        report = evaluate_images(real, generated, extractor=extractor, batch_size=4, max_skipped=0.3)
    assert [file.file for file in report.generated.skipped] == ["0003.png", "0005.png", "0007.png"]
    assert all(file.reason for file in report.generated.skipped)
    assert report.generated.count == 9
    assert "skipped 0003.png" in caplog.text
    kept = write_folder("kept", np.delete(pixels, [3, 5, 7], axis=0))
    expected = evaluate_images(real, kept, extractor=extractor)
    assert report.scores[0].value == pytest.approx(expected.scores[0].value, rel=1e-6)


def test_more_than_a_hundredth_unreadable_is_refused_at_once(
    extractor: FeatureExtractor, make_pixels: MakePixels, write_folder: WriteFolder
) -> None:
    folder = write_folder("real", make_pixels(200))
    (folder / "0003.png").write_text("not an image")
    (folder / "0005.png").write_bytes(b"")
    assert evaluate_images(folder, folder, extractor=extractor, bootstrap=0).real.count == 198
    (folder / "0007.png").write_text("not an image")
    batches = []

    def network(batch: Tensor) -> Tensor:
        batches.append(len(batch))
        return extractor.network(batch)  # type: ignore[return-value]

    counting = dataclasses.replace(extractor, network=network)
    with pytest.raises(
        ValueError, match=r"3 of the 200 images in .* more than the share max_skipped = 0\.01"
    ):
        evaluate_images(folder, folder, extractor=counting, batch_size=4)
    assert len(batches) < 5


def test_duplicates_and_copies_are_counted(
    extractor: FeatureExtractor, make_pixels: MakePixels, write_folder: WriteFolder
) -> None:
    real, pixels = make_pixels(10), make_pixels(10, seed=1)
    pixels[4] = pixels[7] = real[2]
    report = evaluate_images(write_folder("real", real), write_folder("made", pixels), extractor=extractor)
    assert (report.real.duplicates, report.generated.duplicates) == (0, 1)
    assert (report.real.copies, report.generated.copies) == (0, 1)
    assert "1 with the same pixels as a real one" in report.to_html()
    assert report.neighbours is not None
    generated, nearest = report.neighbours.closest[0]
    assert (generated.name, nearest.name) == ("0004.png", "0002.png")


def test_a_cache_saves_the_network_and_changes_nothing(
    extractor: FeatureExtractor, make_pixels: MakePixels, write_folder: WriteFolder, tmp_path: Path
) -> None:
    folders = write_folder("real", make_pixels(12)), write_folder("generated", make_pixels(9, seed=1))
    np.savez(tmp_path / "real.npz", arr_0=make_pixels(12))
    seen = []

    def network(batch: Tensor) -> Tensor:
        seen.append(len(batch))
        if len(seen) == stop:
            raise KeyboardInterrupt
        return extractor.network(batch)  # type: ignore[return-value]

    counting = dataclasses.replace(extractor, network=network)
    settings = {"extractor": counting, "cache": tmp_path / "cache", "batch_size": 4}
    stop = 3
    with pytest.raises(KeyboardInterrupt):
        evaluate_images(*folders, **settings)
    stop = -1
    seen.clear()
    report = evaluate_images(*folders, **settings)
    assert sum(seen) == 4 + 9  # two batches were there
    expected = evaluate_images(*folders, extractor=extractor, batch_size=4)
    assert report.scores == expected.scores
    assert (report.real, report.generated) == (expected.real, expected.generated)
    seen.clear()
    (folders[0] / "0003.png").rename(folders[0] / "renamed.png")
    evaluate_images(*folders, **settings)
    assert seen == []
    evaluate_images(tmp_path / "real.npz", folders[1], **settings)
    assert sum(seen) == 12  # rows of an npz are known by their pixels, files by their content
    evaluate_images(tmp_path / "real.npz", folders[1], **settings)
    assert sum(seen) == 12
    other = dataclasses.replace(counting, weights_sha256="1" * 64)
    evaluate_images(*folders, **settings | {"extractor": other})
    assert sum(seen) == 12 + 21


def test_several_extractors_in_one_pass(
    extractor: FeatureExtractor, make_pixels: MakePixels, write_folder: WriteFolder
) -> None:
    folders = write_folder("real", make_pixels(12)), write_folder("generated", make_pixels(9, seed=1))
    other = dataclasses.replace(
        extractor, name="squares", score_name="fd_squares", network=lambda x: extractor.network(x) ** 2
    )
    both = evaluate_images(*folders, extractor=[extractor, other], metrics=["frechet", "recall"])
    names = ["fd_mean_colours", "recall_mean_colours", "fd_squares", "recall_squares"]
    assert [score.name for score in both.scores] == names
    for part in (extractor, other):
        alone = evaluate_images(*folders, extractor=part, metrics=["frechet", "recall"])
        assert [s for s in both.scores if s.extractor == part.name] == alone.scores
        assert both.protocol["extractors"][part.name] == alone.protocol["extractors"][part.name]


def test_the_command_for_statistics(
    extractor: FeatureExtractor, make_pixels: MakePixels, write_folder: WriteFolder, tmp_path: Path
) -> None:
    folder = write_folder("real", make_pixels(8))
    evaluate.stats(out=str(tmp_path / "real.npz"), images=folder, extractor=extractor)
    saved, expected = (
        FeatureStatistics.load(tmp_path / "real.npz"),
        compute_statistics(folder, extractor=extractor),
    )
    np.testing.assert_array_equal(saved.sigma, expected.sigma)
    with pytest.raises(ValueError, match=r"real\.npz already there"):
        evaluate.stats(out=str(tmp_path / "real.npz"), images=tmp_path / "nowhere", extractor=extractor)


def test_a_reference_batch_of_adm_has_statistics_of_more_than_it_holds(
    extractor: FeatureExtractor, make_pixels: MakePixels, write_folder: WriteFolder, tmp_path: Path
) -> None:
    pixels, generated = make_pixels(40), write_folder("generated", make_pixels(9, seed=1))
    statistics = compute_statistics(write_folder("all", pixels), extractor=extractor)
    np.savez(tmp_path / "ref.npz", arr_0=pixels[:12], mu=statistics.mu, sigma=statistics.sigma)
    report = evaluate_images(tmp_path / "ref.npz", generated, extractor=extractor, trust_statistics=True)
    scores = {score.metric: score.value for score in report.scores}
    assert "statistics of an unstated number of images; other scores" in " ".join(report.scores[0].flags)
    assert "of the 12 that lie beside these" in " ".join(report.scores[0].flags)
    assert not any("Only 12 real" in flag for flag in report.scores[0].flags)
    whole = evaluate_images(tmp_path / "all", generated, extractor=extractor)
    part = evaluate_images(write_folder("part", pixels[:12]), generated, extractor=extractor)
    assert scores["frechet"] == pytest.approx(whole.scores[0].value, rel=1e-9)
    of_part = {score.metric: score.value for score in part.scores}
    for metric in ("precision", "recall", "coverage", "kid"):
        assert scores[metric] == pytest.approx(of_part[metric], rel=1e-9)


def test_a_dataset_of_hugging_face_is_a_set(
    extractor: FeatureExtractor, make_pixels: MakePixels, write_folder: WriteFolder, tmp_path: Path
) -> None:
    import datasets

    pixels = make_pixels(8)
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b"]))
    rows = {"image": [Image.fromarray(image) for image in pixels], "label": [0, 1] * 4}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "dataset")
    report = evaluate_images(tmp_path / "dataset", tmp_path / "dataset", extractor=extractor)
    folder = evaluate_images(
        write_folder("same", pixels, ["a", "b"]), tmp_path / "dataset", extractor=extractor
    )
    assert report.scores[0].value == 0
    assert report.real.count == 8
    assert {row.label for row in folder.pictures} == {"a", "b"}
    no_images = datasets.Dataset.from_dict({"text": ["x"]})
    no_images.save_to_disk(tmp_path / "texts")
    with pytest.raises(ValueError, match="texts has no column of images, only text"):
        compute_statistics(tmp_path / "texts", extractor=extractor)


def test_a_listed_file_that_is_not_there_is_skipped(
    extractor: FeatureExtractor,
    make_pixels: MakePixels,
    write_folder: WriteFolder,
    write_manifest: Callable[..., None],
) -> None:
    generated = write_folder("generated", make_pixels(5))
    write_manifest(generated, [0] * 6)
    report = evaluate_images(generated, generated, extractor=extractor, metrics="frechet", max_skipped=0.2)
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


def test_too_few_images_are_said_once_below_the_scores(
    extractor: FeatureExtractor,
    make_pixels: MakePixels,
    write_folder: WriteFolder,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    rng = np.random.default_rng(0)
    many = tmp_path / "many.npz"
    np.savez(many, arr_0=rng.integers(0, 256, (2048, 2, 2, 3), dtype=np.uint8))
    few = write_folder("few", make_pixels(10)[:, :2, :2])
    with caplog.at_level(logging.INFO):
        report = evaluate_images(many, few, extractor=extractor)
    (flag,) = report.scores[0].flags
    assert "Only 10 generated images for 12-dimensional features" in flag
    assert all(score.flags == [flag] for score in report.scores)
    scores = [str(score) for score in report.scores]
    assert caplog.messages[-len(scores) - 1 :] == [*scores, f"Caution: {flag}"]
    assert caplog.text.count(flag) == 1
    equal = evaluate_images(many, many, extractor=extractor, metrics="frechet", bootstrap=2)
    assert equal.scores[0].flags == ["2,048 generated images have the same pixels as real ones."]


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
    assert again.scores[0].value == report.scores[0].value
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
    rows = evaluate_images(real, generated, extractor=extractor, metrics="frechet").pictures
    assert {row.label for row in rows} == {"zero", "two"}
    for row in rows:
        assert [p.name for p in row.generated] == {
            "zero": ["0001.png", "0003.png"],
            "two": ["0000.png", "0002.png"],
        }[row.label]
        # By id the folders a, b, c are the classes 0, 1, 2.
        folder = row.label if row.label in real_names else {"zero": "a", "two": "c"}[row.label]
        assert [p.name.split("/")[0] for p in row.real] == [folder] * 3
