"""Balanced assignment: F points to E clusters of exactly S = F / E points each, at the least total cost.

F points, E clusters, S points per cluster. The problem is a transportation problem with E sinks. Both solvers below
find its optimum; they differ in cost, and check each other in the tests.

Measured on a shared 2-core AMD EPYC: seconds for one assignment of unit vectors to k-means++ centroids. `warm` starts
from the prices of the last solution, as every step of k-means but the first does.

    F       E       exact   fast    warm
    1,536   64      0.16    0.033   0.016
    1,536   256     0.05    0.072   0.045
    1,536   768     0.06    0.22    0.22      (pairs: the graph of clusters is as large as the problem)
    4,096   64      1.45    0.044   0.020
    11,008  64      -       0.12    0.022
    11,008  256     -       0.22    0.13
"""

from __future__ import annotations

import numpy as np

from emoe.errors import UserError, nearest

ASSIGNMENTS = ("fast", "exact")

EXACT_LIMIT = 4096
"""Most points that `exact` takes: its F x F matrix of float64 fills 128 MiB there and its time grows as F**3."""

_GRID = 2.0**32
"""Costs are whole multiples of (range / 2**32): finer than float32, coarser by 2**20 than float64 rounding errors, so
that another BLAS or thread count gives the same integers, and sums over paths of up to 2**20 clusters stay exact."""

_LEAST_MOVED = 1 / 3000
_ROUNDS_WATCHED = 8
"""Raising prices moves many points at once but crawls towards the end; shortest paths move few but always arrive.
A round of prices costs about as much as half a path at 1,536 points and four paths at 11,008 (64 clusters), so we
change over when the last eight rounds have taken fewer than this share of the points each out of excess."""


def on_grid(cost_FE: np.ndarray) -> tuple[np.ndarray, float]:
    """Costs shifted to start at 0 and scaled and rounded to 0 .. 2**32 (float64, whose integer sums are exact).

    Returns them and the scale, grid steps per unit of cost.
    """
    lowest, highest = cost_FE.min(), cost_FE.max()
    scale = _GRID / (highest - lowest) if highest > lowest else 1.0
    return np.rint((cost_FE - lowest) * scale), float(scale)


def check_assignment(assignment: str, num_points: int) -> None:
    """Raise `UserError` for an unknown solver, or for `exact` on more than `EXACT_LIMIT` points."""
    if assignment not in ASSIGNMENTS:
        known = ", ".join(ASSIGNMENTS)
        raise UserError(f"assignment={assignment!r} is unknown (known: {known}){nearest(assignment, ASSIGNMENTS)}")
    if assignment == "exact" and num_points > EXACT_LIMIT:
        raise UserError(
            f"assignment='exact' takes at most {EXACT_LIMIT} points, not {num_points}; use 'fast', which is optimal too"
        )


def assign_exact(cost_FE: np.ndarray) -> np.ndarray:
    """Optimal labels, int64 ``(F,)``, by scipy's Hungarian solver on the F x F matrix of points and cluster slots."""
    from scipy.optimize import linear_sum_assignment

    size = cost_FE.shape[0] // cost_FE.shape[1]
    grid_FE, _ = on_grid(cost_FE)
    _, slot_F = linear_sum_assignment(np.repeat(grid_FE, size, axis=1))
    return slot_F // size


