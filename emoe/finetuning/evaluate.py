"""`emoe eval`: a tuned model, loaded again and scored, as trained or read otherwise; language benchmarks by lm-eval."""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from emoe import clustering, gating, tasks
from emoe.conversion.convert import Progress
from emoe.disk import full_disk_told
from emoe.distributed import Group
from emoe.errors import UserError
from emoe.finetuning import arms
from emoe.finetuning.model import build, converted_folder, load_tokenizer
from emoe.finetuning.readings import AS_TRAINED, DENSE, budget_of, predict, score, write_predictions
from emoe.finetuning.record import find_run
from emoe.finetuning.settings import MAX_LENGTH, EvalConfig, FinetuneConfig, located, names_of
from emoe.finetuning.texts import texts_of, usable_length
from emoe.finetuning.trainer import scorer
from emoe.finetuning.tuning import choose_parameters
from emoe.modeling.modeling_emoe import EMoEModelMixin
from emoe.runtime import write_text
from emoe.tasks.data import TaskData, key_of, load_task
from emoe.tasks.spec import Task, Where

ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class Loaded:
    """A model to score."""

    model: Any
    tokenizer: Any
    record: dict[str, Any] | None
    """run.json, where the model is that of a run."""


def evaluate(config: EvalConfig, progress: Progress | None = None, say: Any = None) -> dict[str, Any]:
    """Score a model; returns ``{"model", "reading", "sets": {name: …}, "seen_in_training": {…}, "lm_eval": {…}}``.

    ``seen_in_training`` counts the texts of each set that stand in the run's training set; it is empty where that is
    not known.

    Raises:
        UserError: not a model, no task, labels that do not match the head, a reading that it does not have.
    """
    progress, say = progress or (lambda stage, done, total: None), say or (lambda line: None)
    if config.lm_eval and importlib.util.find_spec("lm_eval") is None:
        raise UserError("--lm-eval: needs the package lm-eval; pip install lm-eval")
    if config.output and Path(config.output).exists():
        raise UserError(f"--output: {config.output} exists; choose another folder")
    record, folder = find_run(config.model)
    report: dict[str, Any] = {"model": config.model, "reading": config.read_as, "sets": {}, "seen_in_training": {}}
    with tempfile.TemporaryDirectory() as work:
        if config.lm_eval:
            loaded = _load(config, folder, record, None, Path(work), progress)
            _read_as(config, loaded)
            report["lm_eval"] = _benchmarks(config, loaded)
        else:
            task = tasks.get(config.task) if config.task or record is None else _own_task(record)
            data = _data(config, task, record, say)
            report["seen_in_training"] = _seen(config, data, record, say)
            loaded = _load(config, folder, record, task, Path(work), progress)
            _read_as(config, loaded)
            report["sets"], predictions = _score(config, loaded, data, Path(work), progress, say)
    if config.output:
        with full_disk_told(Path(config.output)):
            _write(report, None if config.lm_eval else predictions, Path(config.output))
    return report


def _write(report: dict[str, Any], predictions: dict[str, Any] | None, output: Path) -> None:
    """eval.json, last, and what was answered."""
    output.mkdir(parents=True, exist_ok=True)
    if predictions is not None:
        write_predictions(output / "predictions", {report["reading"]: predictions})
    write_text(output / "eval.json", json.dumps(report, indent=2) + "\n")


def _data(config: EvalConfig, task: Task, record: dict[str, Any] | None, say: Any) -> TaskData:
    """The sets to score; with a run's own task, the training set is the run's."""
    wanted = names_of(config.domains)
    own = task.in_domain.name
    known = None if wanted is None else [name for name in wanted if name not in (own, f"{own}-validation")]
    if record is not None and _is_own(config, record):
        data = _as_trained_on(config, record, task, known, say)
    else:
        data_dir = config.data_dir or (record["settings"].get("data_dir") if record else None)
        where = Where(Path(os.path.expanduser(data_dir)) if data_dir else None, say)
        data = load_task(task, domains=known, test_limit=config.limit, where=where, cleaned_of=[])
    for note in data.notes:
        say(note)
    if wanted is None:
        wanted = [name for name in data.tests if name != f"{own}-validation"]
    tests = {name: test for name, test in data.tests.items() if name in wanted}
    if not tests:
        reason = "; ".join(data.notes) or "it names no set"
        raise UserError(f"--domains: nothing is left to score ({reason})")
    return TaskData(task, data.train, tests, data.duplicates_removed, data.notes)


