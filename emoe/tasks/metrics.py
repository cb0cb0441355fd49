"""Scores of predictions by name, 1 the best: GLUE's and balanced accuracy."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np

from emoe.tasks.spec import Kind


def perplexity(nats: float, tokens: float) -> float:
    """Of so many tokens with this summed negative log-likelihood; NaN stays NaN, what overflows is cut at e^700."""
    mean = nats / max(1, tokens)
    return mean if math.isnan(mean) else math.exp(min(700.0, mean))


def accuracy(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Share of right answers."""
    return float(np.mean(labels == predictions))


def balanced_accuracy(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Mean over the classes that occur of the share of their examples that was recognised."""
    return float(np.mean([np.mean(predictions[labels == c] == c) for c in np.unique(labels)]))


def f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Of class 1, of a task with two."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, labels=[1], average="macro", zero_division=0))


def macro_f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Mean over the classes that occur or are predicted, of a task with more than two."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, average="macro", zero_division=0))


def matthews(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Matthews' correlation: 0 for chance, 0 too when only one class is predicted."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predictions))


def pearson(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Linear correlation; 0 where one side is constant."""
    return _correlation("pearsonr", labels, predictions)


def spearman(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Correlation of ranks; 0 where one side is constant."""
    return _correlation("spearmanr", labels, predictions)


def _correlation(function: str, labels: np.ndarray, predictions: np.ndarray) -> float:
    import scipy.stats

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a constant side: the answer is NaN, which we turn into 0
        value = float(getattr(scipy.stats, function)(labels, predictions).statistic)
    return value if np.isfinite(value) else 0.0


def accuracy_f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Mean of accuracy and F1, as GLUE scores MRPC and QQP."""
    return (accuracy(labels, predictions) + f1(labels, predictions)) / 2


def accuracy_macro_f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    """The same for a task with more than two classes."""
    return (accuracy(labels, predictions) + macro_f1(labels, predictions)) / 2


def pearson_spearman(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Mean of both correlations, as GLUE scores STS-B."""
    return (pearson(labels, predictions) + spearman(labels, predictions)) / 2


def token_accuracy(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Of instructions: `labels` are the tokens of each answer, `predictions` how many of them were foreseen."""
    return float(predictions.sum() / max(1, labels.sum()))


METRICS = {
    function.__name__: function
    for function in (
        accuracy,
        balanced_accuracy,
        f1,
        matthews,
        pearson,
        spearman,
        accuracy_f1,
        pearson_spearman,
        token_accuracy,
    )
}
"""Name → function of labels and predictions, both (examples,); larger is better."""

MACRO = {"f1": macro_f1, "accuracy_f1": accuracy_macro_f1}
"""What a name means for a task with more than two classes."""

FITTING: dict[Kind, tuple[str, ...]] = {
    "classification": ("balanced_accuracy", "accuracy", "f1", "matthews", "accuracy_f1"),
    "regression": ("pearson", "spearman", "pearson_spearman"),
    "instructions": ("token_accuracy",),
}
"""Kind of task → metrics that can score it."""


def compute(names: Sequence[str], labels: Sequence, predictions: Sequence, classes: int = 2) -> dict[str, float]:
    """The named metrics.

    Args:
        classes: labels that the task has, whichever of them occur here.

    Raises:
        ValueError: no example.
    """
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    if not len(labels):
        raise ValueError("no example to score")
    functions = METRICS | MACRO if classes > 2 else METRICS
    return {name: functions[name](labels, predictions) for name in names}
