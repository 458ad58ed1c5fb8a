"""Which samples lie where the other set is: nearest neighbours in the space of features.

One pass over the distances gives precision, recall, density, coverage, realism and the nearest real sample.
torch-fidelity has the first two alone, and would compute every distance again for each of the others; a test
holds them to be equal.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NEIGHBOURS = 3
"""k of precision and recall, as in Kynkaanniemi et al. 2019 and ADM."""
NEIGHBOURS_DENSITY = 5
"""k of density and coverage, as in Naeem et al. 2020."""

MIN_SAMPLES = NEIGHBOURS_DENSITY + 1
"""Of a set in which each has so many others."""

ROWS = 512


@dataclass(frozen=True)
class Neighbourhoods:
    """Values of every sample; the mean over samples is the score.

    Args:
        precision: whether a generated sample lies in the ball of a real one, ``[M]``.
        recall: whether a real sample lies in the ball of a generated one, ``[N]``.
        density: real balls that a generated sample lies in, divided by k, ``[M]``.
        coverage: whether a generated sample lies in the ball of a real one, ``[N]``.
        realism: the largest ratio of a real sample's radius to its distance, over the real samples with at
            most the median radius, ``[M]``; at least 1 is on the manifold (Kynkaanniemi et al. 2019, eq. 3).
        nearest: index of the nearest real sample, ``[M]``.
        distance: to it, ``[M]``.
    """

    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    density: NDArray[np.float64]
    coverage: NDArray[np.float64]
    realism: NDArray[np.float64]
    nearest: NDArray[np.int64]
    distance: NDArray[np.float64]


def find_neighbourhoods(real: NDArray[np.float32], generated: NDArray[np.float32]) -> Neighbourhoods:
    """Compare two sets of features ``[N, d]`` and ``[M, d]`` in memory O(N + M) beyond two copies of them.

    A ball reaches to the k-th nearest other sample of its own set, ``<=`` for precision and recall and ``<``
    for density and coverage, as their authors have it. Distances are of centred features in float64: in
    float32 a common offset of all features hides them.

    Raises:
        ValueError: when a set has fewer than ``MIN_SAMPLES``.
    """
    if min(len(real), len(generated)) < MIN_SAMPLES:
        raise ValueError(
            f"precision, recall, density and coverage need {MIN_SAMPLES} readable samples in each set, got "
            f"{len(real)} real and {len(generated)} generated: leave these metrics out"
        )
    centre = np.asarray(real).mean(axis=0, dtype=np.float64)
    a, b = torch.from_numpy(real - centre), torch.from_numpy(generated - centre)
    radii, wide_radii = _radii(a)
    generated_radii = _radii(b)[0]
    dense = radii <= radii.median()
    precision, density, realism, nearest = [], [], [], []  # of each chunk
    recall = torch.zeros(len(a), dtype=torch.bool)
    closest = torch.full((len(a),), torch.inf, dtype=a.dtype)
    for rows, reach in zip(b.split(ROWS), generated_radii.split(ROWS), strict=True):
        distance = torch.cdist(rows, a)  # [ROWS, N]
        precision.append((distance <= radii).any(dim=1))
        density.append((distance < wide_radii).sum(dim=1) / NEIGHBOURS_DENSITY)
        realism.append((radii[dense] / distance[:, dense].clamp_min(1e-12)).amax(dim=1))
        nearest.append(distance.min(dim=1))
        recall |= (distance <= reach[:, None]).any(dim=0)
        closest = torch.minimum(closest, distance.amin(dim=0))
    return Neighbourhoods(
        precision=torch.cat(precision).double().numpy(),
        recall=recall.double().numpy(),
        density=torch.cat(density).double().numpy(),
        coverage=(closest < wide_radii).double().numpy(),
        realism=torch.cat(realism).double().numpy(),
        nearest=torch.cat([found.indices for found in nearest]).numpy(),
        distance=torch.cat([found.values for found in nearest]).double().numpy(),
    )


def _radii(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return distances ``[N]`` to the third and to the fifth nearest other sample."""
    found = []
    for rows in features.split(ROWS):
        distance = torch.cdist(rows, features)
        # The nearest of all is the sample itself.
        found.append(distance.topk(NEIGHBOURS_DENSITY + 1, largest=False).values)
    nearest = torch.cat(found)
    return nearest[:, NEIGHBOURS], nearest[:, NEIGHBOURS_DENSITY]