def assign_fast(cost_FE: np.ndarray, prices_E: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Optimal labels, int64 ``(F,)``, and the prices ``(E,)`` that prove them so.

    ``prices_E``, in units of the cost, from a similar problem save most of the work: any prices are valid, good ones
    are near the balance. The result is certified by complementary slackness: at the returned prices no point would
    rather be in another cluster.

    1. Prices (an auction, Bertsekas 1988, with simultaneous bids): every point goes to the cluster with the least
       cost + price; a cluster with too many points raises its price until the excess would rather leave.
    2. Shortest paths (Ahuja, Magnanti, Orlin, "Network Flows", 1993, sec. 9.7) on the E x E graph whose edge a -> b
       is the least cost of moving one point of a to b. A path from a crowded cluster to one with room moves one point
       along each edge. Point counts of stage 1 are optimal for their sizes, and a shortest path keeps them so. All
       paths that share no cluster are taken at once: they lie in one shortest-path forest, thus cost nothing in its
       reduced costs, thus leave no negative cycle.
    """
    num_points, num_clusters = cost_FE.shape
    size = num_points // num_clusters
    cost_FE, scale = on_grid(cost_FE)
    prices_E = np.zeros(num_clusters) if prices_E is None else np.rint(prices_E * scale)
    labels_F, count_E = _raise_prices(cost_FE, prices_E, size)
    move_EE = np.full((num_clusters, num_clusters), np.inf)
    mover_EE = np.zeros((num_clusters, num_clusters), dtype=np.int64)
    _update_moves(move_EE, mover_EE, cost_FE, labels_F, range(num_clusters))
    while (count_E > size).any():
        touched = []
        for path in _disjoint_paths(move_EE, count_E, size):
            labels_F[mover_EE[path[:-1], path[1:]]] = path[1:]
            count_E[path[0]] -= 1
            count_E[path[-1]] += 1
            touched += path
        _update_moves(move_EE, mover_EE, cost_FE, labels_F, touched)
    return labels_F, _prices(move_EE) / scale


def _raise_prices(cost_FE: np.ndarray, prices_E: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels that are optimal for their own cluster counts, and those counts, near ``size`` after a few rounds."""
    num_points, num_clusters = cost_FE.shape
    row_F = np.arange(num_points)
    history = []
    while True:
        total_FE = cost_FE + prices_E
        labels_F = total_FE.argmin(axis=1)
        count_E = np.bincount(labels_F, minlength=num_clusters)
        crowded = np.flatnonzero(count_E > size)
        excess = count_E[crowded] - size
        history.append(int(excess.sum()))
        before = history[-1 - _ROUNDS_WATCHED] if len(history) > _ROUNDS_WATCHED else np.inf
        if history[-1] == 0 or before - history[-1] < _LEAST_MOVED * num_points * _ROUNDS_WATCHED:
            break
        best_F = total_FE[row_F, labels_F]
        total_FE[row_F, labels_F] = np.inf
        regret_F = total_FE.min(axis=1) - best_F
        by_regret = np.lexsort((regret_F, labels_F))
        first_E = np.cumsum(count_E) - count_E
        # One grid step more than the regret: at equality the tie could still go to the crowded cluster.
        prices_E[crowded] += regret_F[by_regret[first_E[crowded] + excess - 1]] + 1
    return labels_F, count_E


def _update_moves(move_EE, mover_EE, cost_FE, labels_F, clusters) -> None:
    """Recompute the edges that leave ``clusters``: the cheapest move to every cluster, and the point that moves."""
    column_E = np.arange(cost_FE.shape[1])
    for cluster in clusters:
        members = np.flatnonzero(labels_F == cluster)
        if members.size == 0:
            move_EE[cluster] = np.inf
            continue
        change = cost_FE[members]
        change -= change[:, cluster, None].copy()
        cheapest_E = change.argmin(axis=0)
        move_EE[cluster] = change[cheapest_E, column_E]
        mover_EE[cluster] = members[cheapest_E]


def _disjoint_paths(move_EE: np.ndarray, count_E: np.ndarray, size: int) -> list[list[int]]:
    """Shortest paths from crowded clusters to clusters with room, nearest first, no cluster in two of them.

    Bellman-Ford from all crowded clusters at once; only clusters that came nearer are expanded again. Edges may be
    negative, cycles are not.
    """
    distance_E = np.where(count_E > size, 0.0, np.inf)
    parent_E = np.full(count_E.shape, -1)
    column_E = np.arange(len(count_E))
    frontier = np.flatnonzero(count_E > size)
    while frontier.size:
        through = distance_E[frontier, None] + move_EE[frontier]
        best_E = through.argmin(axis=0)
        shorter_E = through[best_E, column_E]
        nearer = np.flatnonzero(shorter_E < distance_E)
        distance_E[nearer] = shorter_E[nearer]
        parent_E[nearer] = frontier[best_E[nearer]]
        frontier = nearer
    room = np.flatnonzero(count_E < size)
    paths, taken_E = [], np.zeros(len(count_E), dtype=bool)
    for target in room[np.argsort(distance_E[room], kind="stable")]:
        path = [int(target)]
        while parent_E[path[-1]] >= 0:
            path.append(int(parent_E[path[-1]]))
        if not taken_E[path].any():
            taken_E[path] = True
            paths.append(path[::-1])
    return paths


def _prices(move_EE: np.ndarray) -> np.ndarray:
    """Prices at which no point wants to move: minus the shortest distance to each cluster from anywhere."""
    distance_E = np.zeros(len(move_EE))
    while True:
        shorter_E = np.minimum(distance_E, (distance_E[:, None] + move_EE).min(axis=0))
        if (shorter_E == distance_E).all():
            return -distance_E
        distance_E = shorter_E
