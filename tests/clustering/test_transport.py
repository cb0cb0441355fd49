"""Laws of the balanced assignment: both solvers find the optimum, and prices prove it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emoe.clustering.transport import EXACT_LIMIT, assign_exact, assign_fast, check_assignment, on_grid
from emoe.errors import UserError


@st.composite
def problems(draw):
    """Costs (F, E): smooth, or small integers full of ties, or with all points after the same cluster."""
    clusters, size = draw(st.integers(1, 9)), draw(st.integers(1, 6))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["smooth", "ties", "crowded", "constant"]))
    shape = (clusters * size, clusters)
    if kind == "smooth":
        return random.normal(size=shape)
    if kind == "ties":
        return random.integers(0, 3, size=shape).astype(float)
    if kind == "crowded":
        return random.normal(size=shape) + 10 * np.arange(clusters)
    return np.ones(shape)


def total(cost_FE, labels_F):
    grid_FE, _ = on_grid(cost_FE)
    return grid_FE[np.arange(len(grid_FE)), labels_F].sum()


@settings(max_examples=150, deadline=None)
@given(problems())
def test_fast_is_as_cheap_as_the_hungarian_solver_to_the_last_grid_step(cost_FE):
    labels_F, _ = assign_fast(cost_FE)
    assert (np.bincount(labels_F, minlength=cost_FE.shape[1]) == len(cost_FE) // cost_FE.shape[1]).all()
    assert total(cost_FE, labels_F) == total(cost_FE, assign_exact(cost_FE))


@settings(max_examples=100, deadline=None)
@given(problems(), st.integers(0, 2**32))
def test_any_starting_prices_lead_to_the_optimum(cost_FE, seed):
    wild_E = np.random.default_rng(seed).normal(size=cost_FE.shape[1]) * 5
    assert total(cost_FE, assign_fast(cost_FE, wild_E)[0]) == total(cost_FE, assign_fast(cost_FE)[0])


@settings(max_examples=100, deadline=None)
@given(problems())
def test_at_the_returned_prices_no_point_wants_to_move(cost_FE):
    labels_F, prices_E = assign_fast(cost_FE)
    grid_FE, scale = on_grid(cost_FE)
    paid_FE = grid_FE + np.rint(prices_E * scale)
    assert (paid_FE[np.arange(len(paid_FE)), labels_F] == paid_FE.min(axis=1)).all()


@settings(max_examples=100, deadline=None)
@given(problems(), st.integers(0, 2**32))
def test_a_permutation_of_points_keeps_the_cost_and_for_generic_costs_permutes_the_labels(cost_FE, seed):
    order_F = np.random.default_rng(seed).permutation(len(cost_FE))
    labels_F, permuted_F = assign_fast(cost_FE)[0], assign_fast(cost_FE[order_F])[0]
    assert total(cost_FE[order_F], permuted_F) == total(cost_FE, labels_F)
    if len(np.unique(on_grid(cost_FE)[0])) == cost_FE.size:  # no ties: the optimum is unique
        assert (permuted_F == labels_F[order_F]).all()


def test_structured_problem_of_realistic_size_is_solved_to_the_optimum():
    random = np.random.default_rng(0)
    points_FD = random.normal(size=(768, 32)) + 3 * random.normal(size=(16, 32))[random.integers(16, size=768)]
    cost_FE = -2 * points_FD @ points_FD[:32].T
    assert total(cost_FE, assign_fast(cost_FE)[0]) == total(cost_FE, assign_exact(cost_FE))


def test_unknown_solver_and_too_many_points_for_exact_are_explained():
    with pytest.raises(UserError, match="did you mean 'exact'"):
        check_assignment("exakt", 10)
    with pytest.raises(UserError, match="use 'fast'"):
        check_assignment("exact", EXACT_LIMIT + 1)
    check_assignment("fast", EXACT_LIMIT + 1)
