"""Scores against torch-fidelity, clean-fid and their definitions, on the same features."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cleanfid import fid as cleanfid
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from mhla_diffusion.evaluation import FeatureExtractor, FeatureStatistics, evaluate_images, frechet_distance
from mhla_diffusion.evaluation.scores.metrics import (
    METRICS,
    Measured,
    SetPair,
    _has_pairs,
    by_published_name,
)
from mhla_diffusion.evaluation.scores.neighbours import find_neighbourhoods
from mhla_diffusion.evaluation.scores.resampling import (
    draw_replicates,
    extrapolate,
    frechet_of_features,
    frechet_replicates,
    gaussian,
    interval,
    kernel_replicates,
)
from mhla_diffusion.evaluation.scores.score import Score

DIMENSION = 12


def _features(count: int, seed: int, shift: float = 0.0, dimension: int = DIMENSION) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).standard_normal((dimension, dimension))
    return (rng.standard_normal((count, dimension)) @ mixing + shift).astype(np.float32)


def _measured(features: np.ndarray, **more: object) -> Measured:
    found = gaussian(features, ddof=1)
    outputs = {"features": features, **more.pop("outputs", {})}  # type: ignore[dict-item]
    return Measured(FeatureStatistics(found.mu, found.sigma, len(features)), outputs, **more)  # type: ignore[arg-type]


@pytest.fixture
def sets(extractor: FeatureExtractor) -> SetPair:
    return SetPair(
        extractor,
        _measured(_features(300, 0)),
        _measured(_features(250, 1, shift=0.5)),
        replicates=40,
        seed=0,
    )


def _score(sets: SetPair, metric: str) -> Score:
    return METRICS[metric].compute(sets, metric)


def test_precision_and_recall_equal_torch_fidelity(sets: SetPair) -> None:
    real, generated = (torch.from_numpy(s.features["features"]) for s in (sets.real, sets.generated))
    expected = prc_features_to_metric(generated, real, verbose=False)
    assert _score(sets, "precision").value == pytest.approx(expected["precision"], rel=1e-6)
    assert _score(sets, "recall").value == pytest.approx(expected["recall"], rel=1e-6)
    assert 0 < expected["precision"] != expected["recall"] < 1


def test_density_and_coverage_are_those_of_their_definition(sets: SetPair) -> None:
    real, generated = sets.real.features["features"], sets.generated.features["features"]
    within = np.linalg.norm(real[:, None] - real[None], axis=-1)
    radii = np.sort(within, axis=1)[:, 5]
    between = np.linalg.norm(real[:, None] - generated[None], axis=-1)
    assert _score(sets, "density").value == pytest.approx((between < radii[:, None]).sum(0).mean() / 5)
    assert _score(sets, "coverage").value == pytest.approx((between < radii[:, None]).any(1).mean())


def test_nearest_neighbours_and_realism() -> None:
    real, generated = _features(60, 0), _features(40, 1)
    generated[7] = real[23]
    found = find_neighbourhoods(real, generated)
    distance = np.linalg.norm(generated[:, None] - real[None], axis=-1)
    np.testing.assert_array_equal(found.nearest, distance.argmin(axis=1))
    np.testing.assert_allclose(np.delete(found.distance, 7), np.delete(distance.min(axis=1), 7), rtol=1e-3)
    assert found.nearest[7] == 23
    assert found.distance.argmin() == 7
    radii = np.sort(np.linalg.norm(real[:, None] - real[None], axis=-1), axis=1)[:, 3]
    dense = radii <= np.median(radii)
    expected = (radii[dense] / np.maximum(distance[:, dense], 1e-12)).max(axis=1)
    np.testing.assert_allclose(np.delete(found.realism, 7), np.delete(expected, 7), rtol=1e-3)


def test_kid_equals_torch_fidelity(sets: SetPair) -> None:
    real, generated = (torch.from_numpy(s.features["features"]) for s in (sets.real, sets.generated))
    expected = kid_features_to_metric(generated, real, kid_subset_size=250, verbose=False)
    score = _score(sets, "kid")
    assert score.value == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-9)
    assert score.interval is not None
    assert score.interval[0] < score.value < score.interval[1]


def test_inception_score_equals_torch_fidelity_on_chunks_of_5000(extractor: FeatureExtractor) -> None:
    logits = 2 * _features(10_000, 3, dimension=20)
    generated = _measured(_features(10_000, 0), outputs={"logits": logits})
    sets = SetPair(extractor, _measured(_features(20, 1)), generated, replicates=30, seed=0)
    score = _score(sets, "inception_score")
    expected = isc_features_to_metric(torch.from_numpy(logits), splits=2, shuffle=False)
    assert score.value == pytest.approx(expected["inception_score_mean"], rel=1e-9)
    assert score.interval is not None
    assert score.interval[0] < score.value < score.interval[1]
    assert score.higher_is_better
    assert not score.flags
    for count, said in ((10_002, "The last chunk has 2 images"), (4_999, "There are 4,999 images")):
        few = _measured(_features(count, 0), outputs={"logits": 2 * _features(count, 3, dimension=20)})
        (flag,) = _score(SetPair(extractor, sets.real, few, replicates=2, seed=0), "inception_score").flags
        assert flag.startswith(f"{said} in place of 5,000")


def test_an_interval_that_leaves_the_bias_out_is_said(extractor: FeatureExtractor) -> None:
    few, many = (
        SetPair(extractor, _measured(_features(n, 0)), _measured(_features(n, 1)), replicates=20, seed=0)
        for n in (60, 20_000)
    )
    (flag,) = _score(few, "frechet").flags
    assert flag.startswith("The interval is of sets of this size")
    assert few.real.statistics.count == 60
    score = _score(many, "frechet")
    assert score.interval is not None
    assert score.extrapolated is not None
    inside = score.interval[0] <= score.extrapolated <= score.interval[1]
    assert bool(score.flags) == (not inside)


def test_frechet_and_kid_equal_clean_fid(sets: SetPair) -> None:
    real, generated = (s.features["features"].astype(np.float64) for s in (sets.real, sets.generated))
    assert _score(sets, "frechet").value == pytest.approx(cleanfid.fid_from_feats(real, generated), rel=1e-6)
    # Its subsets are drawn from numpy's global generator: the same estimate, other subsets.
    np.random.seed(0)
    assert _score(sets, "kid").value == pytest.approx(
        cleanfid.kernel_distance(real, generated, num_subsets=100, max_subset_size=250), rel=0.05
    )


@pytest.mark.parametrize("counts", [(30, 20), (300, 250), (30, 250)])
def test_frechet_of_features_equals_that_of_their_gaussians(counts: tuple[int, int]) -> None:
    """With fewer samples than dimensions, more, and one of both."""
    real, generated = _features(counts[0], 0, dimension=40), _features(counts[1], 1, 0.3, dimension=40)
    a, b = gaussian(real, ddof=1), gaussian(generated, ddof=1)
    expected = frechet_distance(a.mu, a.sigma, b.mu, b.sigma)
    assert frechet_of_features(real, generated, ddof=1) == pytest.approx(expected, rel=1e-9)


def test_a_replicate_is_the_distance_of_the_drawn_samples() -> None:
    for size in (30, 300):
        real, generated = _features(size, 0, dimension=40), _features(size - 5, 1, 0.3, dimension=40)
        drawn = draw_replicates(len(real), len(generated), count=3, seed=0)
        found = frechet_replicates(real, gaussian(real, ddof=1), generated, drawn, ddof=1)
        assert drawn.real is not None
        for i in range(3):
            x = real.repeat(drawn.real[:, i].astype(int), axis=0)
            y = generated.repeat(drawn.generated[:, i].astype(int), axis=0)
            assert len(x) == len(real)
            assert found[i] == pytest.approx(frechet_of_features(x, y, ddof=1), rel=1e-8)


@pytest.mark.parametrize("rows", [8, 1024], ids="{} rows at once".format)
def test_replicates_of_kid_leave_out_pairs_of_one_sample(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_fidelity.metric_kid import kernel_poly

    monkeypatch.setattr("mhla_diffusion.evaluation.scores.resampling.ROWS", rows)
    real, generated = _features(25, 0), _features(20, 1, 0.3)
    drawn = draw_replicates(25, 20, count=2, seed=1)
    found = kernel_replicates(real, generated, drawn, kernel_poly, seed=0)
    assert drawn.real is not None
    for r in range(2):
        total = [0.0, 0.0, 0.0]
        pairs = [0.0, 0.0, 0.0]
        sides = ((real, real, drawn.real, drawn.real), (generated, generated, *[drawn.generated] * 2))
        for side, (x, y, a, b) in enumerate((*sides, (real, generated, drawn.real, drawn.generated))):
            for i in range(len(x)):
                for j in range(len(y)):
                    if side == 2 or i != j:
                        weight = a[i, r] * b[j, r]
                        total[side] += weight * float(kernel_poly(x[i : i + 1], y[j : j + 1])[0, 0])
                        pairs[side] += weight
        expected = total[0] / pairs[0] + total[1] / pairs[1] - 2 * total[2] / pairs[2]
        assert found[r] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("metric", ["frechet", "kid", "precision", "coverage"])
def test_intervals_are_as_wide_as_scores_scatter(metric: str, extractor: FeatureExtractor) -> None:
    """The standard deviation over fresh sets is what the interval of one set says, within its own noise."""

    def score(seed: int, replicates: int) -> Score:
        real, generated = _features(200, 2 * seed), _features(200, 2 * seed + 1, shift=0.7)
        sets = SetPair(extractor, _measured(real), _measured(generated), replicates, seed=0)
        return _score(sets, metric)

    scatter = np.std([score(seed, 0).value for seed in range(15 if metric == "kid" else 60)])
    widths = []
    for seed in range(2 if metric == "kid" else 3):
        interval = score(seed, 30 if metric == "kid" else 60).interval
        assert interval is not None
        widths.append((interval[1] - interval[0]) / (2 * 1.96))
    # Balls stay as they are in the bootstrap of precision and coverage, whose true scatter is larger.
    assert 0.45 < np.mean(widths) / scatter < 1.6


def test_extrapolation_removes_the_bias_of_few_samples(extractor: FeatureExtractor) -> None:
    truth = frechet_of_features(_features(40_000, 50), _features(40_000, 51, shift=0.3), ddof=1)
    values, limits = [], []
    for seed in range(8):
        real, generated = _features(300, 2 * seed), _features(300, 2 * seed + 1, shift=0.3)
        sets = SetPair(extractor, _measured(real), _measured(generated), replicates=2, seed=seed)
        score = _score(sets, "frechet")
        assert score.extrapolated is not None
        assert [count for count, _ in score.curve] == sorted({count for count, _ in score.curve})
        assert (score.curve[0][0], score.curve[-1][0]) == (150, 300)
        assert score.curve[-1][1] == pytest.approx(score.value, rel=1e-5)
        values.append(score.value)
        limits.append(score.extrapolated)
    assert abs(np.mean(limits) - truth) < 0.5 * abs(np.mean(values) - truth)
    assert extrapolate([(100, 1.2), (200, 1.1), (400, 1.05)]) == pytest.approx(1.0)


def test_too_few_samples_for_the_dimension_are_not_extrapolated(extractor: FeatureExtractor) -> None:
    sets = SetPair(extractor, _measured(_features(20, 0)), _measured(_features(20, 1)), 2, 0)
    assert _score(sets, "frechet").extrapolated is None


def test_per_class(extractor: FeatureExtractor) -> None:
    real, generated = _features(90, 0), _features(60, 1)
    a, b = ["x", "y", "z"] * 30, ["y", "x", "w"] * 20
    sets = SetPair(extractor, _measured(real, labels=a), _measured(generated, labels=b), 30, 0)
    score = _score(sets, "frechet_per_class")
    assert score.interval is not None
    assert score.interval[0] < score.value < score.interval[1]
    expected = {
        name: frechet_of_features(real[np.array(a) == name], generated[np.array(b) == name], ddof=1)
        for name in ("x", "y")
    }
    assert score.classes == pytest.approx(expected)
    assert score.value == pytest.approx(np.mean(list(expected.values())))


def test_clip_score(extractor: FeatureExtractor) -> None:
    images, texts = _features(10, 0), _features(10, 1)
    clip = dataclasses.replace(extractor, embed_texts=lambda prompts: (texts[[int(p) for p in prompts]], 0))
    generated = _measured(images, prompts=[str(i) for i in range(10)])
    sets = SetPair(clip, _measured(_features(20, 2)), generated, 20, 0)
    cosine = (images * texts).sum(1) / np.linalg.norm(images, axis=1) / np.linalg.norm(texts, axis=1)
    assert _score(sets, "clip_score").value == pytest.approx(100 * np.maximum(cosine, 0).mean(), rel=1e-6)
    without = dataclasses.replace(sets, generated=_measured(images, prompts=[None] * 10))
    with pytest.raises(ValueError, match="needs the prompt of every image, and 10 have none"):
        _score(without, "clip_score")


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ("sharpness", "metric 'sharpness' is unknown; choose auto, or out of frechet, sfid"),
        (
            "fid",
            "fid is the Frechet distance on inception or inception_adm, and the extractor asked for is me",
        ),
        ("fvd", "fvd is of videos: use mhla evaluate video"),
        (["sfid"], "sfid needs the extractor inception_adm"),
        (["clip_score"], "clip_score needs the extractor clip"),
        (["frechet_per_class"], "frechet_per_class needs classes in both sets"),
    ],
)
def test_what_a_score_needs_is_said_before_any_work(
    metrics: str | list[str],
    message: str,
    extractor: FeatureExtractor,
    make_pixels: Callable[..., np.ndarray],
    write_folder: Callable[..., Path],
) -> None:
    def never(batch: torch.Tensor) -> torch.Tensor:
        raise AssertionError

    folder = write_folder("images", make_pixels(8))
    idle = dataclasses.replace(extractor, network=never)
    with pytest.raises(ValueError, match=message):
        evaluate_images(folder, folder, extractor=idle, metrics=metrics)


def test_statistics_give_no_precision(
    extractor: FeatureExtractor,
    make_pixels: Callable[..., np.ndarray],
    write_folder: Callable[..., Path],
    tmp_path: Path,
) -> None:
    folder = write_folder("images", make_pixels(8))
    report = evaluate_images(folder, folder, extractor=extractor)
    assert [score.metric for score in report.scores] == [
        "frechet", "kid", "precision", "recall", "density", "coverage",
    ]  # fmt: skip
    report.real_statistics.save(tmp_path / "real.npz")
    with pytest.raises(ValueError, match="precision needs the real samples, not their statistics"):
        evaluate_images(tmp_path / "real.npz", folder, extractor=extractor, metrics=["precision"])
    (score,) = evaluate_images(tmp_path / "real.npz", folder, extractor=extractor).scores
    assert score.metric == "frechet"
    assert score.interval is not None


def test_neighbours_do_not_depend_on_a_common_offset() -> None:
    real, generated = _features(80, 0), _features(70, 1)
    offset = np.float32(4096)  # 13 of the 24 bits of float32
    moved = [((x.astype(np.float64) * 64).round() / 64).astype(np.float32) for x in (real, generated)]
    here = find_neighbourhoods(*moved)
    far = find_neighbourhoods(*(x + offset for x in moved))
    for name in ("precision", "recall", "density", "coverage", "nearest"):
        np.testing.assert_array_equal(getattr(here, name), getattr(far, name))
    np.testing.assert_allclose(far.distance, here.distance, rtol=1e-6)


@pytest.mark.parametrize("metric", ["frechet", "precision", "recall", "density", "coverage"])
def test_intervals_stay_in_the_range_of_their_metric(metric: str, extractor: FeatureExtractor) -> None:
    for seed, shift in ((0, 0.0), (1, 0.0), (2, 3.0)):
        sets = SetPair(
            extractor, _measured(_features(12, seed)), _measured(_features(12, seed + 9, shift)), 20, 0
        )
        score = _score(sets, metric)
        low, high = METRICS[metric].bounds
        assert score.interval is not None
        assert low <= score.interval[0] <= score.value <= score.interval[1] <= high


@pytest.mark.parametrize("shift", [0.0, 50.0])
def test_shares_of_none_and_all_have_an_interval(shift: float, extractor: FeatureExtractor) -> None:
    """Of 12 samples without a property, the share of all others may well be a fifth."""
    real = _features(12, 0)
    sets = SetPair(extractor, _measured(real), _measured(real + np.float32(shift)), 20, 0)
    for metric in ("precision", "recall", "coverage"):
        score = _score(sets, metric)
        assert score.value == (0.0 if shift else 1.0)
        assert score.interval == pytest.approx((0, 0.2425) if shift else (0.7575, 1), abs=1e-4)


def test_classes_that_were_never_generated_are_flagged(extractor: FeatureExtractor) -> None:
    real, generated = _features(90, 0), _features(60, 1)
    a, b = ["x", "y", "z"] * 30, ["y", "x", "w"] * 20
    sets = SetPair(extractor, _measured(real, labels=a), _measured(generated, labels=b), 3, 0)
    (flag,) = _score(sets, "frechet_per_class").flags
    assert flag.startswith("2 of 4 classes have fewer than two samples in one of the sets")
    assert "z (30 real, 0 generated), w (0 real, 20 generated)" in flag


def test_scores_that_what_was_read_does_not_suffice_for_are_left_out_and_flagged(
    extractor: FeatureExtractor,
    make_pixels: Callable[..., np.ndarray],
    write_folder: Callable[..., Path],
) -> None:
    folder = write_folder("images", make_pixels(6))
    (folder / "0003.png").write_text("no image")
    for metrics in ("auto", ["frechet", "precision"]):
        report = evaluate_images(folder, folder, extractor=extractor, metrics=metrics, max_skipped=0.5)
        names = [score.metric for score in report.scores]
        assert names[0] == "frechet"
        assert "precision" not in names
        wanted = "No precision_mean_colours: it needs 6 readable samples in each set, and there are 5."
        assert all(wanted in score.flags for score in report.scores)
    with pytest.raises(ValueError, match=r"no score can be computed .* there are 5"):
        evaluate_images(folder, folder, extractor=extractor, metrics="precision", max_skipped=0.5)


def test_fid_and_fvd_are_the_frechet_distance_on_the_networks_they_are_defined_with() -> None:
    assert by_published_name("fid", "auto", "image") == (["frechet"], "inception")
    assert by_published_name(["kid", "fid"], "inception_adm", "image") == (
        ["kid", "frechet"],
        "inception_adm",
    )
    assert by_published_name("fvd", "i3d=weights.pt", "video") == (["frechet"], "i3d=weights.pt")
    assert by_published_name("auto", "auto", "image") == ("auto", "auto")


def test_a_sample_on_the_edge_of_a_ball_counts_as_its_authors_have_it() -> None:
    """Within a ball is on its edge for recall (Kynkaanniemi et al.), and not for density (Naeem et al.)."""
    real = np.arange(12, dtype=np.float32)[:, None]
    found = find_neighbourhoods(real, real + 13)
    assert found.recall.sum() == 2
    assert found.density.sum() == pytest.approx(4 / 5)


def test_classes_of_one_sample_have_no_pairs() -> None:
    assert not _has_pairs((["x", "y"], ["x", "y"]))
    assert _has_pairs((["x", "x"], ["x", "y", "x"]))


def test_an_interval_is_196_standard_deviations_of_a_sample_each_way() -> None:
    assert interval(0.0, np.array([-1.0, 1.0])) == pytest.approx((-2.772, 2.772), abs=1e-3)
