"""Laws of balanced k-means."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import kmeans_plusplus

from emoe.clustering import balanced, balanced_kmeans
from emoe.clustering.balanced import canonical_labels
from emoe.clustering.swaps import refine
from emoe.clustering.transport import assign_exact
from emoe.errors import UserError


def blobs(clusters, size, dimensions, *, distance, seed):
    """Planted equal clusters, shuffled, and the cluster of every point."""
    random = np.random.default_rng(seed)
    centers_ED = random.normal(size=(clusters, dimensions)) * distance
    truth_F = random.permutation(np.repeat(np.arange(clusters), size))
    return centers_ED[truth_F] + random.normal(size=(clusters * size, dimensions)), truth_F


def inertia_of(points_FD, labels_F):
    return sum(np.square(points_FD[labels_F == e] - points_FD[labels_F == e].mean(0)).sum() for e in set(labels_F))


@st.composite
def point_sets(draw):
    """Points and E: generic, on a coarse grid (many duplicates), partly all-zero, or huge and tiny."""
    clusters, size, dimensions = draw(st.integers(1, 8)), draw(st.integers(1, 6)), draw(st.integers(1, 5))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    points_FD = random.normal(size=(clusters * size, dimensions))
    kind = draw(st.sampled_from(["generic", "grid", "zeros", "scaled"]))
    if kind == "grid":
        points_FD = np.rint(points_FD)
    if kind == "zeros":
        points_FD[random.random(len(points_FD)) < 0.7] = 0
    if kind == "scaled":
        points_FD *= draw(st.sampled_from([1e-12, 1e12]))
    return points_FD, clusters


@settings(max_examples=100, deadline=None)
@given(point_sets(), st.integers(0, 2**40))
def test_labels_are_a_canonical_partition_into_equal_parts(case, seed):
    points_FD, clusters = case
    found = balanced_kmeans(points_FD, clusters, seed=seed)
    assert found.labels_F.dtype == np.int32
    assert (np.bincount(found.labels_F, minlength=clusters) == len(points_FD) // clusters).all()
    assert (found.labels_F == canonical_labels(found.labels_F)).all()
    assert found.centroids_ED.dtype == np.float32
    for e in range(clusters):
        mean_D = points_FD[found.labels_F == e].mean(axis=0)
        np.testing.assert_allclose(found.centroids_ED[e], mean_D, rtol=1e-5, atol=1e-6 * np.abs(points_FD).max())
    # Points are centred inside: an inertia of zero may differ from zero by the rounding of the points.
    rounding = 1e-25 * len(points_FD) * np.square(points_FD).max()
    assert found.inertia == pytest.approx(inertia_of(points_FD, found.labels_F), rel=1e-9, abs=rounding)


@settings(max_examples=60, deadline=None)
@given(point_sets(), st.integers(0, 1000))
def test_a_permutation_of_points_permutes_the_partition(case, seed):
    """Exactly, for distinct points; equal points may change places, which the rows of each cluster do not show."""
    points_FD, clusters = case
    order_F = np.random.default_rng(seed).permutation(len(points_FD))
    found, permuted = (balanced_kmeans(p, clusters, seed=3) for p in (points_FD, points_FD[order_F]))
    if len(np.unique(points_FD, axis=0)) == len(points_FD):
        assert (permuted.labels_F == canonical_labels(found.labels_F[order_F])).all()

    def rows_of_clusters(points, labels):
        return sorted(sorted(map(tuple, points[labels == e])) for e in range(clusters))

    assert rows_of_clusters(points_FD, found.labels_F) == rows_of_clusters(points_FD[order_F], permuted.labels_F)
    assert permuted.inertia == found.inertia  # to the last bit: the same points in the same inner order


@pytest.mark.parametrize(
    "clusters, size, dimensions",
    [
        (2, 50, 3),  # few large clusters
        (16, 12, 20),
        (40, 3, 30),  # tiny clusters, where Lloyd's iteration alone does not move
    ],
)
@pytest.mark.parametrize("assignment", ["fast", "exact"])
def test_planted_equal_clusters_are_found(clusters, size, dimensions, assignment):
    points_FD, truth_F = blobs(clusters, size, dimensions, distance=8, seed=clusters)
    found = balanced_kmeans(points_FD, clusters, seed=0, assignment=assignment, starts=3)
    assert (found.labels_F == canonical_labels(truth_F)).all()


@pytest.mark.parametrize("seed", range(3))
def test_fast_equals_exact_on_overlapping_clusters(seed):
    """Both solvers are optimal, so the whole descent agrees wherever no two assignments tie."""
    points_FD, _ = blobs(16, 24, 32, distance=0.4, seed=seed)
    fast, exact = (balanced_kmeans(points_FD, 16, seed=seed, assignment=a) for a in ("fast", "exact"))
    assert fast.inertia == exact.inertia
    assert (fast.labels_F == exact.labels_F).all()


def plain_lloyd(points_FD, clusters, seed):
    """Balanced k-means as published: Hungarian assignment and means in turn until nothing moves."""
    centroids_ED, _ = kmeans_plusplus(points_FD, clusters, random_state=seed)
    labels_F = None
    while True:
        new_F = assign_exact(-2 * points_FD @ centroids_ED.T)
        if labels_F is not None and (new_F == labels_F).all():
            return inertia_of(points_FD, labels_F)
        labels_F = new_F
        centroids_ED = np.stack([points_FD[labels_F == e].mean(axis=0) for e in range(clusters)])


@pytest.mark.parametrize("swaps", [True, False])  # without: the leaving bonus alone beats Lloyd's iteration too
def test_converges_below_plain_lloyd_in_small_clusters(swaps, monkeypatch):
    if not swaps:
        monkeypatch.setattr(balanced, "worth_swapping", lambda *shape: False)
    points_FD, _ = blobs(16, 20, 48, distance=0.3, seed=0)
    ours = np.mean([balanced_kmeans(points_FD, 16, seed=s).inertia for s in range(3)])
    assert ours < 0.99 * np.mean([plain_lloyd(points_FD, 16, s) for s in range(3)])  # measured 0.98


def test_clusters_are_tighter_than_those_of_a_random_partition_and_no_swap_helps():
    points_FD, _ = blobs(12, 8, 16, distance=0.5, seed=1)
    found = balanced_kmeans(points_FD, 12, seed=0)
    shuffled_F = np.random.default_rng(0).permutation(found.labels_F)
    assert found.inertia < 0.85 * inertia_of(points_FD, shuffled_F)
    for i in range(len(points_FD)):  # the closing refinement has converged: checked by brute force
        for j in range(i):
            swapped_F = found.labels_F.copy()
            swapped_F[[i, j]] = swapped_F[[j, i]]
            if swapped_F[i] != swapped_F[j] and (i + j) % 7 == 0:
                assert inertia_of(points_FD, swapped_F) > found.inertia - 1e-6


@settings(max_examples=40, deadline=None)
@given(point_sets(), st.integers(0, 1000))
def test_swaps_keep_sizes_and_never_raise_the_inertia(case, seed):
    points_FD, clusters = case
    points_FD = points_FD / max(np.abs(points_FD).max(), 1e-300)
    labels_F = np.random.default_rng(seed).permutation(np.arange(len(points_FD)) % clusters)
    centroids_ED = np.stack([points_FD[labels_F == e].mean(axis=0) for e in range(clusters)])
    refined_F = refine(points_FD, labels_F, centroids_ED)
    assert (np.bincount(refined_F) == np.bincount(labels_F)).all()
    assert inertia_of(points_FD, refined_F) <= inertia_of(points_FD, labels_F) + 1e-12


def test_same_seed_same_bits_and_another_seed_another_partition():
    points_FD = np.random.default_rng(0).normal(size=(240, 16)).astype(np.float32)
    first, again, other = (balanced_kmeans(points_FD, 12, seed=s) for s in (5, 5, 6))
    assert (first.labels_F == again.labels_F).all() and first.inertia == again.inertia
    assert (first.centroids_ED == again.centroids_ED).all()
    assert (first.labels_F != other.labels_F).any()


def test_labels_do_not_depend_on_the_number_of_threads():
    program = (
        "import numpy as np; from emoe.clustering import balanced_kmeans;"
        "p = np.random.default_rng(0).normal(size=(512, 96)).astype(np.float32);"
        "r = balanced_kmeans(p, 16, seed=0);"
        "print(r.labels_F.tobytes().hex(), r.centroids_ED.tobytes().hex(), r.inertia)"
    )
    outputs = set()
    for threads in ("1", "4"):
        variables = {"OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads, "PYTHONPATH": ":".join(sys.path)}
        outputs.add(
            subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, check=True).stdout
        )
    assert len(outputs) == 1


def test_more_starts_never_hurt():
    points_FD, _ = blobs(8, 6, 4, distance=1, seed=0)
    inertias = [balanced_kmeans(points_FD, 8, seed=0, starts=n).inertia for n in (1, 2, 5)]
    assert inertias == sorted(inertias, reverse=True)


def test_one_cluster_holds_all_and_as_many_clusters_as_points_hold_one_each():
    points_FD = np.random.default_rng(0).normal(size=(9, 2))
    one, each = (balanced_kmeans(points_FD, clusters, seed=0) for clusters in (1, 9))
    assert one.labels_F.tolist() == [0] * 9 and one.inertia == pytest.approx(inertia_of(points_FD, one.labels_F))
    assert each.labels_F.tolist() == list(range(9)) and each.inertia == 0
    np.testing.assert_allclose(each.centroids_ED, points_FD, rtol=1e-6)


def test_all_points_equal_give_blocks_without_a_warning(recwarn):
    found = balanced_kmeans(np.full((12, 3), 0.1), 4, seed=0)
    assert found.labels_F.tolist() == np.repeat(range(4), 3).tolist()
    assert len(recwarn) == 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_clusters": 50}, "points=1536 is not divisible by num_clusters=50; try 48 or 64"),
        ({"num_clusters": 0}, "try 1$"),
        ({"num_clusters": 1537}, "try 1536$"),
        ({"assignment": "fsat"}, "did you mean 'fast'"),
        ({"max_iterations": 0}, "max_iterations=0 must be at least 1"),
        ({"starts": 0}, "starts=0"),
        ({"seed": -1}, "seed=-1"),
        ({"tolerance": float("nan")}, "tolerance=nan"),
    ],
)
def test_bad_arguments_are_named_with_the_fix(change, message):
    arguments = {"num_clusters": 64, "seed": 0} | change
    with pytest.raises(UserError, match=message):
        balanced_kmeans(np.zeros((1536, 2)), **arguments)


def test_malformed_points_are_refused():
    with pytest.raises(UserError, match=r"not of shape \(6,\)"):
        balanced_kmeans(np.zeros(6), 2, seed=0)
    points_FD = np.zeros((6, 2))
    points_FD[4, 1] = np.nan
    with pytest.raises(UserError, match="1 of 6 points hold NaN or infinity, the first in row 4"):
        balanced_kmeans(points_FD, 2, seed=0)
