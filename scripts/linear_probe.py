"""What a frozen model knows of a task already: a logistic regression on its last hidden states, scored on every domain.

The yardstick that a fine-tuned model should clear. Scored on whole test sets, and on those texts of them that
``--test-limit`` gives a comparison, since a few hundred texts can be easier or harder than the rest.

    python scripts/linear_probe.py --model smollm2-135m --task sentiment --train-limit 1500 --test-limit 200

Legend: B texts, T tokens, D model width.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoModel, AutoTokenizer

from emoe import tasks
from emoe.assets.resolve import resolve_model
from emoe.cli.progress import silence_libraries
from emoe.errors import UserError
from emoe.tasks.data import load_task
from emoe.tasks.spec import Example

BATCH = 32


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--task", default="sentiment")
    parser.add_argument("--train-limit", type=int, default=1500, help="texts")
    parser.add_argument("--test-limit", type=int, default=200, help="texts of each domain that are also scored apart")
    parser.add_argument("--most", type=int, default=2000, help="texts of a domain")
    parser.add_argument("--max-length", type=int, default=128, help="tokens a text")
    given = parser.parse_args()
    silence_libraries()
    task = tasks.get(given.task)
    if task.kind != "classification":
        raise UserError(f"--task: a probe needs classes, and '{task.name}' is of the kind {task.kind}")
    folder = resolve_model(given.model).folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.pad_token or tokenizer.eos_token, "right"
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()

    data = load_task(task, train_limit=given.train_limit, test_limit=given.most)
    few = load_task(task, train_limit=given.train_limit, test_limit=given.test_limit).tests

    def states_of(examples: Sequence[Example], what: str) -> dict[str, np.ndarray]:
        return hidden_states(model, tokenizer, examples, given.max_length, what)

    labels = [example.label for example in data.train]
    probes = {pooling: fit(x_BD, labels) for pooling, x_BD in states_of(data.train, "training").items()}
    print("balanced accuracy in percent, of the last token's state and of the mean over tokens")
    print(f"{'domain':<20} {'texts':>6} {'last':>6} {'mean':>6} {'texts':>6} {'last':>6} {'mean':>6}")
    for name, test in data.tests.items():
        labels = np.array([example.label for example in test.examples])
        said = {pooling: probes[pooling].predict(x_BD) for pooling, x_BD in states_of(test.examples, name).items()}
        chosen = {example.id for example in few[name].examples}
        apart = np.array([example.id in chosen for example in test.examples])
        cells = []
        for scored in (np.ones_like(apart), apart):
            cells.append(f"{int(scored.sum()):6}")
            cells += [
                f"{100 * balanced_accuracy_score(labels[scored], said[p][scored]):6.1f}" for p in ("last", "mean")
            ]
        print(f"{name:<20} {' '.join(cells)}", flush=True)
    return 0


def fit(x_BD: np.ndarray, labels: Sequence[int]) -> GridSearchCV:
    """A logistic regression whose penalty is chosen by cross-validation on the training texts."""
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    penalties = {"logisticregression__C": np.logspace(-5, 0, 11)}
    return GridSearchCV(pipeline, penalties, scoring="balanced_accuracy", cv=5).fit(x_BD, labels)


@torch.inference_mode()
def hidden_states(
    model: torch.nn.Module, tokenizer, examples: Sequence[Example], max_length: int, what: str
) -> dict[str, np.ndarray]:
    """Last hidden states of the texts, (B, D) fp32, by pooling: of the last token, and the mean over tokens."""
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].text))
    last, mean = [], []
    for start in track(range(0, len(order), BATCH), description=what, console=Console(stderr=True)):
        chosen = order[start : start + BATCH]
        texts = [examples[index].text for index in chosen]
        pairs = [examples[index].pair for index in chosen] if examples[0].pair is not None else None
        batch = tokenizer(texts, pairs, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
        hidden_BTD, mask_BT = model(**batch).last_hidden_state, batch["attention_mask"]
        last.append(hidden_BTD[torch.arange(len(chosen)), mask_BT.sum(1) - 1])
        mean.append((hidden_BTD * mask_BT[..., None]).sum(1) / mask_BT.sum(1, keepdim=True))
    back = np.argsort(order)
    return {pooling: torch.cat(rows).numpy()[back] for pooling, rows in (("last", last), ("mean", mean))}


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"linear_probe: {error}", file=sys.stderr)
        sys.exit(2)
