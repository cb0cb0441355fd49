"""Draws of seeds and examples, and what a difference between two arms becomes under them.

Both arms were trained from the same seeds and scored on the same examples, so a table of differences has seeds as rows
and examples as columns: a crossed design. New training runs and new texts are separate sources of chance, and a draw
takes rows and columns independently: the multi-bootstrap of MultiBERTs (Sellam et al. 2022, arXiv 2106.16163), which is
Owen's pigeonhole bootstrap (Annals of Applied Statistics 2007) with paired seeds.

Every draw depends on the seed given and on the domain's name, and on nothing else in the table: a further run or domain
changes no figure of the others.

Legend: N examples, S seeds, R resamples.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from emoe.evaluation.vectorised import Mean, Ranks, Sums

CHUNK_BYTES = 1 << 25
"""Memory of one block of weights. 2,000 resamples of 23,140 examples, 10 seeds and 7 arms: 2.5 s of one core."""


@dataclass(frozen=True)
class Resampled:
    """A difference between two arms on one domain, or the mean over several.

    Attributes:
        seeds_S: as measured, seed by seed.
        drawn_RS: with examples drawn with replacement.
        swapped_R: mean over seeds after exchanging the arms' answers to a random half of the examples.
    """

    seeds_S: np.ndarray
    drawn_RS: np.ndarray
    swapped_R: np.ndarray


def mean_over(domains: list[Resampled]) -> Resampled:
    """The mean difference over domains, whose examples are drawn independently and whose seeds are the same runs."""
    return Resampled(*(np.mean([getattr(d, f) for d in domains], axis=0) for f in ("seeds_S", "drawn_RS", "swapped_R")))


def resample(
    measure: Sums | Ranks | Mean,
    labels_N: np.ndarray,
    baseline_SN: np.ndarray,
    others: dict[str, np.ndarray],
    resamples: int,
    entropy: list[int],
) -> dict[str, Resampled]:
    """Differences of other arms from a baseline under the same draws of examples.

    Args:
        measure: the domain's metric.
        others: predictions (S, N) of each arm.
        resamples: R.
        entropy: seed of the draws.
    """
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in others}
    swapped: dict[str, list[np.ndarray]] = {name: [] for name in others}
    for weights_RN, swap_RN in _draws(len(labels_N), resamples, entropy):
        baseline_RS = measure.weighted(labels_N, baseline_SN, weights_RN)
        for name, other_SN in others.items():
            drawn[name].append(measure.weighted(labels_N, other_SN, weights_RN) - baseline_RS)
            swapped[name].append(measure.swapped(labels_N, baseline_SN, other_SN, swap_RN).mean(-1))
    plain_S = measure.plain(labels_N, baseline_SN)
    return {
        name: Resampled(
            measure.plain(labels_N, other_SN) - plain_S, np.concatenate(drawn[name]), np.concatenate(swapped[name])
        )
        for name, other_SN in others.items()
    }


def _draws(examples: int, resamples: int, entropy: list[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of how often each example is drawn, and of which examples change sides; both (R, N) in float32."""
    generator = np.random.default_rng(entropy)
    rows = max(1, CHUNK_BYTES // (4 * examples))
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        index_RN = generator.integers(examples, size=(count, examples))
        index_RN += np.arange(count)[:, None] * examples
        weights_RN = np.bincount(index_RN.ravel(), minlength=count * examples).reshape(count, examples)
        swap_RN = generator.integers(2, size=(count, examples), dtype=np.uint8)
        yield weights_RN.astype(np.float32), swap_RN.astype(np.float32)


def entropy_of(seed: int, name: str) -> list[int]:
    """Seed of the draws for a domain."""
    return [seed, zlib.crc32(name.encode())]
