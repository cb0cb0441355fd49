"""How often do the tests of `emoe compare` cry wolf, and how often do its intervals hold the truth?

Tables without an effect are made up, with chance from training runs, from texts, or from both, and judged by the
functions that `emoe compare` uses. Prints the table of docs/comparing.md.
"""

from __future__ import annotations

import argparse

import numpy as np

from emoe.evaluation.resampling import Resampled, resample
from emoe.evaluation.significance import effect
from emoe.evaluation.vectorised import metric

SOURCES = {"runs": (0.15, 0.0), "both": (0.2, 1.0), "texts": (0.0, 1.0), "luck alone": (0.0, 0.0)}
"""Name → standard deviation over runs of an arm's chance to be right, and over texts of an arm's easiness."""


def answers(generator: np.random.Generator, seeds: int, examples: int, of_runs: float, of_texts: float) -> np.ndarray:
    """Right (1) or wrong (0) for two arms, (2, seeds, examples); about 70% right."""
    chance = (
        0.7 + generator.normal(0, of_runs, (2, seeds, 1)) + generator.normal(0, max(of_texts, 1e-9), (2, 1, examples))
    )
    return (generator.random((2, seeds, examples)) < chance).astype(float)


def percentiles_cover(found: Resampled, generator: np.random.Generator) -> bool:
    """Whether the plain percentile interval, which we do not use, holds 0."""
    resamples, seeds = found.drawn_RS.shape
    index_RS = generator.integers(seeds, size=(resamples, seeds))
    low, high = np.quantile(np.take_along_axis(found.drawn_RS, index_RS, axis=1).mean(-1), [0.025, 0.975])
    return bool(low <= 0 <= high)


def main() -> None:
    """Print one line a number of seeds and source of chance."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", type=int, default=200, help="made-up tables a line")
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--resamples", type=int, default=500)
    parser.add_argument("--seeds", default="5,10", help="numbers of seeds, by commas")
    given = parser.parse_args()
    print("| seeds | what varies | p seeds | p examples | p both | 95% interval | percentiles |")
    print("|---:|---|---:|---:|---:|---:|---:|")
    for seeds in map(int, given.seeds.split(",")):
        for name, (of_runs, of_texts) in SOURCES.items():
            generator = np.random.default_rng([seeds, len(name)])
            rates = np.zeros(5)
            for number in range(given.tables):
                first, second = answers(generator, seeds, given.examples, of_runs, of_texts)
                ones = np.ones(given.examples)
                found = resample(metric("accuracy"), ones, first, {"b": second}, given.resamples, [number])["b"]
                judged = effect(found, number)
                alarms = [p <= 0.05 for p in (judged.p_seeds, judged.p_examples, judged.p)]
                rates += [*alarms, judged.low <= 0 <= judged.high, percentiles_cover(found, generator)]
            print(
                f"| {seeds} | {name} | " + " | ".join(f"{100 * r / given.tables:.1f}%" for r in rates) + " |",
                flush=True,
            )


if __name__ == "__main__":
    main()
