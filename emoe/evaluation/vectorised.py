"""Metrics of many resamples at once.

A bootstrap gives each example a weight (how often it was drawn), a permutation test swaps two arms' answers to some
examples. For most metrics both are matrix products, since the metric depends on the examples through sums alone:
balanced accuracy through the correct answers in each class, Pearson's correlation through five moments. `Sums` states
a metric that way. Spearman's ranks are no sums; `Ranks` sorts.

Legend: N examples, S seeds (runs of one arm), R resamples, F sums that a metric needs, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from emoe.errors import UserError, nearest


@dataclass(frozen=True)
class Sums:
    """A metric of sums over examples.

    Attributes:
        terms: (labels_N, predictions_SN, classes_C) → what each example adds, (F, S, N).
        score: sums (F, …) → scores (…).
    """

    terms: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
    score: Callable[[np.ndarray], np.ndarray]

    def plain(self, labels_N: np.ndarray, predictions_SN: np.ndarray) -> np.ndarray:
        """Score of each seed, (S,)."""
        return self.score(self.terms(labels_N, predictions_SN, _classes(labels_N, predictions_SN)).sum(-1))

    def weighted(self, labels_N: np.ndarray, predictions_SN: np.ndarray, weights_RN: np.ndarray) -> np.ndarray:
        """Scores (R, S) where an example counts as often as its weight says."""
        terms_FSN = self.terms(labels_N, predictions_SN, _classes(labels_N, predictions_SN))
        return self.score(_weigh(terms_FSN, weights_RN))

    def swapped(
        self, labels_N: np.ndarray, first_SN: np.ndarray, second_SN: np.ndarray, swap_RN: np.ndarray
    ) -> np.ndarray:
        """Second arm's score less the first's, (R, S), after exchanging their answers where ``swap_RN`` is 1."""
        classes_C = _classes(labels_N, first_SN, second_SN)
        first_FSN, second_FSN = (self.terms(labels_N, arm_SN, classes_C) for arm_SN in (first_SN, second_SN))
        moved_FRS = _weigh(second_FSN - first_FSN, swap_RN)
        first_FRS = first_FSN.sum(-1)[:, None] + moved_FRS
        second_FRS = second_FSN.sum(-1)[:, None] - moved_FRS
        return self.score(second_FRS) - self.score(first_FRS)


def _classes(*arrays: np.ndarray) -> np.ndarray:
    return np.unique(np.concatenate([np.unique(array) for array in arrays]))


def _weigh(terms_FSN: np.ndarray, weights_RN: np.ndarray) -> np.ndarray:
    features, seeds, examples = terms_FSN.shape
    sums_RG = weights_RN.astype(terms_FSN.dtype, copy=False) @ terms_FSN.reshape(-1, examples).T
    return sums_RG.T.reshape(features, seeds, -1).swapaxes(1, 2)


@dataclass(frozen=True)
class Ranks:
    """Spearman's correlation. Ties get their mean rank, as in scipy."""

    def plain(self, labels_N: np.ndarray, predictions_SN: np.ndarray) -> np.ndarray:
        """Score of each seed, (S,)."""
        return self.weighted(labels_N, predictions_SN, np.ones((1, len(labels_N))))[0]

    def weighted(self, labels_N: np.ndarray, predictions_SN: np.ndarray, weights_RN: np.ndarray) -> np.ndarray:
        """Scores (R, S) where an example counts as often as its weight says."""
        labels_RN = _weighted_ranks(labels_N, weights_RN)
        columns = [_correlation(labels_RN, _weighted_ranks(p_N, weights_RN), weights_RN) for p_N in predictions_SN]
        return np.stack(columns, -1)

    def swapped(
        self, labels_N: np.ndarray, first_SN: np.ndarray, second_SN: np.ndarray, swap_RN: np.ndarray
    ) -> np.ndarray:
        """Second arm's score less the first's, (R, S), after exchanging their answers where ``swap_RN`` is 1."""
        labels_RN = rankdata(labels_N)[None]
        ones = np.ones((1, len(labels_N)))
        swap = swap_RN.astype(bool)
        columns = []
        for first_N, second_N in zip(first_SN, second_SN, strict=True):
            arms = (np.where(swap, second_N, first_N), np.where(swap, first_N, second_N))
            first_R, second_R = (_correlation(labels_RN, rankdata(arm_RN, axis=-1), ones) for arm_RN in arms)
            columns.append(second_R - first_R)
        return np.stack(columns, -1)


