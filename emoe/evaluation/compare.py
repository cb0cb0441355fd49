"""Runs against a baseline: mean and spread, paired differences with intervals and tests, ranks, cost.

Everything comes from the raw predictions in the run folders. Figures are in points: percent of the metric's maximum.

Legend: N examples, S seeds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import emoe
from emoe.errors import UserError, nearest
from emoe.evaluation.pairing import DomainTable, Paired, pair
from emoe.evaluation.resampling import Resampled, entropy_of, mean_over, resample
from emoe.evaluation.runs import OOD, Run
from emoe.evaluation.significance import Ranking, effect, friedman, holm, smallest_p
from emoe.evaluation.vectorised import metric

RESAMPLES = 2000
OOD_MEAN = "OOD mean"
"""The mean over all OOD domains, the one figure that answers whether a method generalises better."""
LEVEL = 0.05

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class DomainFacts:
    """What a domain is."""

    name: str
    role: str
    metric: str
    examples: int


@dataclass(frozen=True)
class Scores:
    """One run on one domain, in points."""

    mean: float
    std: float | None
    """Over seeds, with S - 1 in the denominator; None for one seed."""
    by_seed: list[float]


@dataclass(frozen=True)
class Difference:
    """One run less the baseline on one domain, in points. `Effect` tells what the p-values test."""

    difference: float
    low: float
    high: float
    p_seeds: float
    p_examples: float
    p: float
    p_holm: float | None
    """`p` adjusted over the domains; None for the mean over OOD domains, which is a question of its own."""

    @property
    def significant(self) -> bool:
        """Whether it stands after adjustment."""
        return (self.p if self.p_holm is None else self.p_holm) < LEVEL


@dataclass(frozen=True)
class Cost:
    """Means over seeds."""

    steps: float
    seconds: float
    seconds_per_step: float
    peak_memory_bytes: float
    trainable_parameters: int
    train_examples: int


@dataclass(frozen=True)
class Row:
    """One run."""

    name: str
    reading: str
    model: str
    method: str
    tuning: str
    scores: dict[str, Scores]
    differences: dict[str, Difference]
    """Empty for the baseline."""
    rank: float
    """Mean rank over test domains, 1 is best."""
    ood_rank: float | None
    """Mean rank over OOD domains alone, as GLUE-X has it."""
    cost: Cost


@dataclass(frozen=True)
class Comparison:
    """Runs of one task; the first row is the baseline."""

    task: str
    baseline: str
    seeds: list[int]
    smallest_p: float
    """What exchanging arms within these seeds can reach at the least."""
    resamples: int
    seed: int
    domains: list[DomainFacts]
    rows: list[Row]
    friedman_p: float | None
    """Over OOD domains; None where the test does not exist."""
    notes: list[str]
    emoe: str

    @property
    def columns(self) -> list[str]:
        """Domains, and the mean over the OOD ones if there are several."""
        ood = [domain.name for domain in self.domains if domain.role == OOD]
        return [domain.name for domain in self.domains] + ([OOD_MEAN] if len(ood) > 1 else [])

    def __str__(self) -> str:
        """The table in Markdown."""
        from emoe.report.comparison import formats

        return formats()["md"](self)

    def to_dict(self) -> dict[str, Any]:
        """As plain types, for JSON."""
        return asdict(self)


def compare(
    runs: list[Run],
    baseline: str | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    progress: Progress = lambda stage, done, total: None,
) -> Comparison:
    """Compare runs with one of them.

    Args:
        baseline: name of a run; default: the first.
        resamples: draws of the bootstrap and of the permutation tests.
        seed: of these draws.

    Raises:
        UserError: fewer than two runs, an unknown baseline, or runs that cannot be compared (see `pair`).
    """
    if len(runs) < 2:
        raise UserError("compare: give two run folders or more; the first is the baseline")
    if resamples < 100:
        raise UserError(f"--resamples: {resamples} is too few for a p-value; give 1000 or more")
    paired = pair(_baseline_first(runs, baseline), progress)
    names = [run.name for run in paired.runs]
    scores = _scores(paired)
    columns = list(scores[names[0]])
    differences = _differences(paired, names, resamples, seed, progress)
    everywhere = friedman(_means(scores, [domain.name for domain in paired.domains]))
    ood = [domain.name for domain in paired.domains if domain.role == OOD]
    outside = friedman(_means(scores, ood))
    _check_recorded(paired, scores)
    return Comparison(
        task=paired.runs[0].first.task,
        baseline=names[0],
        seeds=paired.seeds,
        smallest_p=smallest_p(len(paired.seeds)),
        resamples=resamples,
        seed=seed,
        domains=[DomainFacts(d.name, d.role, d.metric, len(d.labels_N)) for d in paired.domains],
        rows=[
            _row(run, paired.seeds, {c: scores[run.name][c] for c in columns}, differences, everywhere, outside)
            for run in paired.runs
        ],
        friedman_p=outside.p,
        notes=paired.notes,
        emoe=emoe.__version__,
    )


def _baseline_first(runs: list[Run], baseline: str | None) -> list[Run]:
    if baseline is None:
        return runs
    known = [run.name for run in runs]
    matching = [run for run in runs if baseline == run.name or baseline.rstrip("/") == str(run.folder)]
    if not matching:
        raise UserError(f"--baseline: '{baseline}' is none of the runs{nearest(baseline, known)}: {', '.join(known)}")
    return [matching[0], *(run for run in runs if run is not matching[0])]


def _summary(by_seed: list[float]) -> Scores:
    mean = fmean(by_seed)
    if len(by_seed) < 2:
        return Scores(mean, None, by_seed)
    return Scores(mean, (sum((x - mean) ** 2 for x in by_seed) / (len(by_seed) - 1)) ** 0.5, by_seed)


def _scores(paired: Paired) -> dict[str, dict[str, Scores]]:
    """Run → column → scores."""
    ood = [domain.name for domain in paired.domains if domain.role == OOD]
    table = {}
    for run in paired.runs:
        by_domain = {
            d.name: (100 * metric(d.metric, d.classes).plain(d.labels_N, d.predictions[run.name])).tolist()
            for d in paired.domains
        }
        if len(ood) > 1:
            by_domain[OOD_MEAN] = [fmean(of_seed) for of_seed in zip(*(by_domain[name] for name in ood), strict=True)]
        table[run.name] = {name: _summary(by_seed) for name, by_seed in by_domain.items()}
    return table


def _means(scores: dict[str, dict[str, Scores]], columns: list[str]) -> dict[str, dict[str, float]]:
    return {run: {column: of_run[column].mean for column in columns} for run, of_run in scores.items()}


def _differences(
    paired: Paired, names: list[str], resamples: int, seed: int, progress: Progress
) -> dict[str, dict[str, Difference]]:
    """Run → column → difference from the first run."""
    resampled: dict[str, dict[str, Resampled]] = {name: {} for name in names[1:]}
    for number, domain in enumerate(paired.domains):
        progress(f"resampling {domain.name}", number, len(paired.domains))
        for name, found in _resample(domain, names, resamples, seed).items():
            resampled[name][domain.name] = found
    ood = [domain.name for domain in paired.domains if domain.role == OOD]
    table = {}
    for name, by_domain in resampled.items():
        effects = {column: effect(found, seed) for column, found in by_domain.items()}
        adjusted = dict(zip(effects, holm([e.p for e in effects.values()]), strict=True))
        if len(ood) > 1:
            effects[OOD_MEAN] = effect(mean_over([by_domain[column] for column in ood]), seed)
        table[name] = {
            column: Difference(
                100 * e.difference, 100 * e.low, 100 * e.high, e.p_seeds, e.p_examples, e.p, adjusted.get(column)
            )
            for column, e in effects.items()
        }
    return table


def _resample(domain: DomainTable, names: list[str], resamples: int, seed: int) -> dict[str, Resampled]:
    others = {name: domain.predictions[name] for name in names[1:]}
    first_SN = domain.predictions[names[0]]
    measure = metric(domain.metric, domain.classes)
    return resample(measure, domain.labels_N, first_SN, others, resamples, entropy_of(seed, domain.name))


def _row(
    run: Run,
    seeds: list[int],
    scores: dict[str, Scores],
    differences: dict[str, dict[str, Difference]],
    everywhere: Ranking,
    outside: Ranking,
) -> Row:
    records = [run.records[seed] for seed in seeds]
    cost = Cost(
        steps=fmean(r.steps for r in records),
        seconds=fmean(r.seconds for r in records),
        seconds_per_step=fmean(r.seconds_per_step for r in records),
        peak_memory_bytes=fmean(r.peak_memory_bytes for r in records),
        trainable_parameters=run.first.trainable_parameters,
        train_examples=run.first.train_examples,
    )
    return Row(
        name=run.name,
        reading=run.reading,
        model=run.first.model,
        method=run.first.method,
        tuning=run.first.tuning,
        scores=scores,
        differences=differences.get(run.name, {}),
        rank=everywhere.ranks[run.name],
        ood_rank=outside.ranks[run.name] if outside.domains else None,
        cost=cost,
    )


def _check_recorded(paired: Paired, scores: dict[str, dict[str, Scores]]) -> None:
    """run.json and the predictions are two witnesses; say where they disagree on the same examples."""
    for run in paired.runs:
        for domain in paired.domains:
            for seed, found in zip(paired.seeds, scores[run.name][domain.name].by_seed, strict=True):
                score = run.scores(seed)[domain.name]
                if score.examples == len(domain.labels_N) and abs(100 * score.score - found) > 1e-3:
                    paired.notes.append(
                        f"{run.name}, seed {seed}, {domain.name}: run.json says {100 * score.score:.3f}, "
                        f"its predictions {found:.3f}; the predictions count"
                    )