def _is_own(config: EvalConfig, record: dict[str, Any]) -> bool:
    """Whether the task to score is the one that the run trained on."""
    same = located({"task": config.task})["task"] == located(record["settings"])["task"]
    return not config.task or same


def _own_task(record: dict[str, Any]) -> Task:
    """The task that a run trained on; raises `UserError` where its file has gone."""
    try:
        return tasks.get(record["settings"]["task"])
    except UserError as error:
        reason = str(error).removeprefix("--task: ")
        raise UserError(f"--task: the run's own task is not to be had ({reason}); --task names another") from None


def _as_trained_on(
    config: EvalConfig, record: dict[str, Any], task: Task, domains: list[str] | None, say: Any
) -> TaskData:
    """The run's task, its training set split, cleaned and limited as it was then."""
    settings = record["settings"]
    data_dir = (config.data_dir if _is_own(config, record) else None) or settings.get("data_dir")
    return load_task(
        task,
        domains=domains,
        train_limit=settings.get("train_limit"),
        test_limit=config.limit,
        where=Where(Path(os.path.expanduser(data_dir)) if data_dir else None, say),
        cleaned_of=record.get("duplicates_removed"),
    )


def _seen(config: EvalConfig, data: TaskData, record: dict[str, Any] | None, say: Any) -> dict[str, int]:
    """Texts of each set that the run trained on: of another task, or of a set that was not there at the time."""
    if record is None:
        return {}
    train, kind = data.train, data.task.kind
    if not _is_own(config, record):
        try:
            own = _own_task(record)
            train, kind = _as_trained_on(config, record, own, [], say).train, own.kind
        except UserError as reason:
            say(f"texts that the run trained on are not counted, its training set is not to be had: {reason}")
            return {}
    if len(train) != record["train_examples"]:
        say(f"the run trained on {record['train_examples']} texts, its settings give {len(train)} now; those count")
    known = {key_of(example, kind) for example in train}
    seen = {
        name: sum(key_of(example, data.task.kind) in known for example in test.examples)
        for name, test in data.tests.items()
    }
    for name, count in seen.items():
        if count:
            say(f"{name}: the run trained on {count} of these {len(data.tests[name].examples)} texts")
    return seen


def _load(
    config: EvalConfig,
    folder: Path,
    record: dict[str, Any] | None,
    task: Task | None,
    work: Path,
    progress: Progress,
) -> Loaded:
    if (folder / ADAPTER).is_file():
        if record is None:
            raise UserError(f"--model: {folder} is an adapter; give its run's folder, which says of what model")
        return _with_adapter(config, folder, record, task, work, progress)
    facts = _from_folder(transformers.AutoConfig, folder)
    headed = any(name.endswith("ForSequenceClassification") for name in facts.architectures or [])
    if task is None and headed:
        raise UserError(f"--lm-eval: {config.model} is no causal language model")
    if task is None or task.kind == "instructions":
        model = _from_folder(transformers.AutoModelForCausalLM, folder, dtype=torch.float32)
    else:
        if not headed:
            first = (
                "nor has any ModuleFormer"
                if facts.model_type == "moduleformer"
                else "tune it with `emoe finetune` first"
            )
            raise UserError(f"--model: {folder} has no classification head; {first}")
        _check_labels(task, [str(facts.id2label[number]) for number in range(facts.num_labels)])
        model = _from_folder(transformers.AutoModelForSequenceClassification, folder, dtype=torch.float32)
    return Loaded(model, load_tokenizer(folder), record)


def _from_folder(auto_class: Any, folder: Path, **options: Any) -> Any:
    try:
        return auto_class.from_pretrained(folder, trust_remote_code=False, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"--model: {folder} is not a model: {' '.join(str(error).split())[:160]}") from None


