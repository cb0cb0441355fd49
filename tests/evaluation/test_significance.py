"""What intervals and tests promise, on made-up chance of known size."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from emoe.evaluation.resampling import mean_over, resample
from emoe.evaluation.significance import effect, friedman, holm, interval, seeds_test, smallest_p
from emoe.evaluation.vectorised import metric

ACCURACY = metric("accuracy")
SIGNS = {seeds: np.array(list(itertools.product([1, -1], repeat=seeds))) for seeds in (5, 7)}
"""All ways to exchange two arms within seeds."""


def arms(generator, seeds, examples, shift=0.0, of_seeds=0.0, of_examples=0.0):
    """Right and wrong answers of two arms, whose chances of being right differ by run and by text."""
    seed_part = generator.normal(0, of_seeds, (2, seeds, 1))
    text_part = generator.normal(0, of_examples, (2, 1, examples))
    chance = 0.7 + seed_part + text_part + np.array([0, shift])[:, None, None]
    return (generator.random((2, seeds, examples)) < chance).astype(float)


def effect_of(generator, resamples=300, **chance):
    first, second = arms(generator, **chance)
    entropy = [int(generator.integers(2**31))]
    found = resample(ACCURACY, np.ones(first.shape[1]), first, {"b": second}, resamples, entropy)["b"]
    return effect(found, entropy[0])


@pytest.mark.parametrize(
    "chance",
    [
        {"of_seeds": 0.05, "of_examples": 0.0},  # training runs differ, texts do not matter
        {"of_seeds": 0.0, "of_examples": 0.25},  # the reverse
        {"of_seeds": 0.03, "of_examples": 0.25},  # both alike
    ],
)
def test_without_an_effect_alarms_are_rare_and_intervals_cover_zero(chance):
    """At the 5% level over 150 tables: at most 5% of alarms wanted, 10% is 2.8 standard errors above."""
    generator = np.random.default_rng(5)
    found = [effect_of(generator, seeds=7, examples=150, **chance) for _ in range(150)]
    assert np.mean([e.p <= 0.05 for e in found]) <= 0.10
    assert np.mean([e.low <= 0 <= e.high for e in found]) >= 0.90
    assert np.mean([e.p <= 0.5 for e in found]) > 0.15  # it is a test, not a constant


def test_ignoring_either_source_of_chance_raises_false_alarms():
    """The reason for testing both at once: with texts that matter, the test over seeds alone cries wolf, and so on."""
    generator = np.random.default_rng(6)
    texts = [effect_of(generator, seeds=7, examples=150, of_examples=1.0) for _ in range(100)]
    assert np.mean([e.p_seeds <= 0.05 for e in texts]) > 0.15
    runs = [effect_of(generator, seeds=7, examples=150, of_seeds=0.05) for _ in range(100)]
    assert np.mean([e.p_examples <= 0.05 for e in runs]) > 0.15


def test_p_over_seeds_is_uniform_where_only_seeds_matter():
    generator = np.random.default_rng(7)
    p = [seeds_test(generator.normal(size=8), 0) for _ in range(300)]
    for level in (0.05, 0.2, 0.5, 0.8):
        assert np.mean([x <= level for x in p]) == pytest.approx(level, abs=0.1)


def test_a_shift_is_found_and_covered():
    found = effect_of(np.random.default_rng(8), seeds=8, examples=2000, shift=0.05, of_seeds=0.005)
    assert found.p < 0.05
    assert found.low < 0.05 < found.high
    assert found.low > 0


def test_permutation_over_seeds_is_the_exhaustive_one():
    differences = np.random.default_rng(9).normal(0.3, 1, 7)
    means = (SIGNS[7] * differences).mean(1)
    expected = np.mean(np.abs(means) >= abs(differences.mean()) - 1e-12)
    assert seeds_test(differences, 0) == pytest.approx(expected)


def test_ties_count_in_spite_of_rounding():
    """Shares of 90 examples tie often: p is that of exact fractions, and of 0.1 + 0.2 - 0.3 it is that of 0."""
    generator, labels = np.random.default_rng(18), np.ones(90)
    for _ in range(40):
        first, second = ((generator.random((5, 90)) < 0.8).astype(float) for _ in range(2))
        right = (second.sum(1) - first.sum(1)).astype(int)
        sums = np.abs([sum(s * r for s, r in zip(signs, right, strict=True)) for signs in SIGNS[5]])
        found = resample(ACCURACY, labels, first, {"b": second}, 100, [4])["b"]
        assert seeds_test(found.seeds_S, 0) == np.mean(sums >= abs(right.sum()))
        swapped = np.rint(found.swapped_R * 450).astype(int)
        assert effect(found, 0).p_examples == (1 + (np.abs(swapped) >= abs(right.sum())).sum()) / 101
    assert seeds_test(np.array([0.1, 0.2, -0.3]), 0) == 1.0


@pytest.mark.parametrize("seeds", [2, 5, 10])
def test_the_smallest_p_is_reached_and_not_undercut(seeds):
    """All seeds agree without any doubt: p is what the number of seeds allows."""
    first, second = np.zeros((seeds, 500)), np.ones((seeds, 500))
    found = effect(resample(ACCURACY, np.ones(500), first, {"b": second}, 500, [0])["b"], 0)
    assert found.p_seeds == pytest.approx(smallest_p(seeds))
    assert found.p >= smallest_p(seeds)
    assert found.difference == 1.0


def test_many_seeds_are_sampled():
    differences = np.random.default_rng(10).normal(0, 1, 20)
    assert seeds_test(differences, 0) == seeds_test(differences, 0)
    t = scipy.stats.ttest_1samp(differences, 0).pvalue
    assert seeds_test(differences, 0) == pytest.approx(t, abs=0.03)


def test_one_seed_says_nothing_of_other_seeds():
    generator = np.random.default_rng(11)
    found = effect_of(generator, seeds=1, examples=2000, shift=0.1)
    assert found.p_seeds == 1.0
    assert found.p == 1.0
    assert found.p_examples < 0.01
    assert found.low > 0


def test_exchanging_the_arms_turns_the_sign_and_nothing_else():
    first, second = arms(np.random.default_rng(12), 5, 200, shift=0.05)
    labels = np.ones(200)
    one = effect(resample(ACCURACY, labels, first, {"x": second}, 400, [1])["x"], 1)
    other = effect(resample(ACCURACY, labels, second, {"x": first}, 400, [1])["x"], 1)
    assert (one.difference, one.low, one.high) == pytest.approx((-other.difference, -other.high, -other.low))
    assert (one.p, one.p_seeds, one.p_examples) == (other.p, other.p_seeds, other.p_examples)


def test_an_arm_against_itself():
    first, _ = arms(np.random.default_rng(13), 5, 200)
    found = effect(resample(ACCURACY, np.ones(200), first, {"x": first}, 200, [1])["x"], 1)
    assert (found.difference, found.low, found.high) == (0, 0, 0)
    assert (found.p, found.p_seeds, found.p_examples) == (1, 1, 1)


def test_interval_is_t_when_only_seeds_vary():
    """No chance in the examples: mean ± t s/√S."""
    differences = np.random.default_rng(14).normal(0.2, 0.1, 6)
    answers = np.zeros((6, 50))
    found = resample(ACCURACY, np.ones(50), answers, {"x": answers}, 20000, [2])["x"]
    found = type(found)(differences, np.broadcast_to(differences, (20000, 6)), found.swapped_R)
    half = scipy.stats.t.ppf(0.975, 5) * differences.std(ddof=1) / 6**0.5
    assert interval(found) == pytest.approx((differences.mean() - half, differences.mean() + half))


def test_interval_is_the_normal_one_when_only_examples_vary():
    """All seeds answer alike: the standard error is that of a paired difference of shares."""
    generator = np.random.default_rng(15)
    first, second = (np.repeat((generator.random((1, 400)) < c).astype(float), 4, 0) for c in (0.6, 0.7))
    found = resample(ACCURACY, np.ones(400), first, {"x": second}, 20000, [2])["x"]
    low, high = interval(found)
    error = (second - first)[0].std() / 20
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.03)


def test_mean_over_domains_keeps_seeds_together():
    generator = np.random.default_rng(16)
    found = []
    for _ in range(2):
        first, second = arms(generator, 5, 100)
        found.append(resample(ACCURACY, np.ones(100), first, {"x": second}, 50, [3])["x"])
    both = mean_over(found)
    assert both.seeds_S == pytest.approx((found[0].seeds_S + found[1].seeds_S) / 2)
    assert both.drawn_RS == pytest.approx((found[0].drawn_RS + found[1].drawn_RS) / 2)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.randoms())
def test_holm_is_monotone_and_order_free(p, random):
    adjusted = holm(p)
    assert all(raw <= a <= 1 for raw, a in zip(p, adjusted, strict=True))
    order = sorted(range(len(p)), key=p.__getitem__)
    assert [adjusted[i] for i in order] == sorted(adjusted)
    assert adjusted[order[0]] == min(1, len(p) * p[order[0]])
    shuffled = random.sample(range(len(p)), len(p))
    assert sorted(holm([p[i] for i in shuffled])) == sorted(adjusted)


def test_friedman_ranks():
    scores = {"a": {"x": 90, "y": 80, "z": 70}, "b": {"x": 80, "y": 80, "z": 60}, "c": {"x": 70, "y": 70, "z": 50}}
    found = friedman(scores)
    assert found.ranks == pytest.approx({"a": 3.5 / 3, "b": 5.5 / 3, "c": 3})
    assert found.p == pytest.approx(scipy.stats.friedmanchisquare([90, 80, 70], [80, 80, 60], [70, 70, 50]).pvalue)
    assert friedman({name: scores[name] for name in "ab"}).p is None
    assert friedman({name: {"x": 1.0, "y": 2.0} for name in "abc"}).p == 1.0
    parted = {"a": {"x": 0.1 + 0.2, "y": 1.0}, "b": {"x": 0.3, "y": 2.0}, "c": {"x": 0.2, "y": 3.0}}
    assert friedman(parted).p == friedman(parted | {"a": {"x": 0.3, "y": 1.0}}).p
