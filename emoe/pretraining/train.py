"""`emoe pretrain`: a new causal language model from plain text, by transformers' Trainer.

ModuleFormers, their baselines and any other architecture of transformers go the same way; what is ours is the text, the
log of the gates and the evaluation by domain.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainingArguments

import emoe
from emoe.checkpoint.digests import write_digests
from emoe.checkpoint.given import given_output
from emoe.config import PretrainConfig
from emoe.conversion.resuming import Work, require_same_sources
from emoe.conversion.workspace import PRETRAINED, Workspace
from emoe.distributed import Group
from emoe.errors import UserError, nearest
from emoe.finetuning.base import BaseTrainer, shared_arguments
from emoe.finetuning.loop import Watch, check_perplexities, minutes, write_log
from emoe.finetuning.states import SOURCES, same_settings, states, train_from
from emoe.moduleformer.sizes import count_parameters
from emoe.moduleformer.usage import GateUsage
from emoe.pretraining.evaluate import evaluate
from emoe.pretraining.text import Domain, digest_of_sequences, load_domain, mixed, parse_domains
from emoe.pretraining.tokenizer import load_tokenizer
from emoe.report.card import write_pretraining_card
from emoe.runtime import settle_folder, write_text

MOST_PASSES = 16
"""Passes over a text beyond which we say so. Muennighoff et al., arXiv 2305.16264: the fourth is nearly as good as new
text, by the sixteenth most of the gain is gone."""

Progress = Callable[[str, int, int], None]


def pretrain(config: PretrainConfig, progress: Progress) -> dict[str, Any]:
    """Train ``config.architecture`` on ``config.corpus`` and write ``config.output``. Returns the report.

    Raises:
        UserError: settings that do not fit each other, too little text, an output in the way, a loss that diverges, a
            disk that is full.
    """
    output = given_output(config.output)
    domains, group = parse_domains(config.corpus), Group()
    new_model_config(config.architecture)
    if config.tokens_per_step < config.sequence_length * group.size:
        raise UserError(
            f"--tokens-per-step: {config.tokens_per_step} is less than a sequence of {config.sequence_length} tokens "
            f"for each of {group.size} processes; raise it or lower --sequence-length"
        )
    work = Work("training", config, PRETRAINED)
    workspace = Workspace(output, None, resume=config.resume, overwrite=config.overwrite, work=work, rank=group.rank)
    training = workspace.state_folder / "training"
    with workspace.open(group):
        try:
            settings = config.fingerprint()
            group.first_then_all(lambda: same_settings(settings, training, resume=config.resume, what=work.kind))
            report = _pretrain(config, domains, workspace.folder, training, group, progress)
            group.first_then_all(workspace.publish)
            return report
        except Exception:
            if not states(training):  # nothing is lost
                workspace.abandon()
            raise


def _pretrain(
    config: PretrainConfig, domains: list[Domain], target: Path, training: Path, group: Group, progress: Progress
) -> dict[str, Any]:
    transformers.set_seed(config.seed)
    progress("tokenizer", 0, config.steps)
    group.first_then_all(lambda: load_tokenizer(config, domains, training / "tokenizer") and None)
    tokenizer = load_tokenizer(config, domains, training / "tokenizer")
    progress("reading text", 0, config.steps)
    common = {"length": config.sequence_length, "share": config.held_out_share}
    parts = [load_domain(d, tokenizer, held_out=False, most=config.corpus_tokens, **common) for d in domains]
    tokens = {d.name: held_out_tokens(d, tokenizer, config, config.sequence_length) for d in domains}
    group.first_then_all(lambda: require_same_sources(_digests(parts, tokens), training / SOURCES, "training"))
    architecture = dict(config.architecture)
    for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
        architecture.setdefault(field, getattr(tokenizer, field))
    model_config = new_model_config({"vocab_size": len(tokenizer), **architecture})
    if model_config.vocab_size < len(tokenizer):
        raise UserError(
            f"--config: architecture: vocab_size={model_config.vocab_size}, the tokenizer has {len(tokenizer)} "
            "entries; leave vocab_size out or raise it"
        )
    model = transformers.AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)

    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trainer = _trainer(config, model, mixed(parts, config.mix, config.seed), tokens, training, target, group, progress)
    kept = states(training)
    start, first = time.perf_counter(), int(kept[-1].name.split("-")[1]) if kept else 0
    train_from(trainer, kept[-1] if kept else None)
    seconds, steps = time.perf_counter() - start, trainer.state.global_step
    trainer.check_weights()
    results = trainer.measure()
    check_perplexities({name: result["perplexity"] for name, result in results.items()})
    counts = count_parameters(model)
    report = {
        "model_type": model_config.model_type,
        "parameters": counts._asdict(),
        "steps": steps,
        "tokens": steps * trainer.tokens_per_step,
        "minutes": minutes(trainer),
        "tokens_per_second": round((steps - first) * trainer.tokens_per_step / max(seconds, 1e-9)),
        "corpus_tokens": {d.name: len(p) * config.sequence_length for d, p in zip(domains, parts, strict=True)},
        "perplexity": {name: round(result["perplexity"], 4) for name, result in results.items()},
        "gates": {name: result["gates"] for name, result in results.items() if result["gates"]},
        "notes": _repeated(domains, parts, steps * trainer.tokens_per_step, config),
        "settings": config.model_dump(exclude={"output", "resume", "overwrite"}),
        "emoe": emoe.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    progress("writing", steps, config.steps)
    group.first_then_all(lambda: _write(model, tokenizer, target, report))
    progress("done", steps, config.steps)
    return report


def _digests(parts: list[Any], held_out: dict[str, torch.Tensor]) -> dict[str, str]:
    """Of what is read, by flag and domain."""
    read = zip(parts, held_out.items(), strict=True)
    return {f"--corpus {name}": digest_of_sequences(part, ids) for part, (name, ids) in read}


def _repeated(domains: list[Domain], parts: list[Any], tokens: int, config: PretrainConfig) -> list[str]:
    """What there is to say of domains that a run of so many tokens reads more than `MOST_PASSES` times."""
    sizes = [len(part) * config.sequence_length for part in parts]
    shares = [1 / len(sizes) if config.mix == "equal" else size / sum(sizes) for size in sizes]
    passes = [tokens * share / size for share, size in zip(shares, sizes, strict=True)]
    return [
        f"{domain.name} has {size:,} tokens to train on, read {times:,.0f} times: too little text for so many steps"
        for domain, size, times in zip(domains, sizes, passes, strict=True)
        if times > MOST_PASSES
    ]


def held_out_tokens(domain: Domain, tokenizer: Any, config: PretrainConfig, length: int) -> torch.Tensor:
    """What a domain is measured on, (sequences, length): from all over the text of which a run reads the rest."""
    share, read = config.held_out_share, None
    if config.corpus_tokens is not None:
        read = max(config.held_out_tokens, math.ceil(config.corpus_tokens * share / (1 - share)))
    part = load_domain(
        domain, tokenizer, length=length, held_out=True, share=share, most=config.held_out_tokens, read=read
    )
    return part.with_format("torch")["input_ids"][:].long()


def new_model_config(architecture: dict[str, Any]) -> Any:
    """The transformers configuration of an ``architecture`` mapping.

    Raises:
        UserError: no or an unknown model_type, a field it does not have, or values that it refuses.
    """
    if not architecture:
        raise UserError(
            "--config: missing, or without 'architecture:'; name a YAML file such as configs/moduleformer/tiny.yaml"
        )
    fields = dict(architecture)
    model_type = fields.pop("model_type", None)
    known = transformers.CONFIG_MAPPING
    if not model_type or model_type not in known:
        hint = nearest(str(model_type), known.keys()) if model_type else ""
        raise UserError(
            f"--config: architecture: model_type {model_type!r} is unknown{hint}; write e.g. 'model_type: moduleformer'"
        )
    kind = known[model_type]
    names = {field.name for field in dataclasses.fields(kind)} | set(kind.attribute_map)
    for field in fields:
        if field not in names:
            raise UserError(f"--config: architecture: {model_type} has no field '{field}'{nearest(field, names)}")
    try:
        return kind(**fields)
    except Exception as error:  # transformers' strict dataclasses raise their own kinds
        raise UserError(f"--config: architecture: {' '.join(str(error).split())}") from None


class _Pretrainer(BaseTrainer):
    """Trainer that logs what the gates do, and measures by domain."""

    def __init__(self, *args: Any, tokens_per_step: int, folder: Path, group: Group, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tokens_per_step, self.folder, self.group = tokens_per_step, folder, group
        self.usage = GateUsage(self.model, training=True)

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """A line of the log: loss, learning rate, gradient norm, tokens, and the gates since the last line."""
        if "loss" in logs:
            logs = {**logs, "tokens": self.state.global_step * self.tokens_per_step}
            gates = self.usage.take(self.group.total)
            if gates:
                logs["gates"] = gates
        super().log(logs, *args, **kwargs)
        if self.group.first:
            write_log(self, self.folder)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """What the Trainer calls now and then: a line of the log with the perplexity of each domain."""
        found = {name: round(result["perplexity"], 4) for name, result in self.measure().items()}
        self.log({"perplexity": found})
        metrics = {f"eval_perplexity_{name}": value for name, value in found.items()}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def measure(self) -> dict[str, dict[str, Any]]:
        """`evaluate` of the model as it is."""
        autocast = torch.bfloat16 if self.args.bf16 else None
        return evaluate(
            self.accelerator.unwrap_model(self.model),
            self.eval_dataset,
            batch_sequences=self.args.per_device_train_batch_size,
            autocast=autocast,
        )


def _trainer(config, model, train_set, domains, work: Path, target: Path, group: Group, progress) -> _Pretrainer:
    per_step = config.tokens_per_step // config.sequence_length // group.size
    batch = min(config.batch_sequences, per_step)
    accumulated = per_step // batch
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=config.steps,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulated,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, config.steps // 20),
        weight_decay=config.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        eval_strategy="steps",
        eval_steps=config.evaluate_steps,
        logging_steps=config.log_steps,
        save_steps=config.checkpoint_steps,
        seed=config.seed,
        **shared_arguments(config.precision),
        ddp_find_unused_parameters=False,  # an expert without tokens gets zeros: experts are rows of one tensor
    )
    return _Pretrainer(
        model=model,
        args=arguments,
        train_dataset=train_set,
        data_collator=_collate,
        callbacks=[Watch(config, progress)],
        eval_dataset=domains,
        tokens_per_step=batch * accumulated * config.sequence_length * group.size,
        folder=target,
        group=group,
    )


def _collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    ids_BT = torch.tensor([row["input_ids"] for row in rows], dtype=torch.int64)
    return {"input_ids": ids_BT, "labels": ids_BT}


def _write(model: Any, tokenizer: Any, target: Path, report: dict[str, Any]) -> None:
    """The model and what it was made with, into a folder that is not yet the output."""
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    write_text(target / PRETRAINED, json.dumps(report, indent=2) + "\n")
    write_pretraining_card(report, target)
    write_digests(target)
    settle_folder(target)