def _weighted_ranks(values_N: np.ndarray, weights_RN: np.ndarray) -> np.ndarray:
    """Mean ranks of a sample in which each value stands as often as its weight says."""
    distinct, place_N = np.unique(values_N, return_inverse=True)
    order_N = np.argsort(place_N, kind="stable")
    starts = np.searchsorted(place_N[order_N], np.arange(len(distinct)))
    count_RD = np.add.reduceat(weights_RN[:, order_N].astype(np.float64), starts, axis=1)
    rank_RD = np.cumsum(count_RD, axis=1) - count_RD / 2 + 0.5
    return rank_RD[:, place_N]


def _correlation(x_RN: np.ndarray, y_RN: np.ndarray, weights_RN: np.ndarray) -> np.ndarray:
    total_R = weights_RN.sum(-1, keepdims=True)
    dx = x_RN - (weights_RN * x_RN).sum(-1, keepdims=True) / total_R
    dy = y_RN - (weights_RN * y_RN).sum(-1, keepdims=True) / total_R
    covariance = (weights_RN * dx * dy).sum(-1)
    return _ratio(covariance, np.sqrt((weights_RN * dx * dx).sum(-1) * (weights_RN * dy * dy).sum(-1)))


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below, and 0 where nothing is below: what sklearn says of an F1 or correlation without positives.

    In fp64: sums are counts, exact in fp32, but of their fp32 ratios equal differences between runs would come out
    unequal, and permutation tests count ties.
    """
    return np.divide(above, below, out=np.zeros(np.shape(above)), where=below > 0, dtype=np.float64)


def _accuracy_terms(labels_N: np.ndarray, predictions_SN: np.ndarray, classes_C: np.ndarray) -> np.ndarray:
    right_SN = predictions_SN == labels_N
    return np.stack([right_SN, np.ones_like(right_SN)]).astype(np.float32)


def _accuracy(sums: np.ndarray) -> np.ndarray:
    return _ratio(sums[0], sums[1])


def _balanced_terms(labels_N: np.ndarray, predictions_SN: np.ndarray, classes_C: np.ndarray) -> np.ndarray:
    """Correct in each class, members of each class."""
    member_CN = labels_N == classes_C[:, None]
    right_CSN = member_CN[:, None] & (predictions_SN == labels_N)
    return np.concatenate([right_CSN, np.broadcast_to(member_CN[:, None], right_CSN.shape)]).astype(np.float32)


def _balanced_accuracy(sums: np.ndarray) -> np.ndarray:
    """Mean recall of the classes that a resample holds."""
    right_C, members_C = np.split(sums, 2)
    return _ratio(right_C, members_C).sum(0) / np.maximum(1, (members_C > 0).sum(0))


def _f1_terms(labels_N: np.ndarray, predictions_SN: np.ndarray, classes_C: np.ndarray) -> np.ndarray:
    """True positives, predicted and actual positives of each class."""
    said_CSN = predictions_SN == classes_C[:, None, None]
    true_CSN = np.broadcast_to((labels_N == classes_C[:, None])[:, None], said_CSN.shape)
    return np.concatenate([said_CSN & true_CSN, said_CSN, true_CSN]).astype(np.float32)


def _f1_of_class_1_terms(labels_N: np.ndarray, predictions_SN: np.ndarray, classes_C: np.ndarray) -> np.ndarray:
    return _f1_terms(labels_N, predictions_SN, np.array([1.0]))


def _f1(sums: np.ndarray) -> np.ndarray:
    """Mean over the classes that a resample holds or predicts."""
    both_C, said_C, true_C = np.split(sums, 3)
    occurs_C = said_C + true_C > 0
    return _ratio(2 * both_C, said_C + true_C).sum(0) / np.maximum(1, occurs_C.sum(0))


def _matthews_terms(labels_N: np.ndarray, predictions_SN: np.ndarray, classes_C: np.ndarray) -> np.ndarray:
    """All, correct, said to be of each class, truly of each class."""
    said_CSN = predictions_SN == classes_C[:, None, None]
    true_CSN = np.broadcast_to((labels_N == classes_C[:, None])[:, None], said_CSN.shape)
    right_SN = predictions_SN == labels_N
    return np.concatenate([np.ones_like(right_SN)[None], right_SN[None], said_CSN, true_CSN]).astype(np.float32)


def _matthews(sums: np.ndarray) -> np.ndarray:
    """Gorodkin's R_K (2004), of which the two-class coefficient is a case."""
    sums = sums.astype(np.float64)
    everything, right = sums[0], sums[1]
    said_C, true_C = np.split(sums[2:], 2)
    above = right * everything - (said_C * true_C).sum(0)
    return _ratio(above, np.sqrt((everything**2 - (said_C**2).sum(0)) * (everything**2 - (true_C**2).sum(0))))


