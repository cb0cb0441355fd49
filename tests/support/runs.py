"""Run folders as `emoe finetune` writes them, made up: the size of the effect and of both kinds of chance is known.

Each example has a difficulty that all runs share, each run an ability; a run is right where its ability, the example's
easiness and a bit of luck add up to more than zero. Two arms of a seed share the seed's part of the ability.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from scipy.stats import norm

from emoe.evaluation.compare import compare
from emoe.evaluation.runs import read_runs

RESAMPLES = 200
DOMAINS = {"movies": "id-test", "amazon": "ood", "tweets": "ood"}


def truth(domain: str, examples: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels (two classes, 4 in 10 positive) and easiness; the same for every run."""
    generator = np.random.default_rng([examples, len(domain), ord(domain[0])])
    labels = (generator.random(examples) < 0.4).astype(int)
    return labels, generator.normal(0, 1, examples)


def answers(domain: str, examples: int, seed: int, arm: int, effect: float, seed_spread: float) -> np.ndarray:
    """Predictions of one run.

    Args:
        effect: added to the arm's ability, in standard deviations of easiness.
        seed_spread: standard deviation over seeds of an arm's ability.
    """
    labels, easiness = truth(domain, examples)
    shared = np.random.default_rng([seed, 77]).normal(0, 0.1)
    own = np.random.default_rng([seed, arm, 78]).normal(0, seed_spread)
    luck = np.random.default_rng([seed, arm, len(domain), ord(domain[0])]).normal(0, 0.5, examples)
    ability = norm.ppf(0.8) + effect + shared + own
    return np.where(ability + easiness + luck > 0, labels, 1 - labels)


def balanced_accuracy(labels: np.ndarray, predictions: np.ndarray) -> float:
    """The obvious way."""
    return float(np.mean([np.mean(predictions[labels == c] == c) for c in np.unique(labels)]))


def write_run(
    folder: Path,
    arm: int = 0,
    effect: float = 0.0,
    seeds: range | list[int] = range(5),
    domains: dict[str, str] = DOMAINS,
    examples: int = 200,
    seed_spread: float = 0.05,
    readings: tuple[str, ...] = ("as-trained",),
    shuffle: int | None = None,
    validation: float | None = None,
    **record,
) -> Path:
    """A run folder. ``shuffle`` writes examples in another order; ``record`` overrides fields of run.json."""
    for seed in seeds:
        scores = {}
        if validation is not None:
            scores["movies-validation"] = _score("id-validation", 100, validation + 0.001 * seed)
        for domain, role in domains.items():
            labels, _ = truth(domain, examples)
            said = answers(domain, examples, seed, arm, effect, seed_spread)
            for reading in readings:
                path = folder / f"seed-{seed}" / "predictions" / reading / f"{domain}.jsonl"
                write_predictions(path, labels, said, shuffle)
            scores[domain] = _score(role, examples, balanced_accuracy(labels, said))
        values = {
            "task": "sentiment",
            "model": "tiny",
            "method": folder.name,
            "tuning": "full",
            "seed": seed,
            "settings": {"learning_rate": 1e-4, "method": folder.name, "seed": seed},
            "steps": 100,
            "selected_step": 80,
            "seconds": 60.0 + seed,
            "seconds_per_step": 0.6,
            "peak_memory_bytes": 2**30,
            "trainable_parameters": 22_000_000,
            "train_examples": 2000,
            "duplicates_removed": {"amazon": 3},
            "hardware": "a test",
            "torch": "2",
            "transformers": "5",
            "emoe": "0",
            "readings": dict.fromkeys(readings, scores),
        }
        (folder / f"seed-{seed}" / "run.json").write_text(json.dumps(values | record))
    return folder


def _score(role: str, examples: int, score: float) -> dict:
    metrics = {"balanced_accuracy": score}
    return {"role": role, "metric": "balanced_accuracy", "examples": examples, "score": score, "metrics": metrics}


def write_predictions(path: Path, labels: np.ndarray, said: np.ndarray, shuffle: int | None = None) -> None:
    """One file of predictions with ids ``x0``, ``x1``, …"""
    path.parent.mkdir(parents=True, exist_ok=True)
    order = np.arange(len(labels)) if shuffle is None else np.random.default_rng(shuffle).permutation(len(labels))
    lines = [
        json.dumps({"id": f"x{i}", "label": labels[i].item(), "prediction": said[i].item(), "scores": [0.1, 0.9]})
        for i in order
    ]
    path.write_text("\n".join(lines) + "\n")


def compared(*folders, **options):
    """What `emoe compare` finds in these run folders."""
    return compare(read_runs([str(f) for f in folders]), resamples=RESAMPLES, **options)
