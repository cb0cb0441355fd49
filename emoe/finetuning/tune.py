"""`emoe finetune`: one arm, some seeds; each seed a folder that `emoe compare` reads.

::

    OUTPUT/seed-S/run.json                             settings, cost and scores; written last, its presence says: done
    OUTPUT/seed-S/predictions/READING/DOMAIN.jsonl     {"id", "label", "prediction", "scores"}, one line an example
    OUTPUT/seed-S/log.jsonl                            one line a logged step
    OUTPUT/seed-S/model/                               the trained checkpoint, or peft's adapter
    OUTPUT/seed-S/.training/                           the Trainer's states, while the run is not done
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

import emoe
from emoe import tasks
from emoe.assets.resolve import check_name
from emoe.checkpoint.given import given_output
from emoe.checkpoint.stored import cast_as_stored, round_as_stored
from emoe.conversion.convert import Progress
from emoe.conversion.resuming import difference_from_record
from emoe.disk import full_disk_told, remove_folder
from emoe.distributed import Group
from emoe.errors import UserError
from emoe.finetuning import arms
from emoe.finetuning.digests import BEGUN, digests_of, require_same_data
from emoe.finetuning.model import build, converted_folder, hide_neurons, load_tokenizer
from emoe.finetuning.readings import read_all, write_predictions
from emoe.finetuning.record import RECORD
from emoe.finetuning.settings import FinetuneConfig, located, names_of
from emoe.finetuning.states import states, train_from
from emoe.finetuning.texts import texts_of, usable_length
from emoe.finetuning.trainer import Watch, make_tuner
from emoe.finetuning.tuning import check_tuning, choose_parameters, freeze, ignored, trainable
from emoe.report.card import write_history_card
from emoe.runtime import processor, remove_unheld, scratch_directory, settle_folder, write_text
from emoe.surgery.history import entry, now
from emoe.tasks.data import TaskData, load_task
from emoe.tasks.spec import Where


def finetune(config: FinetuneConfig, progress: Progress | None = None, say: Any = None) -> list[dict[str, Any]]:
    """Train and score every seed of ``config``. Returns the records, as they stand in the run.json files.

    Args:
        config: the settings.
        progress: called with (stage, done, total).
        say: called with one line on what was left out or fetched.

    Raises:
        UserError: bad settings, data or model, an output in the way or on a full disk, or a loss that is no number.
    """
    progress, say = progress or (lambda stage, done, total: None), say or (lambda line: None)
    arm, task = arms.get(config.method), tasks.get(config.task)
    check_tuning(config, arm, task)
    now()  # a clock that cannot be read is told before the training, not behind it
    for line in ignored(config, arm):
        say(line)
    group = Group()
    output = given_output(config.output)
    if config.fsdp and group.size == 1:
        raise UserError(
            "--fsdp: one process has nobody to share weights with; start several: "
            "accelerate launch --num_processes 2 -m emoe finetune … --fsdp"
        )
    with full_disk_told(output, "add --resume"):
        return _run_all(config, arm, task, group, progress, say)


def _run_all(
    config: FinetuneConfig, arm: arms.Arm, task: tasks.Task, group: Group, progress: Progress, say: Any
) -> list[dict[str, Any]]:
    """`finetune`, once its settings are checked."""
    output, seeds = Path(config.output), config.seed_list()
    group.first_then_all(lambda: _check_output(config, seeds))
    group.first_then_all(lambda: _clear_finished(config, seeds))
    if todo := _left(config, seeds):
        check_name(config.model)
        where = Where(Path(os.path.expanduser(config.data_dir)) if config.data_dir else None, say)
        data = group.first_then_all(lambda: read_data(config, task, where))
        for note in data.notes:
            say(note)
        digests = digests_of(data)
        group.first_then_all(lambda: _check_data(config, seeds, digests))
        work = [output / f".base-{seed}" for seed in todo]  # several calls may share an output, each with its own seeds
        with contextlib.ExitStack() as held:
            group.first_then_all(lambda: [held.enter_context(scratch_directory(w, ".base-*")) for w in work])
            if todo := _left(config, seeds):  # another call may have finished one before we held it
                texts = [example.text for example in data.train]
                base = converted_folder(config, work[0], texts, group, progress)
                facts = transformers.AutoConfig.from_pretrained(base, trust_remote_code=False)
                for note in usable_length(facts, config.max_length)[1]:
                    say(note)
                    data.notes.append(note)
            for seed in todo:
                run = Run(config, arm, data, digests, base, seed, group, progress)
                group.first_then_all(lambda run=run: _prepare(config, run.folder, digests))  # an old run goes only now
                run.finish()
    else:  # a kill may have left what a finished run has no use for
        group.first_then_all(lambda: remove_unheld(output.glob(".base-*")))
    return [json.loads((output / f"seed-{seed}" / RECORD).read_text(encoding="utf-8")) for seed in seeds]


def read_data(config: FinetuneConfig, task: tasks.Task, where: Where) -> TaskData:
    """The examples that runs of these settings train and are scored on."""
    limits = {"train_limit": config.train_limit, "test_limit": config.test_limit}
    return load_task(task, domains=names_of(config.domains), where=where, **limits)


def _left(config: FinetuneConfig, seeds: list[int]) -> list[int]:
    """Seeds to run."""
    return [seed for seed in seeds if config.overwrite or not (Path(config.output) / f"seed-{seed}" / RECORD).is_file()]


def _clear_finished(config: FinetuneConfig, seeds: list[int]) -> None:
    """Remove the states of runs that a kill ended between their record and this."""
    for folder in (Path(config.output) / f"seed-{seed}" for seed in seeds):
        if (folder / RECORD).is_file():
            shutil.rmtree(folder / ".training", ignore_errors=True)


def _check_output(config: FinetuneConfig, seeds: list[int]) -> None:
    """Raise `UserError` when something is in the way that neither --resume nor --overwrite speaks of."""
    output = Path(config.output)
    if os.path.lexists(output) and not output.is_dir():
        raise UserError(f"--output: {output} is a file; choose another name")
    for folder in output.glob("seed-*"):
        if folder.name not in {f"seed-{seed}" for seed in seeds}:
            _same_settings(config, folder, "--output")
    for seed in seeds:
        folder = output / f"seed-{seed}"
        if folder.exists() and any(folder.iterdir()):
            if not (config.resume or config.overwrite):
                raise UserError(
                    f"--output: {folder} exists; add --resume to go on with it or --overwrite to start again"
                )
            ours = (folder / RECORD).is_file() or (folder / ".training").is_dir()
            if not ours:
                raise UserError(f"--output: {folder} is not a run of ours; choose another folder")
            if config.resume and not config.overwrite:
                _same_settings(config, folder, "--resume")


def _check_data(config: FinetuneConfig, seeds: list[int], digests: dict[str, Any]) -> None:
    """A folder holds seeds of the same texts; those that --overwrite replaces do not count."""
    for folder in sorted(Path(config.output).glob("seed-*")):
        ours = folder.name in {f"seed-{seed}" for seed in seeds}
        if not (ours and config.overwrite):
            flag = "--resume" if ours else "--output"
            require_same_data(digests, folder / RECORD, folder / ".training", flag)


def _same_settings(config: FinetuneConfig, folder: Path, flag: str) -> None:
    """A folder holds seeds of one arm with the same settings."""
    done, begun = folder / RECORD, folder / ".training" / "settings.json"
    if not done.is_file() and not begun.is_file():
        return
    if difference := difference_from_record(config, done if done.is_file() else begun, flag):
        raise UserError(
            f"{flag}: {folder} was made with other settings ({difference}); use the same ones or another --output"
            + (", or --overwrite" if flag == "--resume" else "")
        )


def _prepare(config: FinetuneConfig, folder: Path, digests: dict[str, Any]) -> None:
    if config.overwrite or not (folder / ".training").is_dir():
        remove_folder(folder)
    for left in folder.rglob(".*.tmp"):  # of `write_text` in a process that was killed; we hold the folder
        left.unlink()
    (folder / ".training").mkdir(parents=True, exist_ok=True)
    write_text(folder / ".training" / "settings.json", json.dumps(config.fingerprint()))
    write_text(folder / ".training" / BEGUN, json.dumps(digests))


class Run:
    """One seed of one arm."""

    def __init__(
        self,
        config: FinetuneConfig,
        arm: arms.Arm,
        data: TaskData,
        digests: dict[str, Any],
        base: Path,
        seed: int,
        group: Group,
        progress: Progress,
    ) -> None:
        self.config, self.arm, self.data, self.seed, self.group, self.progress = (
            config,
            arm,
            data,
            seed,
            group,
            progress,
        )
        self.digests = digests
        self.folder = Path(config.output) / f"seed-{seed}"
        self.tokenizer = load_tokenizer(base)
        self.base = base
        self.start = build(config, arm, base, data.task, self.tokenizer.pad_token_id, seed)
        length, _ = usable_length(self.start.model.config, config.max_length)
        self.texts = texts_of(data.task, self.tokenizer, length)
        self.model = choose_parameters(config, arm, self.start, seed)
        self.frozen = freeze(config, self.start, base)
        self.trained = trainable(self.model)

    def finish(self) -> dict[str, Any]:
        """Train, score every reading, write; returns the record."""
        watch = Watch(self.progress, f"seed {self.seed}")
        validation = self.data.validation.examples
        encoded = self.texts.encode(validation)
        train = self.texts.encode(self.data.train)
        places = (self.folder, self.seed, self.group.size)
        tuner = make_tuner(self.config, self.model, self.texts, train, (validation, encoded), *places, watch)
        rate = 1 - self.start.top_k / self.start.model.config.num_experts
        hooks = hide_neurons(self.start.model, rate) if self.arm.dropout else []
        state = states(self.folder / ".training")[-1:] if self.config.resume else []
        if state:
            tuner.probe.load(state[0])
            watch.load(state[0])
        train_from(tuner, state[0] if state else None)
        for hook in hooks:
            hook.remove()
        if self.frozen:
            self.frozen.check(self.start.model)
            self.frozen.merge()
            round_as_stored(self.start.model, self.base)  # before it is scored: what is scored is what is published
        readings, predictions = read_all(tuner, self.start, self.arm, self.data, self.progress)
        record = self._record(tuner, watch, readings)
        self.start.model.config.use_cache = True  # training wants none, generation does
        if not self.config.discard_model:
            self._add_to_history(record)
            if self.frozen:
                cast_as_stored(self.start.model, self.base)
            tuner.save_model(str(self.folder / "model"))
        if self.group.first:
            write_predictions(self.folder / "predictions", predictions)
            if not self.config.discard_model:
                self.tokenizer.save_pretrained(self.folder / "model")
                (self.folder / "model" / "training_args.bin").unlink(missing_ok=True)  # a pickle; run.json has it all
                if (self.folder / "model" / "config.json").is_file():  # no adapter, whose card peft writes
                    write_history_card(self.folder / "model", self.base, record)
                settle_folder(self.folder / "model")
            write_text(self.folder / RECORD, json.dumps(record, indent=2) + "\n")
            _clear_finished(self.config, [self.seed])
        self.group.wait()
        return record

    def _add_to_history(self, record: dict[str, Any]) -> None:
        facts = self.start.model.config
        provenance = facts.emoe_provenance or {}
        settings = {key: record[key] for key in ("task", "method", "tuning")}
        step = entry("finetune", self.base, steps=record["steps"], settings=settings)
        facts.emoe_provenance = {**provenance, "history": [*provenance.get("history", []), step]}

    def _record(self, tuner: Any, watch: Watch, readings: dict[str, Any]) -> dict[str, Any]:
        state, facts = tuner.state, self.start.model.config
        best = state.best_model_checkpoint
        return {
            "task": self.data.task.name,
            "model": self.config.model,
            "method": self.config.method,
            "tuning": self.config.tuning,
            "seed": self.seed,
            "settings": located(self.config.model_dump(exclude={"output", "resume", "overwrite"})),
            "steps": state.global_step,
            "selected_step": int(best.rsplit("-", 1)[1]) if best else state.global_step,
            "validation_score": state.best_metric,
            "seconds": round(watch.elapsed, 2),
            "seconds_per_step": round(watch.seconds / max(1, watch.steps), 4),
            "peak_memory_bytes": watch.peak_bytes,
            "trainable_parameters": self.trained,
            "train_examples": len(self.data.train),
            "data": self.digests,
            "duplicates_removed": self.data.duplicates_removed,
            "notes": self.data.notes,
            "gate": facts.emoe_gate,
            "num_experts": facts.num_experts,
            "top_k": self.start.top_k,
            "emoe_layers": facts.emoe_layers,
            "precision": "bfloat16" if tuner.args.bf16 else "float32",
            "processes": self.group.size,
            "hardware": _hardware(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "emoe": emoe.__version__,
            "readings": readings,
        }


def _hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{processor()}, {torch.get_num_threads()} threads"
