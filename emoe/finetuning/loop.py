"""What trainings on plain text have in common: data, states to resume from, the watch, the settings."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

from emoe.checkpoint.companions import check_companions
from emoe.checkpoint.digests import check_digests
from emoe.conversion.resuming import Work
from emoe.conversion.workspace import Workspace
from emoe.distributed import Group
from emoe.errors import UserError
from emoe.finetuning.base import BaseTrainer, shared_arguments
from emoe.finetuning.states import same_settings, states, train_from
from emoe.runtime import write_text
from emoe.surgery.history import now
from emoe.surgery.usage import fit_length
from emoe.tasks.metrics import perplexity

Progress = Callable[[str, int, int], None]

SECONDS = "emoe_seconds"
"""Name among the callbacks' states that the Trainer keeps: seconds of training so far, those before a resume too."""

LOG = "log.jsonl"

TRAINED_ON = "training domain"
"""What the perplexity on the end of --text, kept apart, is called."""


class Sequences(torch.utils.data.Dataset):
    """Token blocks as the Trainer wants them."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index]}


class Watch(TrainerCallback):
    """Progress, the time limit and the time that training takes."""

    def __init__(self, config: Any, progress: Progress) -> None:
        self.config, self.progress, self.start = config, progress, time.perf_counter()
        self.shown, self.begun = "training", self.start

    def on_train_begin(self, args, state, control, **kwargs):
        self.begun = time.perf_counter() - state.stateful_callbacks.get(SECONDS, 0.0)

    def on_train_end(self, args, state, control, **kwargs):
        state.stateful_callbacks[SECONDS] = time.perf_counter() - self.begun

    def on_log(self, args, state, control, logs=None, **kwargs):
        loss = (logs or {}).get("loss")
        if loss is not None:
            self.shown = f"loss {loss:.3f}"

    def on_step_end(self, args, state, control, **kwargs):
        state.stateful_callbacks[SECONDS] = time.perf_counter() - self.begun
        self.progress(self.shown, state.global_step, self.config.steps)
        if self.config.minutes and time.perf_counter() - self.start > 60 * self.config.minutes:
            control.should_training_stop = True


def fit_sequences(config: Any, folder: Path) -> tuple[Any, list[str]]:
    """The settings with sequences that the model has positions for, and what to tell the user about it.

    Raises:
        UserError: the folder holds no model that transformers knows.
    """
    length, notes = fit_length(folder, config.sequence_length)
    return config.model_copy(update={"sequence_length": length}), notes


def workspace_of(config: Any, folder: Path, what: str, record: str) -> Workspace:
    """Where a training writes; the arguments are those of `training_into`. What is finished needs its model no more."""
    work = Work(what, fit_sequences(config, folder)[0] if (folder / "config.json").is_file() else config, record)
    return Workspace(Path(config.output), folder, resume=config.resume, overwrite=config.overwrite, work=work)


@contextmanager
def training_into(config: Any, folder: Path, what: str, record: str) -> Iterator[tuple[Path, Path]]:
    """The unfinished output and the folder for the Trainer's states; the output appears when the block ends well.

    Args:
        config: settings with output, resume and overwrite.
        folder: the model that is trained; its weights are checked against their digests.
        what: the kind of run, for messages: "recovery".
        record: file of a finished output with its settings.

    Raises:
        UserError: several processes, an output in the way, damaged weights, the states of another run, or a disk that
            is full.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        raise UserError(
            f"WORLD_SIZE={processes}: a {what} is the work of one process, start it without torchrun or accelerate; "
            "convert, finetune and pretrain take several"
        )
    now()  # a clock that cannot be read is told before the training, not behind it
    workspace = workspace_of(config, folder, what, record)
    training = workspace.state_folder / "training"
    with workspace.open(Group()):
        try:
            check_digests(folder)
            check_companions(folder)
            same_settings(config.fingerprint(), training, resume=config.resume, what=what)
            yield workspace.folder, training
            workspace.publish()
        except Exception:
            if not states(training):  # nothing is lost
                workspace.abandon()
            raise


def sequences_per_step(config: Any) -> int:
    """Sequences of an optimizer step: as many whole ones as --tokens-per-step holds, at least one."""
    return max(1, config.tokens_per_step // config.sequence_length)


def text_tokens(config: Any, steps: int) -> int:
    """Tokens that so many optimizer steps train on."""
    return steps * sequences_per_step(config) * config.sequence_length


def repeated(config: Any, blocks_BT: torch.Tensor, steps: int) -> list[str]:
    """What there is to say when so many steps read a text of so many blocks more than once."""
    size, read = blocks_BT.numel(), text_tokens(config, steps)
    times = f"{read / size:.1f}"
    return [f"--text has {size:,} tokens to train on, read {times} times"] if float(times) > 1 else []


def arguments(config: Any, work: Path) -> TrainingArguments:
    """The Trainer's settings. No weight decay: what gets no gradient must stay as it is."""
    per_step = sequences_per_step(config)
    # Forward calls of one size: the Trainer takes the mean over them, and any more would be further text.
    batch = next(size for size in range(min(config.batch_sequences, per_step), 0, -1) if per_step % size == 0)
    return TrainingArguments(
        output_dir=str(work),
        max_steps=config.steps,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=per_step // batch,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, config.steps // 20),
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=5,
        save_steps=config.checkpoint_steps,
        seed=config.seed,
        **shared_arguments(config.precision),
    )


def run(trainer: BaseTrainer, work: Path) -> int:
    """Train, from the last state if there is one. Returns the optimizer steps that were made."""
    found = states(work)
    train_from(trainer, found[-1] if found else None)
    trainer.check_weights()
    return trainer.state.global_step


def write_log(trainer: BaseTrainer, folder: Path) -> None:
    """log.jsonl, one line a logged step, without the Trainer's last: times and what came after an interruption."""
    entries = (entry for entry in trainer.state.log_history if "train_runtime" not in entry)
    write_text(folder / LOG, "".join(json.dumps(entry, sort_keys=True) + "\n" for entry in entries))  # as states do


def minutes(trainer: BaseTrainer) -> float:
    """That training has taken, interruptions left out."""
    return round(trainer.state.stateful_callbacks.get(SECONDS, 0.0) / 60, 2)


@torch.no_grad()
def perplexities(model: torch.nn.Module, held_out: dict[str, torch.Tensor]) -> dict[str, float]:
    """Of the next token, by domain; in the type of the weights, also where the Trainer has put autocast around them."""
    model.eval()
    forward, found = getattr(model, "_original_forward", model.forward), {}  # accelerate keeps what it wraps there
    for domain, tokens in held_out.items():
        nats = 0.0
        for sequence in tokens.to(model.device):
            logits = forward(sequence[None], use_cache=False).logits[0, :-1].float()
            nats += torch.nn.functional.cross_entropy(logits, sequence[1:], reduction="sum").item()
        found[domain] = perplexity(nats, tokens.numel() - len(tokens))
    return found


def check_perplexities(found: dict[str, float]) -> None:
    """Raise `UserError` if a trained model answers with what is no number, its weights finite or not."""
    for domain, value in found.items():
        if math.isnan(value):
            raise UserError(
                f"the perplexity of {domain} is nan after training: lower --learning-rate and add --overwrite"
            )
