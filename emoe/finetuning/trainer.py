"""The loop: transformers' Trainer. Ours are the loss and the log with what the routers did.

Legend: B examples, T tokens.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from emoe.conversion.convert import Progress
from emoe.errors import UserError
from emoe.finetuning.base import BaseTrainer, shared_arguments
from emoe.finetuning.routing import Probe, auxiliary_loss, watched
from emoe.finetuning.settings import FinetuneConfig
from emoe.finetuning.texts import Classification, Encoded
from emoe.plainfiles import read_json
from emoe.runtime import peak_memory, reset_peak_memory, write_text

SELECTED_BY = "eval_score"
"""Name under which the Trainer finds the score of the ID validation set; nothing else selects."""


COST = "emoe_cost.json"


class Rows(torch.utils.data.Dataset):
    """Encoded examples as the Trainer wants them."""

    def __init__(self, rows: list[Encoded]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Encoded:
        return self.rows[index]


class LikeLengths(LengthGroupedSampler):
    """Examples of like length side by side, in an order that only the seed and the epoch decide.

    transformers' own draws from the global generator, which arms with and without dropout leave in different states.
    """

    def __init__(self, batch_size: int, rows: Rows, seed: int) -> None:
        lengths = [len(row["input_ids"]) for row in rows.rows]
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader before each epoch, also of a resumed run."""
        self.epoch = epoch

    def __iter__(self):
        self.generator.manual_seed(self.seed * 1_000_003 + self.epoch)
        return super().__iter__()


