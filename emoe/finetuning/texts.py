"""Examples as token ids, batches of them, and scores from logits: one object for each kind of task.

Legend: B examples, T tokens, C classes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn import functional as F

from emoe.errors import UserError
from emoe.families import most_positions
from emoe.tasks.metrics import compute, perplexity
from emoe.tasks.spec import Example, Task

Encoded = dict[str, Any]
IGNORED = -100
"""Label of a token that the loss leaves out."""


class Classification:
    """One label, or one number, for a text or a pair of texts."""

    def __init__(self, task: Task, tokenizer: Any, max_length: int) -> None:
        self.task, self.tokenizer, self.max_length = task, tokenizer, max_length
        self.regression = task.kind == "regression"
        self.collate = transformers.DataCollatorWithPadding(tokenizer)

    def encode(self, examples: Sequence[Example]) -> list[Encoded]:
        """Token ids and label of each example, in their order."""
        pairs = [example.pair for example in examples] if examples[0].pair is not None else None
        found = self.tokenizer([e.text for e in examples], pairs, truncation=True, max_length=self.max_length)
        rows = [dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True)]
        convert = float if self.regression else int
        return [row | {"labels": convert(e.label)} for row, e in zip(rows, examples, strict=True)]

    def loss_sum(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Summed loss of a batch, and over how many labels."""
        if self.regression:
            return F.mse_loss(logits.float().squeeze(-1), labels.float(), reduction="sum"), len(labels)
        return F.cross_entropy(logits.float(), labels, reduction="sum"), len(labels)

    def scores(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """What is kept of a batch, (B, C) fp32: the logits."""
        return logits.float()

    def records(self, examples: Sequence[Example], scores: np.ndarray) -> list[dict[str, Any]]:
        """One line of the file of predictions for each example."""
        if self.regression:
            predictions: list = scores[:, 0].tolist()
        else:
            predictions = scores.argmax(1).tolist()
        rows = zip(examples, predictions, scores.tolist(), strict=True)
        return [{"id": e.id, "label": e.label, "prediction": p, "scores": s} for e, p, s in rows]

    def metrics(self, records: Sequence[dict[str, Any]]) -> dict[str, float]:
        """The task's metrics, the score first."""
        labels, predictions = [r["label"] for r in records], [r["prediction"] for r in records]
        return compute(self.task.metrics, labels, predictions, len(self.task.labels))


class Instructions(Classification):
    """A prompt and its answer; the loss is on the answer only. Its label is how many tokens the answer has, its
    prediction how many of them were the likeliest, its scores the answer's negative log-likelihood in nats."""

    def __init__(self, task: Task, tokenizer: Any, max_length: int) -> None:
        super().__init__(task, tokenizer, max_length)
        if tokenizer.eos_token_id is None:
            raise UserError("--model: its tokenizer has no end token, which an answer to an instruction ends with")
        self.collate = transformers.DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)

    def encode(self, examples: Sequence[Example]) -> list[Encoded]:
        rows = []
        for example in examples:
            prompt = self.tokenizer(example.text).input_ids
            while prompt and prompt[-1] == self.tokenizer.eos_token_id:  # some tokenizers close every text
                prompt.pop()
            answer = [*self.tokenizer(example.pair, add_special_tokens=False).input_ids, self.tokenizer.eos_token_id]
            ids = [*prompt, *answer][: self.max_length]
            labels = [*([IGNORED] * len(prompt)), *answer][: self.max_length]
            rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
        if all(label == IGNORED for row in rows for label in row["labels"]):
            raise UserError(f"--max-length: {self.max_length} tokens cut off every answer; give more")
        return rows

    def loss_sum(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, int]:
        wanted_N = labels[:, 1:].flatten()
        kept_N = wanted_N != IGNORED
        chosen_NV = logits[:, :-1].flatten(0, 1)[kept_N].float()
        return F.cross_entropy(chosen_NV, wanted_N[kept_N], reduction="sum"), int(kept_N.sum())

    def scores(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """(B, 3): tokens of the answer, how many are the likeliest, summed negative log-likelihood."""
        logits_BTV, wanted_BT = logits[:, :-1].float(), labels[:, 1:]
        kept_BT = wanted_BT != IGNORED
        nats_BT = F.cross_entropy(logits_BTV.transpose(1, 2), wanted_BT, ignore_index=IGNORED, reduction="none")
        right_BT = (logits_BTV.argmax(-1) == wanted_BT) & kept_BT
        return torch.stack([kept_BT.sum(1).float(), right_BT.sum(1).float(), nats_BT.sum(1)], 1)

    def records(self, examples: Sequence[Example], scores: np.ndarray) -> list[dict[str, Any]]:
        rows = zip(examples, scores.tolist(), strict=True)
        return [{"id": e.id, "label": int(n), "prediction": int(right), "scores": [s]} for e, (n, right, s) in rows]

    def metrics(self, records: Sequence[dict[str, Any]]) -> dict[str, float]:
        nats, tokens = sum(r["scores"][0] for r in records), sum(r["label"] for r in records)
        return super().metrics(records) | {"perplexity": perplexity(nats, tokens)}


def usable_length(facts: Any, max_length: int) -> tuple[int, list[str]]:
    """Tokens of an example that a model of this config has positions for, and what to tell the user about it."""
    longest = most_positions(facts)
    if longest is None or max_length <= longest:
        return max_length, []
    return longest, [f"--max-length lowered from {max_length} to the model's {longest}"]


def texts_of(task: Task, tokenizer: Any, max_length: int) -> Classification:
    """The object that encodes and scores this task."""
    kind = Instructions if task.kind == "instructions" else Classification
    return kind(task, tokenizer, max_length)
