"""How sure a difference is: an interval and tests that know of two sources of chance, seeds and examples.

docs/comparing.md explains the choices and measures their error rates.

Legend: S seeds, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from emoe.evaluation.resampling import Resampled, entropy_of

EXHAUSTIVE_SEEDS = 14
"""Up to here all 2^S assignments of arms to runs are tried."""

ROUNDING = 1e-9
"""Differences closer than this are ties, which rounding has parted. One answer of a million examples is 1e-6."""


@dataclass(frozen=True)
class Effect:
    """A difference from the baseline, in the metric's own unit (1 is 100 points).

    Attributes:
        difference: mean over paired seeds.
        low, high: 95% interval for new seeds and new examples; for new examples alone if there is one seed.
        p_seeds: these test examples, other training runs: arms exchanged within seeds.
        p_examples: these training runs, other examples: arms exchanged within examples.
        p: both at once; never below ``p_seeds``.
    """

    difference: float
    low: float
    high: float
    p_seeds: float
    p_examples: float
    p: float


def smallest_p(seeds: int) -> float:
    """The smallest p that exchanging arms within seeds can reach: two of the 2^S assignments are as extreme."""
    return 2.0 ** (1 - seeds)


def effect(found: Resampled, seed: int) -> Effect:
    """Interval and tests of one difference."""
    difference = float(found.seeds_S.mean())
    low, high = interval(found)
    signs_RS = _signs(len(found.swapped_R), len(found.seeds_S), seed)
    seeds_R = (signs_RS * found.seeds_S).mean(-1)
    p_seeds = seeds_test(found.seeds_S, seed)
    return Effect(
        difference=difference,
        low=low,
        high=high,
        p_seeds=p_seeds,
        p_examples=_extreme(found.swapped_R, difference),
        p=max(p_seeds, _extreme(seeds_R + found.swapped_R, difference)),
    )


def interval(found: Resampled, level: float = 0.95) -> tuple[float, float]:
    """Standard error over seeds and examples, times Student's t with Satterthwaite's degrees of freedom.

    The seeds' part is the variance between them over S, the examples' part that of the bootstrap over examples. Luck in
    single answers is in both, and so counted twice: the interval errs on the wide side. Drawing seeds and examples
    together (Owen 2007) would count it three times, and percentiles would be too narrow for a handful of seeds, whose
    variance the bootstrap takes for (S - 1)/S of what it is (Hesterberg 2015, arXiv 1411.5279).
    """
    seeds = len(found.seeds_S)
    of_examples = float(found.drawn_RS.mean(-1).var())
    of_seeds = float(found.seeds_S.var(ddof=1)) / seeds if seeds > 1 else 0.0
    quantile = stats.norm.ppf((1 + level) / 2)
    if of_seeds > 0:
        freedom = (of_seeds + of_examples) ** 2 / (of_seeds**2 / (seeds - 1))
        quantile = stats.t.ppf((1 + level) / 2, freedom)
    half = float(quantile * np.sqrt(of_seeds + of_examples))
    centre = float(found.seeds_S.mean())
    return centre - half, centre + half


def seeds_test(differences_S: np.ndarray, seed: int) -> float:
    """Paired permutation test over seeds, two-sided: exact for up to `EXHAUSTIVE_SEEDS`."""
    if len(differences_S) < 2:
        return 1.0
    # scipy's own allowance for rounding is relative to the observed mean, too little for a mean near 0.
    least = abs(differences_S.mean()) - ROUNDING
    found = stats.permutation_test(
        (differences_S,),
        lambda signed, axis: (np.abs(signed.mean(axis)) >= least).astype(float),  # as far from 0 as what was observed
        permutation_type="samples",
        alternative="greater",
        vectorized=True,
        n_resamples=2**EXHAUSTIVE_SEEDS,
        rng=np.random.default_rng(entropy_of(seed, "seeds exchanged")),
    )
    return float(found.pvalue)


def _signs(resamples: int, seeds: int, seed: int) -> np.ndarray:
    """Which seeds exchange their arms: ±1, (R, S)."""
    generator = np.random.default_rng(entropy_of(seed, "seeds exchanged with examples"))
    return 1 - 2 * generator.integers(2, size=(resamples, seeds))


def _extreme(permuted_R: np.ndarray, observed: float) -> float:
    """Share of permutations as far from 0 as what was observed, which counts as one of them."""
    far = np.abs(permuted_R) >= abs(observed) - ROUNDING
    return float((1 + far.sum()) / (1 + len(permuted_R)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (1979): the chance of any false alarm in the family stays below the level."""
    order = np.argsort(p_values, kind="stable")
    steps = np.asarray(p_values)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(steps))
    return adjusted.tolist()


@dataclass(frozen=True)
class Ranking:
    """Mean rank of each arm over domains (1 is best; ties share), and Friedman's test that all are alike.

    ``p`` is None with fewer than three arms or two domains, where scipy has no test.
    """

    ranks: dict[str, float]
    domains: list[str]
    p: float | None


def friedman(scores: dict[str, dict[str, float]]) -> Ranking:
    """Ranks as in GLUE-X (Yang et al. 2023, arXiv 2211.08073): each domain ranks the arms by their mean score.

    Args:
        scores: arm → domain → mean score; the same domains for all.
    """
    domains = list(next(iter(scores.values())))
    table = np.array([[of_arm[d] for d in domains] for of_arm in scores.values()]).round(9)  # (arms, domains); ties
    ranks = stats.rankdata(-table, axis=0).mean(axis=1) if domains else np.full(len(scores), np.nan)
    p = None
    if len(scores) >= 3 and len(domains) >= 2:
        with np.errstate(invalid="ignore"):  # all arms equal everywhere
            p = float(stats.friedmanchisquare(*table).pvalue)
        p = 1.0 if np.isnan(p) else p
    return Ranking(dict(zip(scores, ranks.tolist(), strict=True)), domains, p)