def _check_labels(task: Task, own: list[str]) -> None:
    """The head's labels are the task's, in that order; one that only counts them (LABEL_0) may stand for any."""
    wanted = list(task.labels or ("score",))
    counted = own == [f"LABEL_{number}" for number in range(len(own))]
    if own != wanted and not (counted and len(own) == len(wanted)):
        raise UserError(
            f"--task: '{task.name}' has {len(wanted)} labels ({', '.join(wanted[:6])}), the model's head has "
            f"{len(own)} ({', '.join(own[:6])}); they do not match"
        )


def _settings(record: dict[str, Any]) -> FinetuneConfig:
    """Settings of a run. Those with the value they have by themselves count as not given."""
    fields = FinetuneConfig.model_fields
    return FinetuneConfig(**{k: v for k, v in record["settings"].items() if k in fields and v != fields[k].default})


def _with_adapter(
    config: EvalConfig, folder: Path, record: dict[str, Any], task: Task | None, work: Path, progress: Progress
) -> Loaded:
    """The run's start, made again from its settings, and the adapter on it."""
    from peft import load_peft_weights, set_peft_model_state_dict

    settings, arm = _settings(record), arms.get(record["method"])
    own = _own_task(record)
    if task is not None:
        _check_labels(task, list(own.labels or ("score",)))
    elif own.kind != "instructions":
        raise UserError(f"--lm-eval: {config.model} is no causal language model")
    texts: list[str] = []
    if clustering.get(settings.split).needs == "features" or gating.get(settings.gate).needs_calibration:
        texts = [example.text for example in _as_trained_on(config, record, own, [], None).train]
    base = converted_folder(settings, work, texts, Group(), progress)
    tokenizer = load_tokenizer(base)
    start = build(settings, arm, base, own, tokenizer.pad_token_id, record["seed"])
    model = choose_parameters(settings, arm, start, record["seed"])
    set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
    return Loaded(model, tokenizer, record)


def _read_as(config: EvalConfig, loaded: Loaded) -> None:
    if config.read_as == AS_TRAINED:
        return
    found = next((m for m in loaded.model.modules() if isinstance(m, EMoEModelMixin)), None)
    if found is None:
        raise UserError(f"--read-as: {config.model} is a dense model of stock class; only as-trained fits it")
    if loaded.record:
        arm = arms.get(loaded.record["method"])
        found.set_top_k(budget_of(config.read_as, arm, loaded.record["num_experts"], loaded.record["top_k"]))
    elif config.read_as == DENSE and not found.config.emoe_copies:
        found.set_top_k(found.config.num_experts)
    else:
        raise UserError(
            f"--read-as: {config.model} is not a run's; how many experts '{config.read_as}' means is unknown"
        )


def _score(
    config: EvalConfig, loaded: Loaded, data: TaskData, work: Path, progress: Progress, say: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    own = (loaded.record or {}).get("settings", {}).get("max_length", MAX_LENGTH)
    length, notes = usable_length(loaded.model.config, config.max_length or own)
    for note in notes:
        say(note)
    texts = texts_of(data.task, loaded.tokenizer, length)
    precision = (loaded.record or {}).get("precision", "float32")
    tuner = scorer(loaded.model, texts, config.batch_size, precision, work)
    sets, predictions = {}, {}
    for done, (name, test) in enumerate(data.tests.items()):
        progress(f"scoring {name}", done, len(data.tests))
        predictions[name] = predict(tuner, texts, test.examples)
        sets[name] = {"role": test.role, **score(texts, predictions[name])}
    return sets, predictions


def _benchmarks(config: EvalConfig, loaded: Loaded) -> dict[str, Any]:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    if not loaded.model.can_generate():
        raise UserError(f"--lm-eval: {config.model} is no causal language model")
    wrapped = HFLM(pretrained=loaded.model.eval(), tokenizer=loaded.tokenizer, batch_size=config.batch_size)
    try:
        return lm_eval.simple_evaluate(model=wrapped, tasks=names_of(config.lm_eval), limit=config.limit)["results"]
    except (KeyError, ValueError, ConnectionError, FileNotFoundError) as error:
        raise UserError(f"--lm-eval: {' '.join(str(error).split())}") from None
