"""The distance against closed forms and scipy's matrix root, and the one-pass statistics."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
import scipy.linalg
import torch
from scipy.stats import ortho_group

from mhla_diffusion.evaluation import FeatureStatistics, RunningStatistics, frechet_distance

RNG = np.random.default_rng


def _features(count: int, dimension: int, seed: int) -> np.ndarray:
    """Correlated features with a spectrum that falls off, as those of networks do."""
    spectrum = np.exp(-np.arange(dimension) / (dimension / 6))
    rotation = ortho_group.rvs(dimension, random_state=seed)
    return RNG(seed).standard_normal((count, dimension)) * spectrum @ rotation + 3


def _gaussian(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return features.mean(axis=0), np.cov(features, rowvar=False)


def _by_matrix_root(mu1, sigma1, mu2, sigma2) -> float:
    root = scipy.linalg.sqrtm(sigma1 @ sigma2)
    return float(np.square(mu1 - mu2).sum() + np.trace(sigma1 + sigma2 - 2 * root.real))


def test_frechet_distance_of_one_dimensional_gaussians() -> None:
    # (mu1 - mu2)^2 + (s1 - s2)^2
    assert frechet_distance([1.0], [[4.0]], [4.0], [[25.0]]) == pytest.approx(9 + 9, rel=1e-14)


def test_frechet_distance_of_commuting_covariances() -> None:
    rotation = ortho_group.rvs(40, random_state=0)
    a, b = RNG(1).uniform(0, 5, 40), RNG(2).uniform(0, 5, 40)
    mu = np.zeros(40)
    distance = frechet_distance(mu, rotation * a @ rotation.T, mu, rotation * b @ rotation.T)
    assert distance == pytest.approx(np.square(np.sqrt(a) - np.sqrt(b)).sum(), rel=1e-10)


def test_frechet_distance_of_rank_one_covariances() -> None:
    # S1 = u u^T and S2 = v v^T: tr S1 + tr S2 - 2 |u.v|
    u, v = RNG(0).standard_normal((2, 50))
    mu = np.zeros(50)
    expected = u @ u + v @ v - 2 * abs(u @ v)
    assert frechet_distance(mu, np.outer(u, u), mu, np.outer(v, v)) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_from_a_point_mass() -> None:
    sigma = np.diag([1.0, 2.0, 3.0])
    assert frechet_distance(np.zeros(3), np.zeros((3, 3)), np.ones(3), sigma) == pytest.approx(9, rel=1e-14)


@pytest.mark.parametrize("seed", [0, 1])
def test_frechet_distance_equals_the_matrix_root(seed: int) -> None:
    a, b = _gaussian(_features(300, 64, seed)), _gaussian(_features(200, 64, seed + 10) * 1.3)
    assert frechet_distance(*a, *b) == pytest.approx(_by_matrix_root(*a, *b), rel=1e-8)


@pytest.mark.parametrize("decades", [0, 3, 6])
def test_frechet_distance_of_graded_spectra_to_a_millionth(decades: int) -> None:
    """Against singular values in extended precision, with sets so close that digits cancel."""
    d = 24
    rotation = ortho_group.rvs(d, random_state=0)
    spectrum = 10.0 ** np.linspace(0, -decades, d)
    a = RNG(0).standard_normal((400, d)) * spectrum @ rotation
    b = a * 1.01 + RNG(1).standard_normal((400, d)) * spectrum @ rotation * 0.05
    (mu1, sigma1), (mu2, sigma2) = _gaussian(a), _gaussian(b)
    with mpmath.workdps(50):
        exact = mpmath.matrix(sigma1.tolist()) * mpmath.matrix(sigma2.tolist())
        roots = sum(mpmath.sqrt(mpmath.re(value)) for value in mpmath.eig(exact, left=False, right=False))
        rest = np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2)
        expected = float(mpmath.mpf(float(rest)) - 2 * roots)
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_with_fewer_images_than_dimensions() -> None:
    # In the space that both sets span the covariances are regular, and the matrix root is exact there.
    basis = ortho_group.rvs(96, random_state=3)[:, :12]
    a, b = _features(40, 12, 1), _features(30, 12, 2)
    expected = _by_matrix_root(*_gaussian(a), *_gaussian(b))
    actual = frechet_distance(*_gaussian(a @ basis.T), *_gaussian(b @ basis.T))
    assert actual == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("count", [500, 20], ids=["full_rank", "rank_deficient"])
def test_frechet_distance_is_zero_for_equal_statistics_and_never_negative(count: int) -> None:
    mu, sigma = _gaussian(_features(count, 64, 0))
    assert frechet_distance(mu, sigma, mu.copy(), sigma.copy()) == 0.0
    assert 0 <= frechet_distance(mu, sigma, mu, sigma * (1 + 1e-15)) < 1e-12


def test_frechet_distance_is_symmetric() -> None:
    a, b = _gaussian(_features(300, 64, 0)), _gaussian(_features(30, 64, 1))
    assert frechet_distance(*a, *b) == pytest.approx(frechet_distance(*b, *a), rel=1e-12)


@pytest.mark.parametrize(
    ("sigma", "message"),
    [
        (np.eye(3), r"shape \(2,\) and sigma \(3, 3\)"),
        (np.array([[1.0, np.nan], [np.nan, 1.0]]), "NaN"),
        (np.array([[1.0, 0.5], [0.0, 1.0]]), "not symmetric"),
    ],
)
def test_frechet_distance_refuses_what_is_no_covariance(sigma: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frechet_distance(np.zeros(2), sigma, np.zeros(2), np.eye(2))
    with pytest.raises(ValueError, match=message):
        frechet_distance(np.zeros(2), np.eye(2), np.zeros(2), sigma)


def test_a_spatial_covariance_is_checked_too(tmp_path: Path) -> None:
    wrong = _not_semidefinite(8)
    spatial = {"mu_s": np.zeros(8), "sigma_s": (wrong + wrong.T) / 2}
    np.savez(tmp_path / "s.npz", mu=np.zeros(8), sigma=np.eye(8), **spatial)
    with pytest.raises(ValueError, match="not positive semi-definite"):
        FeatureStatistics.load(tmp_path / "s.npz")


def test_frechet_distance_refuses_different_dimensions() -> None:
    with pytest.raises(ValueError, match="2 and 3 dimensions"):
        frechet_distance(np.zeros(2), np.eye(2), np.zeros(3), np.eye(3))


def test_running_statistics_equal_those_of_all_features_at_once() -> None:
    features = _features(103, 8, 0) + 1e6  # a mean at which sums of squares would lose ten digits
    running = RunningStatistics(8)
    for batch in np.array_split(features, [1, 2, 40, 40, 99]):  # single and empty batches among them
        running.update(batch)
    assert running.count == 103
    np.testing.assert_allclose(running.mean, features.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(running.covariance, np.cov(features, rowvar=False), rtol=0, atol=1e-9)


def test_running_statistics_refuse_nan_and_wrong_shapes() -> None:
    running = RunningStatistics(2)
    with pytest.raises(ValueError, match="NaN"):
        running.update([[0.0, np.nan]])
    with pytest.raises(ValueError, match=r"\(1, 3\)"):
        running.update([[0.0, 1.0, 2.0]])
    running.update([[0.0, 1.0]])
    with pytest.raises(ValueError, match="at least 2"):
        _ = running.covariance


def test_statistics_survive_a_file(tmp_path: Path) -> None:
    mu, sigma = _gaussian(_features(50, 6, 0))
    saved = FeatureStatistics(mu, sigma, 50, extractor="e", weights_sha256="ab", fingerprint="cd")
    saved.save(tmp_path / "stats.npz")
    loaded = FeatureStatistics.load(tmp_path / "stats.npz")
    assert frechet_distance(loaded.mu, loaded.sigma, mu, sigma) == 0.0
    assert (loaded.count, loaded.extractor) == (50, "e")
    assert (loaded.weights_sha256, loaded.fingerprint) == ("ab", "cd")
    assert [path.name for path in tmp_path.iterdir()] == ["stats.npz"]


def test_statistics_are_not_overwritten_unasked(tmp_path: Path) -> None:
    statistics = FeatureStatistics(np.zeros(2), np.eye(2))
    statistics.save(tmp_path / "stats.npz")
    with pytest.raises(ValueError, match=r"stats\.npz already"):
        statistics.save(tmp_path / "stats.npz")
    statistics.save(tmp_path / "stats.npz", overwrite=True)
    with pytest.raises(ValueError, match=r"\.npz"):
        statistics.save(tmp_path / "stats.npy")


def test_a_damaged_statistics_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "stats.npz"
    FeatureStatistics(np.zeros(2), np.eye(2)).save(path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"stats\.npz cannot be used"):
        FeatureStatistics.load(path)


def _not_semidefinite(dimension: int) -> np.ndarray:
    values = np.linspace(1, 2, dimension)
    values[0] = -0.5
    rotation = ortho_group.rvs(dimension, random_state=1)
    return rotation * values @ rotation.T + 0.0


@pytest.mark.parametrize(
    ("sigma", "message"),
    [
        (-np.eye(8), "negative variance"),
        (_not_semidefinite(8), "not positive semi-definite"),
        (1e30 * np.eye(8), r"sigma has values up to 1e\+30"),
        (np.ones((8, 8)) + np.diag([-1.0] * 8), "not positive semi-definite"),
    ],
)
def test_a_matrix_that_no_features_have_is_refused_and_not_scored_as_zero(
    sigma: np.ndarray, message: str, tmp_path: Path
) -> None:
    sigma = (sigma + sigma.T) / 2
    for other in (np.eye(8), np.zeros((8, 8)), sigma + 1e-3 * np.eye(8)):
        with pytest.raises(ValueError, match=message):
            frechet_distance(np.zeros(8), sigma, np.zeros(8), other)
    np.savez(tmp_path / "stats.npz", mu=np.zeros(8), sigma=sigma)
    with pytest.raises(ValueError, match=message):
        FeatureStatistics.load(tmp_path / "stats.npz")


def test_statistics_in_single_precision_are_taken() -> None:
    """As some packages store them: rounding leaves eigenvalues a little below 0."""
    mu, sigma = _gaussian(_features(30, 64, 0))
    other = _gaussian(_features(200, 64, 1))
    exact = frechet_distance(mu, sigma, *other)
    assert frechet_distance(mu, sigma.astype(np.float32), *other) == pytest.approx(exact, rel=1e-3)


def test_features_that_are_absurdly_large_are_refused() -> None:
    with pytest.raises(ValueError, match="values beyond 3e7"):
        RunningStatistics(2).update([[0.0, 1e20]])


def test_statistics_of_torch_fidelity_are_read(tmp_path: Path) -> None:
    from torch_fidelity.metric_fid import fid_features_to_statistics

    features = torch.from_numpy(_features(50, 6, 0))
    torch.save(fid_features_to_statistics(features), tmp_path / "set-inception-stat-fid-2048.pt")
    loaded = FeatureStatistics.load(tmp_path / "set-inception-stat-fid-2048.pt")
    np.testing.assert_allclose(loaded.sigma, np.cov(features.numpy(), rowvar=False))


class _Planted:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_pickles_are_not_opened_and_their_conversion_is_told(tmp_path: Path) -> None:
    planted = _Planted(tmp_path / "code-has-run")
    (tmp_path / "edm2.pkl").write_bytes(pickle.dumps({"fid": {"mu": planted}}))
    torch.save({"mu": planted, "sigma": planted}, tmp_path / "stats.pt")
    np.savez(tmp_path / "stats.npz", mu=np.array([planted]), sigma=np.eye(1))
    for name, message in (
        ("edm2.pkl", "numpy.savez"),
        ("stats.pt", "mu and sigma"),
        ("stats.npz", "objects"),
    ):
        with pytest.raises(ValueError, match=message):
            FeatureStatistics.load(tmp_path / name)
    assert not planted.path.exists()


@pytest.mark.parametrize("compress", [np.savez, np.savez_compressed])
def test_one_flipped_byte_in_statistics_is_found(compress: Callable[..., None], tmp_path: Path) -> None:
    mu, sigma = _gaussian(_features(50, 6, 0))
    compress(tmp_path / "stats.npz", mu=mu, sigma=sigma)
    content = bytearray((tmp_path / "stats.npz").read_bytes())
    content[len(content) // 2] ^= 16
    (tmp_path / "flipped.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"flipped\.npz cannot be used"):
        FeatureStatistics.load(tmp_path / "flipped.npz")


def test_a_web_page_in_the_place_of_statistics_is_told(tmp_path: Path) -> None:
    (tmp_path / "stats.npz").write_text("<!DOCTYPE html><html>404</html>")
    with pytest.raises(ValueError, match="it is a web page"):
        FeatureStatistics.load(tmp_path / "stats.npz")