class Tuner(BaseTrainer):
    """Trainer with the loss of a task plus those on gates.

    A step's loss is the mean over all its labels, whatever forward calls and processes they were spread over: the sum
    of a forward call is divided by the labels of the whole step, and multiplied by the processes, over which gradients
    are averaged afterwards.

    Args:
        group_by_length: of training; the Trainer's own setting would also reorder what is evaluated, and its answers.
    """

    def __init__(
        self,
        *args: Any,
        texts: Classification,
        losses: dict[str, float],
        probe: Probe | None,
        watch: Watch | None = None,
        group_by_length: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.texts, self.losses, self.probe, self.watch = texts, losses, probe, watch
        self.group_by_length = group_by_length
        self.model_accepts_loss_kwargs = True  # has the Trainer count labels and leave the scale of the loss to us

    def _get_train_sampler(self, train_dataset=None):
        if not self.group_by_length:
            return super()._get_train_sampler(train_dataset)
        examples = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LikeLengths(examples, self.train_dataset, self.args.data_seed)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        if self.losses:
            with watched(model) as routings:
                outputs = model(**inputs)
        else:
            outputs = model(**inputs)
        total, count = self.texts.loss_sum(outputs.logits, labels)
        if num_items_in_batch is None:
            loss = total / max(1, count)
        else:
            loss = total / max(1, int(num_items_in_batch)) * self.accelerator.num_processes  # answers may be cut off
        if self.losses and routings:
            extra = auxiliary_loss(self.losses, routings, inputs["attention_mask"])
            loss = loss + extra / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels")
        with torch.no_grad():
            scores = self.texts.scores(model(**inputs).logits, labels)
        return None, scores, torch.zeros(len(scores), device=scores.device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.probe is not None:
            unwrapped = self.accelerator.unwrap_model(self.model)
            found = self.probe(self.model_wrapped if self.args.fsdp else self.model, unwrapped.config.emoe_layers)
            if found:
                logs["router"] = found
        super().log(logs, start_time)

    def _save_checkpoint(self, model, trial):
        if self.args.should_save:  # before the file that makes the state a complete one
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            for part in (self.probe, self.watch):
                if part is not None:
                    part.save(folder)
        super()._save_checkpoint(model, trial)


class Log(TrainerCallback):
    """log.jsonl: one line a logged step or validation. Lines beyond the state that a run resumes from are dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        old = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        kept = [line for line in old if _step_of(line) <= state.global_step]
        write_text(self.path, "".join(f"{line}\n" for line in kept))

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs = logs or {}
        names = {"loss": "loss", "learning_rate": "lr", "grad_norm": "grad_norm", "epoch": "epoch", "router": "router"}
        names[SELECTED_BY] = "validation"
        entry = {"step": state.global_step, **{names[key]: value for key, value in logs.items() if key in names}}
        if state.is_world_process_zero and ("loss" in entry or "validation" in entry):
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")


def _step_of(line: str) -> float:
    """Step of a line of log.jsonl; none is as late as that of a line which a killed process left unfinished."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf


class Watch(TrainerCallback):
    """Progress, and cost: of a resumed run, what led to the state that it goes on from counts as well."""

    def __init__(self, progress: Progress, label: str) -> None:
        self.progress, self.label, self.shown = progress, label, label
        self.seconds, self.steps, self._start = 0.0, 0, 0.0
        """Training without validations."""
        self._begun, self._before, self._peak_before = time.perf_counter(), 0.0, 0
        reset_peak_memory()

    @property
    def elapsed(self) -> float:
        """Seconds of the whole run."""
        return self._before + time.perf_counter() - self._begun

    @property
    def peak_bytes(self) -> int:
        """Most memory of the run, the GPU's where there is one."""
        now = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_memory()
        return max(self._peak_before, now)

    def save(self, folder: Path) -> None:
        """Keep the cost so far with the state that a run may go on from."""
        facts = {"seconds": self.seconds, "steps": self.steps, "elapsed": self.elapsed, "peak_bytes": self.peak_bytes}
        write_text(folder / COST, json.dumps(facts))

    def load(self, folder: Path) -> None:
        """Go on from there."""
        if (folder / COST).is_file():
            facts = read_json(folder / COST, "--resume")
            self.seconds, self.steps = facts["seconds"], facts["steps"]
            self._before, self._peak_before = facts["elapsed"], facts["peak_bytes"]

    def on_step_begin(self, args, state, control, **kwargs):
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.perf_counter() - self._start
        self.steps += 1
        self.progress(self.shown, state.global_step, state.max_steps)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.shown = f"{self.label}, loss {logs['loss']:.3f}"
        if logs and SELECTED_BY in logs:
            self.shown = f"{self.label}, validation {100 * logs[SELECTED_BY]:.1f}"


def arguments(config: FinetuneConfig, folder: Path, seed: int, processes: int) -> TrainingArguments:
    """The Trainer's settings of one run."""
    on_cpu = not torch.cuda.is_available()
    steps = {"max_steps": config.max_steps} if config.max_steps else {"num_train_epochs": config.epochs}
    each = "steps" if config.eval_steps else "epoch"
    fsdp = {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}
    return TrainingArguments(
        output_dir=str(folder),
        **steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=2 * config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.rate(),
        lr_scheduler_type=config.schedule if config.schedule != "constant" else "constant_with_warmup",
        warmup_steps=config.warmup,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        ddp_backend="gloo" if on_cpu and processes > 1 else None,
        ddp_find_unused_parameters=False,
        logging_steps=config.log_steps,
        eval_strategy=each,
        save_strategy=each,
        eval_steps=config.eval_steps,
        save_steps=config.eval_steps or 500,
        load_best_model_at_end=True,
        restore_callback_states_from_checkpoint=True,  # how often --patience has been tried
        metric_for_best_model=SELECTED_BY,
        greater_is_better=True,
        seed=seed,
        data_seed=seed,
        label_names=["labels"],
        **shared_arguments(config.precision),
        **(fsdp if config.fsdp else {}),
    )


def scorer(model: torch.nn.Module, texts: Classification, batch_size: int, precision: str, folder: Path) -> Tuner:
    """A Trainer that only predicts."""
    shared = shared_arguments(precision)
    settings = TrainingArguments(output_dir=str(folder), per_device_eval_batch_size=batch_size, **shared)
    return Tuner(model=model, args=settings, data_collator=texts.collate, texts=texts, losses={}, probe=None)


def make_tuner(
    config: FinetuneConfig,
    model: torch.nn.Module,
    texts: Classification,
    train: list[Encoded],
    validation: tuple[list, list[Encoded]],
    folder: Path,
    seed: int,
    processes: int,
    watch: Watch,
) -> Tuner:
    """A Trainer for one run.

    Args:
        validation: examples and their encoding, in the same order.
        folder: of the run; the Trainer's states lie in ``folder/.training``, the log in ``folder/log.jsonl``.
    """
    examples, rows = validation
    batch = texts.collate([dict(row) for row in rows[:32]])

    def metrics(prediction) -> dict[str, float]:
        found = texts.metrics(texts.records(examples, np.asarray(prediction.predictions)))
        return {"score": next(iter(found.values()))}

    callbacks: list[TrainerCallback] = [watch, Log(folder / "log.jsonl")]
    if config.patience:
        callbacks.append(transformers.EarlyStoppingCallback(config.patience))
    if config.tensorboard:
        callbacks.append(_tensorboard(folder / "tensorboard"))
    return Tuner(
        model=model,
        args=arguments(config, folder / ".training", seed, processes),
        train_dataset=Rows(train),
        eval_dataset=Rows(rows),
        data_collator=texts.collate,
        compute_metrics=metrics,
        callbacks=callbacks,
        texts=texts,
        losses=config.losses(),
        probe=Probe(dict(batch)),
        watch=watch,
        group_by_length=config.group_by_length,
    )


def _tensorboard(folder: Path) -> TrainerCallback:
    from transformers.integrations import TensorBoardCallback

    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise UserError("--tensorboard: needs the package tensorboard; pip install tensorboard") from None

    class Scalars(TensorBoardCallback):
        """Tables of routers do not fit a curve: their entropy, largest share and overlap do."""

        def on_log(self, args, state, control, logs=None, **kwargs):
            flat = dict(logs or {})
            for layer, facts in flat.pop("router", {}).items():
                for key in ("entropy", "max_share", "overlap"):
                    if facts[key] is not None and math.isfinite(facts[key]):
                        flat[f"router_{layer}_{key}"] = facts[key]
            super().on_log(args, state, control, logs=flat, **kwargs)

    return Scalars(SummaryWriter(str(folder)))