def _moments(labels_N: np.ndarray, predictions_SN: np.ndarray, classes_C: np.ndarray) -> np.ndarray:
    """Moments about the labels' mean: near the predictions', and the same for two arms that are to be mixed."""
    centre = labels_N.mean()
    x_SN, y_SN = np.broadcast_to(labels_N - centre, predictions_SN.shape), predictions_SN - centre
    return np.stack([np.ones_like(y_SN), x_SN, y_SN, x_SN * y_SN, x_SN**2, y_SN**2])


def _pearson(sums: np.ndarray) -> np.ndarray:
    n, x, y, xy, xx, yy = sums
    return _ratio(n * xy - x * y, np.sqrt(np.maximum(0, (n * xx - x * x) * (n * yy - y * y))))


def _token_terms(labels_N: np.ndarray, predictions_SN: np.ndarray, classes_C: np.ndarray) -> np.ndarray:
    """Tokens foreseen, tokens of the answer."""
    return np.stack([predictions_SN, np.broadcast_to(labels_N, predictions_SN.shape)])


@dataclass(frozen=True)
class Mean:
    """Mean of several metrics, as GLUE reports two for some tasks."""

    parts: tuple[Sums | Ranks, ...]

    def plain(self, labels_N: np.ndarray, predictions_SN: np.ndarray) -> np.ndarray:
        """Score of each seed, (S,)."""
        return sum(part.plain(labels_N, predictions_SN) for part in self.parts) / len(self.parts)

    def weighted(self, labels_N: np.ndarray, predictions_SN: np.ndarray, weights_RN: np.ndarray) -> np.ndarray:
        """Scores (R, S) where an example counts as often as its weight says."""
        return sum(part.weighted(labels_N, predictions_SN, weights_RN) for part in self.parts) / len(self.parts)

    def swapped(
        self, labels_N: np.ndarray, first_SN: np.ndarray, second_SN: np.ndarray, swap_RN: np.ndarray
    ) -> np.ndarray:
        """Second arm's score less the first's, (R, S), after exchanging their answers where ``swap_RN`` is 1."""
        return sum(part.swapped(labels_N, first_SN, second_SN, swap_RN) for part in self.parts) / len(self.parts)


_ACCURACY, _F1, _MACRO_F1 = Sums(_accuracy_terms, _accuracy), Sums(_f1_of_class_1_terms, _f1), Sums(_f1_terms, _f1)
_PEARSON, _SPEARMAN = Sums(_moments, _pearson), Ranks()

METRICS: dict[str, Sums | Ranks | Mean] = {
    "accuracy": _ACCURACY,
    "balanced_accuracy": Sums(_balanced_terms, _balanced_accuracy),
    "f1": _F1,
    "matthews": Sums(_matthews_terms, _matthews),
    "pearson": _PEARSON,
    "spearman": _SPEARMAN,
    "accuracy_f1": Mean((_ACCURACY, _F1)),
    "pearson_spearman": Mean((_PEARSON, _SPEARMAN)),
    "token_accuracy": Sums(_token_terms, _accuracy),
}
"""The metrics of `emoe.tasks.metrics` by their names; a test holds the two equal."""

MACRO: dict[str, Sums | Ranks | Mean] = {"f1": _MACRO_F1, "accuracy_f1": Mean((_ACCURACY, _MACRO_F1))}
"""What a name means for a task with more than two classes."""


def metric(name: str, classes: int = 2) -> Sums | Ranks | Mean:
    """A metric by the name that run.json gives it, for a task of so many labels.

    Raises:
        UserError: unknown here.
    """
    if name not in METRICS:
        raise UserError(
            f"compare: cannot resample metric '{name}'{nearest(name, METRICS)}. Known: {', '.join(METRICS)}"
        )
    return MACRO[name] if classes > 2 and name in MACRO else METRICS[name]
