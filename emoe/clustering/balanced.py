"""Balanced k-means: F points into E clusters of exactly S = F / E points.

F points, D dimensions, E clusters, S points per cluster.

Lloyd's iteration with an optimal balanced assignment (transport.py), a correction that lets points leave small
clusters (`_descend`), and a closing round of swaps (swaps.py). The points are handled in an order that depends
on their values only and on one BLAS thread, so the partition depends neither on the order of the points nor on the
number of cores.

Measured on a shared 2-core AMD EPYC, means of 3 seeds, `fast` (`exact`, up to its limit, reaches the same figures):

    points                                          E     plain Lloyd   ours      lower by   CPU seconds
    1,536 x 256, overlapping clusters               64    1222.7        1205.1    1.4%       0.3
    1,536 x 256, nearly no structure                64    1419.8        1382.7    2.6%       0.55
    1,536 x 384, all-MiniLM-L6-v2, layer 4, keys    64    1355.8        1317.5    2.8%       0.6 (wall)
    1,536 x 384, all-MiniLM-L6-v2, layer 4, keys    256   1091.6        1060.5    2.8%       1.0 (wall)
    11,008 x 256, overlapping clusters              64    10059.9       10050.9   0.1%       1.9
    11,008 x 256, overlapping clusters              256   10237.8       9994.1    2.4%       6.2 (wall)

Those were float64 points. 11,008 x 4,096 float32 rows that come in families, 64 clusters, 10 iterations, seed 0:
inertia 9724.1 in 3.9 s, against 9729.2 in 13.5 s of k-means-constrained 0.9.1 (`scripts/bench_clustering.py`).

Plain Lloyd is the same program without the correction and the swaps, with the same 20 iterations and tolerance (only
at 11,008 points does that cut it short: after 60 iterations its first of these rows is 10051.4, and the rest is speed).
Unconstrained Lloyd iterations between k-means++ and the balanced ones do not help (first row: 1205.2 without, 1205.4
after 3, 1206.1 after 10).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from emoe.clustering.spec import equal_size
from emoe.clustering.swaps import refine, worth_swapping
from emoe.clustering.transport import assign_exact, assign_fast, check_assignment
from emoe.errors import UserError

_WIDE, _SEEDING_WIDTH = 1024, 128
"""k-means++ looks at wider points than the first through a random projection to the second: it only draws points, by
distances. 11,008 x 4,096: 0.2 instead of 6.8 s; inertia 9724.1 instead of 9719.1."""

ROUGH_ITERATIONS = 5
"""Of a start for refinement: what refinement makes of it was no worse than from a finished one (docs/log.md)."""

_BONUS_FACTOR = 0.25
"""How fast the leaving bonus shrinks after a step that did not pay."""
_FIRST_COLUMNS = 16
"""Enough to tell most rows apart; sorting by all of 4,096 columns takes 0.3 s."""

_LEAST_BONUS = 0.05
"""Below this share of the bonus one last step is plain Lloyd, and then we stop."""


@dataclass(frozen=True)
class Clustering:
    """An equal-size partition. Clusters are numbered by the smallest index they contain."""

    labels_F: np.ndarray
    """Cluster of every point, int32."""
    centroids_ED: np.ndarray
    """Mean of every cluster, float32."""
    inertia: float
    """Sum of the squared distances of the points to their centroids, in squared units of the points."""
    iterations: int
    """Balanced assignments that were made, in the start that won."""


def balanced_kmeans(
    points_FD: np.ndarray,
    num_clusters: int,
    *,
    seed: int,
    assignment: str = "fast",
    max_iterations: int = 20,
    tolerance: float = 1e-4,
    starts: int = 1,
    rough: bool = False,
) -> Clustering:
    """Cut F points into ``num_clusters`` clusters of equal size with a small sum of squared distances.

    ``points_FD`` are used as they are: normalise before where only directions matter; float32 stays float32, all else
    becomes float64. ``assignment`` is the solver of
    each step, `fast` or `exact`; both are optimal, `exact` is scipy's and takes up to 4,096 points. An iteration that
    lowers the inertia by less than ``tolerance`` of itself does not count as progress. ``starts`` repeats all with
    further k-means++ starts and keeps the best; more starts never raise the inertia. `rough` means at most
    `ROUGH_ITERATIONS` and no swaps.

    The same points and seed give the same bits. Permuting the points permutes the partition, up to exchanges among
    equal points. Memory beside the points: one copy of them, and 8 bytes for each of 4 F E numbers.

    Start: k-means++ (Arthur and Vassilvitskii, SODA 2007), scikit-learn's greedy variant. Balanced Lloyd: Malinen and
    Fränti, "Balanced K-Means for Clustering" (S+SSPR 2014), with a faster solver and with the two additions above.
    Raises `UserError` when E does not divide F and for malformed arguments.
    """
    points_FD = _checked_points(points_FD)
    num_points = len(points_FD)
    size = equal_size(num_points, num_clusters, total_name="points", parts_name="num_clusters")
    check_assignment(assignment, num_points)
    for name, value, least in (("max_iterations", max_iterations, 1), ("starts", starts, 1), ("seed", seed, 0)):
        if value < least:
            raise UserError(f"{name}={value} must be at least {least}")
    if not tolerance >= 0:
        raise UserError(f"tolerance={tolerance} must be at least 0")

    if rough:
        max_iterations = min(max_iterations, ROUGH_ITERATIONS)
    order_F = _order_by_value(points_FD)
    sorted_FD = points_FD[order_F]
    center_D = sorted_FD.mean(axis=0)
    sorted_FD -= center_D
    if size == 1 or num_clusters == 1:
        sorted_labels_F, iterations = np.arange(num_points) // size, 0
    else:
        from threadpoolctl import threadpool_limits

        best = np.inf
        # BLAS splits its sums by the number of threads. One thread costs little: the matrices are small.
        with threadpool_limits(limits=1):
            for start in range(starts):
                # The first start is that of ``starts=1``, so that asking for more can only help.
                random = np.random.RandomState(np.random.SeedSequence([seed, start]).generate_state(4))
                found_F, count = _descend(
                    sorted_FD, num_clusters, random, assignment, max_iterations, tolerance, swaps=not rough
                )
                inertia = _inertia(sorted_FD, found_F, _centroids(sorted_FD, found_F, num_clusters))
                if inertia < best:
                    best, sorted_labels_F, iterations = inertia, found_F, count
    centroids_ED = _centroids(sorted_FD, sorted_labels_F, num_clusters)
    inertia = _inertia(sorted_FD, sorted_labels_F, centroids_ED)
    labels_F = np.empty(num_points, dtype=np.int64)
    labels_F[order_F] = sorted_labels_F
    first_E = np.unique(labels_F, return_index=True)[1]
    centroids_ED = (centroids_ED + center_D)[np.argsort(first_E)]
    return Clustering(canonical_labels(labels_F), centroids_ED.astype(np.float32), inertia, iterations)


def canonical_labels(labels_F: np.ndarray) -> np.ndarray:
    """The same partition with clusters numbered by the smallest index they contain, int32 ``(F,)``."""
    _, first_E, inverse_F = np.unique(labels_F, return_index=True, return_inverse=True)
    rank_E = np.empty(len(first_E), dtype=np.int32)
    rank_E[np.argsort(first_E)] = np.arange(len(first_E), dtype=np.int32)
    return rank_E[inverse_F]


def _descend(points_FD, num_clusters, random, assignment, max_iterations, tolerance, swaps) -> tuple[np.ndarray, int]:
    """Best labels from one k-means++ start, and the number of assignments made. Points are centred."""
    from sklearn.cluster import kmeans_plusplus

    shown_FP = points_FD
    if points_FD.shape[1] > _WIDE:
        gaussian_DP = random.standard_normal((points_FD.shape[1], _SEEDING_WIDTH)).astype(points_FD.dtype)
        shown_FP = points_FD @ gaussian_DP
    _, chosen_E = kmeans_plusplus(shown_FP, num_clusters, random_state=random)
    centroids_ED = points_FD[chosen_E]
    labels_F, iterations = _lloyd(points_FD, centroids_ED, assignment, max_iterations, tolerance)
    if swaps and worth_swapping(*points_FD.shape):
        exact_FD = points_FD.astype(np.float64)
        labels_F = refine(exact_FD, labels_F, _centroids(exact_FD, labels_F, num_clusters))
    return labels_F, iterations


def _lloyd(points_FD, centroids_ED, assignment, max_iterations, tolerance) -> tuple[np.ndarray, int]:
    """Balanced Lloyd iterations from these centroids: best labels, and the number of assignments made."""
    num_points, num_clusters = len(points_FD), len(centroids_ED)
    size = num_points // num_clusters
    row_F = np.arange(num_points)
    square_F = np.einsum("fd,fd->f", points_FD, points_FD).astype(np.float64)
    scatter = square_F.sum()
    labels_F, prices_E, inertia, bonus, iteration = None, None, np.inf, 1.0, 0
    while iteration < max_iterations:
        iteration += 1
        cost_FE = np.square(centroids_ED).sum(axis=1) - 2 * (points_FD @ centroids_ED.T).astype(np.float64)
        if labels_F is not None:
            # A point that leaves lowers the inertia by more than Lloyd's step believes, for the centroid it leaves
            # behind and the one it joins move in its favour: by 2 |x|**2 / S when few leave (swaps.py). When too many
            # leave at once the gain may not come; then we go back and promise less.
            cost_FE[row_F, labels_F] += bonus * 2 * square_F / size
        if assignment == "exact":
            new_labels_F = assign_exact(cost_FE)
        else:
            new_labels_F, prices_E = assign_fast(cost_FE, prices_E)
        new_centroids_ED = _centroids(points_FD, new_labels_F, num_clusters)
        new_inertia = scatter - size * np.square(new_centroids_ED, dtype=np.float64).sum()
        progress = new_inertia < inertia * (1 - tolerance)
        if new_inertia < inertia:
            labels_F, centroids_ED, inertia = new_labels_F, new_centroids_ED, new_inertia
        if not progress:
            if bonus == 0:
                break
            bonus = bonus * _BONUS_FACTOR if bonus > _LEAST_BONUS else 0.0
    return new_labels_F if labels_F is None else labels_F, iteration  # None: squares so large that all is infinite


def _checked_points(points_FD: np.ndarray) -> np.ndarray:
    """Points as float32 or float64, with a `UserError` for anything but a finite, non-empty 2-d array."""
    points_FD = np.asarray(points_FD)
    points_FD = np.asarray(points_FD, dtype=np.float32 if points_FD.dtype == np.float32 else np.float64)
    if points_FD.ndim != 2 or 0 in points_FD.shape:
        raise UserError(f"points must be a non-empty 2-d array (points, dimensions), not of shape {points_FD.shape}")
    if not np.isfinite(points_FD).all():
        bad = np.flatnonzero(~np.isfinite(points_FD).all(axis=1))
        raise UserError(f"{len(bad)} of {len(points_FD)} points hold NaN or infinity, the first in row {bad[0]}")
    return points_FD


def _order_by_value(points_FD: np.ndarray) -> np.ndarray:
    """Indices that sort the rows by their bytes, equal rows by index: an order that a permutation does not change."""
    for width in (_FIRST_COLUMNS, points_FD.shape[1]):
        # -0.0 becomes 0.0: equal, but not in its bytes
        rows_FW = np.ascontiguousarray(points_FD[:, :width] + points_FD.dtype.type(0))
        keys_F = rows_FW.view(f"V{rows_FW.shape[1] * rows_FW.itemsize}").ravel()
        order_F = np.argsort(keys_F, kind="stable")
        if (keys_F[order_F[1:]] != keys_F[order_F[:-1]]).all():
            break  # the first columns tell all rows apart
    return order_F


def _centroids(points_FD: np.ndarray, labels_F: np.ndarray, num_clusters: int) -> np.ndarray:
    """Mean of every cluster, ``(E, D)``: a sparse product, which gathers no copy of the points."""
    from scipy.sparse import csr_array

    num_points = len(points_FD)
    size = num_points // num_clusters
    ones_F = np.ones(num_points, dtype=points_FD.dtype)
    members = (ones_F, np.argsort(labels_F, kind="stable"), np.arange(0, num_points + 1, size))
    return (csr_array(members, shape=(num_clusters, num_points)) @ points_FD) / points_FD.dtype.type(size)


def _inertia(points_FD: np.ndarray, labels_F: np.ndarray, centroids_ED: np.ndarray) -> float:
    """Sum of squared distances to the own centroid."""
    members_ES = np.argsort(labels_F, kind="stable").reshape(len(centroids_ED), -1)
    squares = (
        np.square(points_FD[m] - c, dtype=np.float64).sum() for m, c in zip(members_ES, centroids_ED, strict=True)
    )
    return float(sum(squares))
