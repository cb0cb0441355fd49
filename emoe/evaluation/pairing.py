"""What several runs have in common: seeds, domains and examples. What is left out is said, what cannot be is an error.

Legend: N examples, S seeds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np

from emoe.errors import UserError
from emoe.evaluation.runs import VALIDATION, Record, Run
from emoe.finetuning.settings import located

NOT_CONFOUNDS = {"output", "seed", "seeds", "resume", "overwrite", "method", "discard_model", "tensorboard"}
"""Settings that do not make runs differ, or that name the arm."""


TEXTS = ("task", "data_dir", "domains", "train_limit")
"""Settings that choose the training texts; where they are the same, the texts must be."""

ENVIRONMENT = ("processes", "hardware", "torch", "transformers", "emoe")
"""Fields of a record that may differ between seeds of one run."""


@dataclass(frozen=True)
class DomainTable:
    """One domain: what every seed of every run answered to the same examples."""

    name: str
    role: str
    metric: str
    labels_N: np.ndarray
    predictions: dict[str, np.ndarray]
    """Run → (S, N)."""
    classes: int
    """Labels that the task has, whichever of them occur here."""


@dataclass
class Paired:
    """Runs side by side."""

    runs: list[Run]
    seeds: list[int]
    domains: list[DomainTable] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def pair(runs: list[Run], progress: Callable[[str, int, int], None]) -> Paired:
    """Read the predictions of all runs on what they have in common.

    Raises:
        UserError: different tasks, metrics, labels, or training texts that changed beneath the same settings; no seed,
            test domain or example in common.
    """
    tasks = {run.first.task for run in runs}
    if len(tasks) > 1:
        raise UserError(f"compare: the runs are of different tasks ({', '.join(sorted(tasks))})")
    paired = Paired(runs, _common_seeds(runs))
    for run in runs:
        _require_one_arm(run, paired.seeds)
    for run in runs[1:]:
        _require_unchanged_texts(runs[0], run, paired.seeds)
    said = dict.fromkeys(note for run in runs for seed in paired.seeds for note in run.records[seed].notes)
    paired.notes += said
    paired.notes += [note for run in runs for note in _seed_notes(run, paired.seeds)]
    names = _common_domains(paired)
    for number, name in enumerate(names):
        progress(f"reading {name}", number, len(names))
        paired.domains.append(_read_domain(paired, name))
    paired.notes += [note for run in runs[1:] for note in _differences(runs[0], run, paired.seeds)]
    return paired


def _common_seeds(runs: list[Run]) -> list[int]:
    seeds = sorted(set.intersection(*(set(run.records) for run in runs)))
    if not seeds:
        have = "; ".join(f"{run.name}: {', '.join(map(str, run.records))}" for run in runs)
        raise UserError(f"compare: the runs have no finished seed in common ({have}); run the same --seeds for all")
    return seeds


def _seed_notes(run: Run, seeds: list[int]) -> list[str]:
    notes = [*run.notes]
    if run.unfinished:
        notes.append(f"{run.name}: seeds not finished and left out: {', '.join(map(str, run.unfinished))}")
    alone = sorted(set(run.records) - set(seeds))
    if alone:
        notes.append(f"{run.name}: seeds left out because another run lacks them: {', '.join(map(str, alone))}")
    return notes


def _common_domains(paired: Paired) -> list[str]:
    """Test domains that every seed of every run was scored on, in the order of the first run."""
    scored = [run.scores(seed) for run in paired.runs for seed in paired.seeds]
    seen = list(dict.fromkeys(name for scores in scored for name, s in scores.items() if s.role != VALIDATION))
    common = [name for name in seen if all(name in scores for scores in scored)]
    for name in seen:
        if name not in common:
            lacking = [run.name for run in paired.runs if any(name not in run.scores(s) for s in paired.seeds)]
            paired.notes.append(f"domain {name} left out: not scored for {', '.join(lacking)}")
    if not common:
        raise UserError("compare: the runs were scored on no test domain in common; run them with the same --domains")
    same = [name for name in common if _is_same_set(paired, name)]
    paired.notes += [
        f"domain {name} left out: its texts changed between the runs" for name in common if name not in same
    ]
    if not same:
        raise UserError("compare: the test texts changed between the runs; run them again on the same data")
    return same


def _is_same_set(paired: Paired, name: str) -> bool:
    """Whether all runs were scored on the same texts, as far as digests tell: limits leave different ones."""
    digests: dict[Any, set[str]] = {}
    for record in (run.records[seed] for run in paired.runs for seed in paired.seeds):
        if record.data and name in record.data.sets:
            digests.setdefault(record.settings.get("test_limit"), set()).add(record.data.sets[name])
    return all(len(of_limit) == 1 for of_limit in digests.values())


def _read_domain(paired: Paired, name: str) -> DomainTable:
    scores = {run.name: [run.scores(seed)[name] for seed in paired.seeds] for run in paired.runs}
    kinds = {(score.role, score.metric) for of_run in scores.values() for score in of_run}
    if len(kinds) > 1:
        raise UserError(f"compare: domain {name} was scored differently: {sorted(kinds)}")
    found = {run.name: [run.predictions(seed, name) for seed in paired.seeds] for run in paired.runs}
    everyone = [predictions for of_run in found.values() for predictions in of_run]
    ids = reduce(_intersect, (predictions.ids_N for predictions in everyone))
    if len(ids) == 0:
        raise UserError(f"compare: domain {name}: the runs have no example in common; run them on the same data")
    most = max(len(predictions.ids_N) for predictions in everyone)
    if len(ids) < most:
        paired.notes.append(f"domain {name}: {len(ids)} examples of up to {most} were scored in every run; those count")
    found = {run: [p if len(p.ids_N) == len(ids) else p.take(ids) for p in of_run] for run, of_run in found.items()}
    labels_N = found[paired.runs[0].name][0].labels_N
    for run, of_run in found.items():
        if any(not np.array_equal(predictions.labels_N, labels_N) for predictions in of_run):
            raise UserError(f"compare: domain {name}: {run} has other labels for the same examples; the data differ")
    role, metric = kinds.pop()
    table = {run: np.stack([p.predictions_N for p in of_run]) for run, of_run in found.items()}
    return DomainTable(name, role, metric, labels_N, table, max(predictions.classes for predictions in everyone))


def _intersect(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return left if np.array_equal(left, right) else np.intersect1d(left, right, assume_unique=True)


def _require_one_arm(run: Run, seeds: list[int]) -> None:
    """Raise `UserError` where seeds of one folder were made with different settings."""
    first = _facts(run.records[seeds[0]])
    if len({record.data.train for record in map(run.records.get, seeds) if record.data}) > 1:
        raise UserError(f"compare: {run.folder} mixes runs: its seeds were trained on different texts; run them again")
    for seed in seeds[1:]:
        other = _facts(run.records[seed])
        for key in sorted((first.keys() & other.keys()) - set(ENVIRONMENT)):  # older records lack younger settings
            if first[key] != other[key]:
                raise UserError(
                    f"compare: {run.folder} mixes runs: seed {seed} has {key} {other[key]}, seed {seeds[0]} has "
                    f"{first[key]}; give each its own folder"
                )


def _require_unchanged_texts(baseline: Run, run: Run, seeds: list[int]) -> None:
    """Raise `UserError` where the same settings led to other training texts. Other settings are a note's matter."""
    first, other = baseline.records[seeds[0]], run.records[seeds[0]]
    if any(located(first.settings).get(key) != located(other.settings).get(key) for key in TEXTS):
        return
    if len({record.data.train for r in (baseline, run) for s in seeds if (record := r.records[s]).data}) > 1:
        raise UserError(
            f"compare: {run.name} was trained on other texts than {baseline.name}, though with the same settings: the "
            "data changed in between; run one of them again"
        )


