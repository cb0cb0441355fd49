"""Tuned weights, read in more than one way, and scored on every set.

As-trained; `dense`: all experts on, which is the paper's EMoE2dense; `emoe`: the weights of a dense arm with the K
experts of largest logit, LoRA2EMoE in the paper.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from emoe.conversion.convert import Progress
from emoe.errors import UserError
from emoe.finetuning.arms import Arm
from emoe.finetuning.model import Start
from emoe.finetuning.texts import Classification
from emoe.finetuning.trainer import Rows, Tuner
from emoe.runtime import write_text
from emoe.tasks.data import TaskData
from emoe.tasks.spec import Example

AS_TRAINED, DENSE, EMOE = "as-trained", "dense", "emoe"
Predictions = dict[str, dict[str, list[dict[str, Any]]]]
"""Reading → domain → one record an example."""


def budgets(arm: Arm, num_experts: int, top_k: int) -> Iterator[tuple[str, int]]:
    """Readings that an arm has, each with its number of experts a token."""
    if arm.copied:  # copies of a whole FFN are not parts of one
        yield AS_TRAINED, top_k
    elif arm.sparse:
        yield AS_TRAINED, top_k
        yield DENSE, num_experts
    else:
        yield AS_TRAINED, num_experts
        yield EMOE, top_k


def budget_of(reading: str, arm: Arm, num_experts: int, top_k: int) -> int:
    """Experts a token of a reading; raises `UserError` where the arm has none of that name."""
    own = dict(budgets(arm, num_experts, top_k))
    if reading not in own:
        if reading != arm.reading:
            raise UserError(f"--read-as: a model of method '{arm.name}' cannot be read as '{reading}'")
        return own[AS_TRAINED]
    return own[reading]


def predict(tuner: Tuner, texts: Classification, examples: list[Example]) -> list[dict[str, Any]]:
    """Records of examples in their order; computed in order of length, which saves padding."""
    encoded = texts.encode(examples)
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]["input_ids"]))
    tuner.compute_metrics = None
    scores = tuner.predict(Rows([encoded[i] for i in order])).predictions
    back = scores.copy()
    back[order] = scores
    return texts.records(examples, back)


def read_all(
    tuner: Tuner, start: Start, arm: Arm, data: TaskData, progress: Progress
) -> tuple[dict[str, Any], Predictions]:
    """Scores of every reading and set, and the raw predictions; the model is left as it was trained."""
    model, texts = start.model, tuner.texts
    as_trained = model.config.num_experts_per_tok
    readings: dict[str, Any] = {}
    predictions: Predictions = {}
    wanted = list(budgets(arm, model.config.num_experts, start.top_k))
    for number, (reading, top_k) in enumerate(wanted):
        model.set_top_k(top_k)
        readings[reading], predictions[reading] = {}, {}
        for done, (name, test) in enumerate(data.tests.items()):
            progress(f"scoring {name}, {reading}", number * len(data.tests) + done, len(wanted) * len(data.tests))
            records = predict(tuner, texts, test.examples)
            readings[reading][name] = {"role": test.role, **score(texts, records)}
            predictions[reading][name] = records
    model.set_top_k(as_trained)
    return readings, predictions


def score(texts: Classification, records: list[dict[str, Any]]) -> dict[str, Any]:
    """What a run's record says of one set, without its role."""
    metrics = texts.metrics(records)
    metric, value = next(iter(metrics.items()))
    return {"metric": metric, "examples": len(records), "score": value, "metrics": metrics}


def write_predictions(folder: Path, predictions: Predictions) -> None:
    """One file for each reading and set."""
    for reading, sets in predictions.items():
        (folder / reading).mkdir(parents=True, exist_ok=True)
        for name, records in sets.items():
            write_text(folder / reading / f"{name}.jsonl", "".join(json.dumps(r) + "\n" for r in records))
