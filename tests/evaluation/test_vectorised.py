"""The metrics of many resamples are the plain metrics of each resample."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as sk

from emoe.errors import UserError
from emoe.evaluation.vectorised import MACRO, METRICS, metric
from emoe.tasks.metrics import MACRO as PLAIN_MACRO
from emoe.tasks.metrics import METRICS as PLAIN
from emoe.tasks.metrics import compute

N, SEEDS, RESAMPLES = 40, 3, 5


CASES = [
    *((name, 2) for name in ("accuracy", "balanced_accuracy", "f1", "matthews", "accuracy_f1")),
    *(
        (name, 4) for name in ("accuracy", "balanced_accuracy", "f1", "matthews", "accuracy_f1")
    ),  # more classes: macro, R_K
    *((name, 0) for name in ("pearson", "spearman", "pearson_spearman", "token_accuracy")),  # numbers, with ties
]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def case(request):
    """Metric, plain function, labels, two arms' predictions."""
    name, classes = request.param
    generator = np.random.default_rng(1)
    if classes:
        labels, *arms = (generator.integers(classes, size=s) for s in (N, (SEEDS, N), (SEEDS, N)))
    else:
        labels = generator.integers(1, 9, size=N) / 2
        arms = [np.minimum(labels, labels * generator.random((SEEDS, N)).round(1)) for _ in range(2)]
    plain = (PLAIN | PLAIN_MACRO if classes > 2 else PLAIN)[name]
    return metric(name, classes), plain, labels.astype(float), *(arm.astype(float) for arm in arms)


def test_every_metric_is_here():
    assert set(PLAIN) == set(METRICS)
    assert set(PLAIN_MACRO) == set(MACRO)


def test_plain(case):
    measure, plain, labels, first, _ = case
    assert measure.plain(labels, first) == pytest.approx([plain(labels, said) for said in first], abs=1e-13)


def test_a_weight_counts_an_example_so_many_times(case):
    measure, plain, labels, first, _ = case
    weights = np.random.default_rng(2).integers(4, size=(RESAMPLES, N))  # some examples not at all
    found = measure.weighted(labels, first, weights.astype(np.float32))
    assert found.shape == (RESAMPLES, SEEDS)
    for row, weight in zip(found, weights, strict=True):
        repeated = [plain(np.repeat(labels, weight), np.repeat(said, weight)) for said in first]
        assert row == pytest.approx(repeated, abs=1e-13)


def test_swapping_exchanges_answers(case):
    measure, plain, labels, first, second = case
    swap = np.random.default_rng(3).integers(2, size=(RESAMPLES, N))
    found = measure.swapped(labels, first, second, swap.astype(np.float32))
    assert found.shape == (RESAMPLES, SEEDS)
    for row, mask in zip(found, swap.astype(bool), strict=True):
        for value, one, other in zip(row, first, second, strict=True):
            expected = plain(labels, np.where(mask, one, other)) - plain(labels, np.where(mask, other, one))
            assert value == pytest.approx(expected, abs=1e-13)


def test_a_class_that_only_one_arm_predicts_is_counted():
    """The arms' sums are mixed, so both must be over the same classes."""
    labels, first = np.array([0.0, 1, 0, 1]), np.zeros((1, 4))
    second = np.array([[0.0, 1, 2, 1]])
    for name in ("f1", "matthews"):
        found = metric(name, 3).swapped(labels, first, second, np.zeros((1, 4), np.float32))
        plain = (PLAIN | PLAIN_MACRO)[name]
        assert found[0, 0] == pytest.approx(plain(labels, second[0]) - plain(labels, first[0]), abs=1e-6)


def test_f1_is_the_task_s_whatever_was_predicted():
    """Of three labels a domain may hold two, and an arm predict no third: still the mean over classes."""
    labels, said = np.array([0.0, 0, 0, 1]), np.array([[0.0, 0, 1, 1]])
    macro = sk.f1_score(labels, said[0], average="macro")
    assert macro != pytest.approx(sk.f1_score(labels, said[0]))
    for classes, expected in ((3, macro), (2, sk.f1_score(labels, said[0]))):
        assert metric("f1", classes).plain(labels, said) == pytest.approx([expected])
        assert compute(["f1"], labels, said[0], classes)["f1"] == pytest.approx(expected)
        mean = (0.75 + expected) / 2
        assert metric("accuracy_f1", classes).plain(labels, said) == pytest.approx([mean])
        assert compute(["accuracy_f1"], labels, said[0], classes)["accuracy_f1"] == pytest.approx(mean)


@pytest.mark.parametrize("name", ["f1", "matthews", "pearson", "spearman"])
def test_constant_answers_score_nothing(name):
    assert metric(name).plain(np.array([0.0, 1, 1, 0]), np.zeros((1, 4))).tolist() == [0.0]


def test_unknown_metric():
    with pytest.raises(UserError, match="did you mean 'accuracy'"):
        metric("acuracy")
