"""What a report says of sets that are not what they seem, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mhla_diffusion.evaluation import FeatureExtractor, compute_statistics, evaluate_images, evaluate_videos
from mhla_diffusion.evaluation.pages.runs import load_run
from mhla_diffusion.evaluation.scores.resampling import draw_replicates
from mhla_diffusion.evaluation.sets.images import open_images
from mhla_diffusion.evaluation.sets.videos import open_videos
from mhla_diffusion.files.videos import write_video
from tests.evaluation.clips import moving_squares

WriteFolder = Callable[..., Path]


def flags_of(real: Path, generated: Path, extractor: FeatureExtractor) -> str:
    report = evaluate_images(real, generated, extractor=extractor, metrics="frechet", bootstrap=2)
    return " ".join(report.scores[0].flags)


def test_copies_duplicates_and_what_is_left_out_are_said(
    extractor: FeatureExtractor, make_pixels: Callable[..., np.ndarray], write_folder: WriteFolder
) -> None:
    pixels = make_pixels(9)
    real = write_folder("real", pixels)
    apart = flags_of(real, write_folder("apart", make_pixels(9, seed=1)), extractor)
    assert "same pixels" not in apart
    generated = write_folder("generated", np.concatenate([pixels[:4], pixels[:2], make_pixels(3, seed=1)]))
    rows = [{"file": f"{i:04d}.png"} for i in range(8)]
    (generated / "manifest.json").write_text(json.dumps({"images": rows, "complete": False}))
    found = flags_of(real, generated, extractor)
    assert "4 generated images have the same pixels as real ones." in found
    assert "2 generated images have the same pixels as one before." in found
    assert "1 generated images are not in their manifest and are left out." in found
    assert "The manifest says that generated images were not all made." in found


def test_other_sizes_are_said_from_a_cache_too(
    extractor: FeatureExtractor,
    make_pixels: Callable[..., np.ndarray],
    write_folder: WriteFolder,
    tmp_path: Path,
) -> None:
    real = write_folder("real", make_pixels(5))
    generated = write_folder("generated", make_pixels(5, seed=1)[:, :10])
    Image.fromarray(make_pixels(1, seed=2)[0, :7]).save(generated / "small.png")
    for _ in range(2):
        score = {"extractor": extractor, "metrics": "frechet", "bootstrap": 2, "cache": tmp_path / "cache"}
        report = evaluate_images(real, generated, **score)
        assert report.real.sizes == {"20 x 24": 5}
        assert report.generated.sizes == {"10 x 24": 5, "7 x 24": 1}
        said = "Real images are 20 x 24 pixels, generated ones 10 x 24 (and 1 other sizes): sizes and ratios"
        assert sum(flag.startswith(said) for flag in report.scores[0].flags) == 1


def test_generated_samples_among_the_real_ones_are_refused(
    extractor: FeatureExtractor, make_pixels: Callable[..., np.ndarray], write_folder: WriteFolder
) -> None:
    real = write_folder("real", make_pixels(4))
    inside = write_folder("real/generated", make_pixels(3, seed=1))
    with pytest.raises(ValueError, match=r"lies in .*real, so that 3 of its samples would be real ones too"):
        evaluate_images(real, inside, extractor=extractor)


def test_a_folder_of_several_sets_is_said(
    make_pixels: Callable[..., np.ndarray], write_folder: WriteFolder, write_manifest: Callable[..., None]
) -> None:
    for name in ("runs/a", "runs/b"):
        write_manifest(write_folder(name, make_pixels(2)), [0, 1])
    (note,) = open_images(write_folder("runs", make_pixels(0)[:0]).joinpath("a").parent).notes
    assert note == "It holds 2 sets with a manifest.json each (a, b), taken for one."


def test_statistics_know_how_pixels_were_read(
    extractor: FeatureExtractor, tmp_path: Path, make_pixels: Callable[..., np.ndarray]
) -> None:
    for name in ("real", "generated"):
        (tmp_path / name).mkdir()
        for i, pixels in enumerate(make_pixels(5)):
            alpha = np.full((*pixels.shape[:2], 1), 40, np.uint8)
            Image.fromarray(np.concatenate([pixels, alpha], 2)).save(tmp_path / name / f"{i}.png")
    statistics = compute_statistics(tmp_path / "real", extractor=extractor, background="black")
    statistics.save(tmp_path / "black.npz")
    score = {"extractor": extractor, "bootstrap": 2}
    with pytest.raises(ValueError, match=r"read otherwise \(.*black.*\) than now \(.*white"):
        evaluate_images(tmp_path / "black.npz", tmp_path / "generated", **score)
    report = evaluate_images(tmp_path / "black.npz", tmp_path / "generated", background="black", **score)
    assert report.scores[0].value == pytest.approx(0, abs=1e-6)
    with np.load(tmp_path / "black.npz") as stored:
        np.savez(tmp_path / "old.npz", **{key: stored[key] for key in stored if key != "reading"})
    report = evaluate_images(tmp_path / "old.npz", tmp_path / "generated", **score)
    assert any("old.npz does not state how pixels were read" in flag for flag in report.scores[0].flags)


def test_reports_on_other_statistics_are_told_apart(
    extractor: FeatureExtractor,
    tmp_path: Path,
    make_pixels: Callable[..., np.ndarray],
    write_folder: WriteFolder,
) -> None:
    generated, conditions = write_folder("generated", make_pixels(5)), []
    for name, shift in (("a", 0), ("b", 0), ("c", 50)):
        statistics = compute_statistics(write_folder("real", make_pixels(6, seed=2)), extractor=extractor)
        np.savez(tmp_path / f"{name}.npz", mu=statistics.mu + shift, sigma=statistics.sigma)
        report = evaluate_images(
            tmp_path / f"{name}.npz", generated, extractor=extractor, bootstrap=2, trust_statistics=True
        )
        report.save(tmp_path / name)
        conditions.append(load_run(tmp_path / name, name).conditions["real.statistics_sha256"])
    assert conditions[0] == conditions[1] != conditions[2]


def test_frames_of_one_video_are_no_samples_of_their_own(
    extractor: FeatureExtractor, write_videos: Callable[..., Path]
) -> None:
    folders = write_videos("real", moving_squares(9, 0)), write_videos("generated", moving_squares(9, 1))
    report = evaluate_videos(*folders, extractor=extractor, frames=3, frame_wise=True)
    assert [score.metric for score in report.scores] == ["frechet"]
    (flag, _) = report.scores[0].flags
    assert flag.startswith("Only 9 real videos' frames for 12-dimensional features")
    with pytest.raises(ValueError, match=r"kid needs samples one by one, and frames of one video are alike"):
        evaluate_videos(*folders, extractor=extractor, frames=3, frame_wise=True, metrics=["kid"])
    drawn = draw_replicates(6, 9, count=4, seed=0, group=3)
    for counts in (drawn.real, drawn.generated):
        assert counts is not None
        of_videos = counts.reshape(-1, 3, 4)
        assert (of_videos == of_videos[:, :1]).all()
        assert (counts.sum(0) == len(counts)).all()


def test_clips_of_files_that_are_called_alike_begin_at_places_of_their_own(tmp_path: Path) -> None:
    clip = moving_squares(1, 0, frames=30)[0]
    for number in range(6):
        (tmp_path / "nested" / f"{number:03d}").mkdir(parents=True)
        write_video(clip, tmp_path / "nested" / f"{number:03d}" / "video.mp4", fps=8)
    for kind in ("zip", "tar"):
        shutil.make_archive(str(tmp_path / "packed"), kind, tmp_path / "nested")
    found = []
    for path in (tmp_path / "nested", tmp_path / "packed.zip", tmp_path / "packed.tar"):
        videos = open_videos(path, frames=4)
        assert videos.labels is None, "a folder for each is no class"
        found.append([read().tobytes() for read in videos.readers()])
    assert len(set(found[0])) > 3
    assert found[0] == found[1] == found[2]


def test_folders_of_frames_do_not_say_their_rate(tmp_path: Path) -> None:
    for number, clip in enumerate(moving_squares(3, 0, frames=6)):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        for i, frame in enumerate(clip):
            Image.fromarray(frame).save(folder / f"{i}.png")
    assert len(open_videos(tmp_path, frames=4).names) == 3
    with pytest.raises(ValueError, match="holds frames, which do not say their frames a second"):
        open_videos(tmp_path, frames=4, fps=8)


def test_small_classes_are_said(
    extractor: FeatureExtractor, make_pixels: Callable[..., np.ndarray], write_folder: WriteFolder
) -> None:
    folders = [write_folder(name, make_pixels(8, seed=i), ["x", "y"]) for i, name in enumerate("ab")]
    report = evaluate_images(*folders, extractor=extractor, metrics=["frechet_per_class"], bootstrap=2)
    assert any("Classes have 4 samples and more for 12-dim" in flag for flag in report.scores[0].flags)