def _differences(baseline: Run, run: Run, seeds: list[int]) -> list[str]:
    """What else than the method tells a run from the baseline: each item is a possible confound."""
    first, other = _facts_over(baseline, seeds), _facts_over(run, seeds)
    differing = [
        f"{key} {other.get(key)} ({baseline.name}: {first.get(key)})"
        for key in sorted({*first, *other} - {"method"})
        if first.get(key) != other.get(key)
    ]
    return [f"{run.name} differs from {baseline.name} in {', '.join(differing)}"] if differing else []


def _facts_over(run: Run, seeds: list[int]) -> dict[str, str]:
    """Key → value, or values where seeds were made in different environments."""
    facts = [_facts(run.records[seed]) for seed in seeds]
    keys = dict.fromkeys(key for of_seed in facts for key in of_seed)
    return {key: " and ".join(dict.fromkeys(str(of_seed.get(key)) for of_seed in facts)) for key in keys}


def _facts(record: Record) -> dict[str, Any]:
    named = {"model": record.model} | record.settings
    facts = {key: value for key, value in located(named).items() if key not in NOT_CONFOUNDS}
    facts |= {"method": record.method, "tuning": record.tuning}
    facts |= {"training texts": record.train_examples}
    return facts | {key: getattr(record, key) for key in ENVIRONMENT}
