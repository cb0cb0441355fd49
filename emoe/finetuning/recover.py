"""Light recovery: train a converted model on plain text to predict what the dense model predicts.

The loop is transformers' Trainer; ours is the loss (Hinton, Vinyals, Dean 2015, arXiv 1503.02531, at temperature 1) and
the draw of a budget for each step, so that one training serves every number of experts.

Legend: B sequences, T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

import emoe
from emoe import gating
from emoe.calibration.text import TokenBlocks, load_blocks, read_tokenizer
from emoe.checkpoint.companions import copy_companions
from emoe.checkpoint.converted import SOURCE_S, read_converted
from emoe.checkpoint.digests import write_digests
from emoe.checkpoint.given import CONVERTED, given_model, given_output
from emoe.checkpoint.partition import NAME as PARTITION
from emoe.checkpoint.stored import round_as_stored, save_as_stored
from emoe.config import RecoverConfig
from emoe.conversion.quality import Load
from emoe.conversion.resuming import require_same_sources
from emoe.conversion.workspace import RECOVERED
from emoe.errors import UserError
from emoe.families import family
from emoe.finetuning import softmax
from emoe.finetuning.base import BaseTrainer
from emoe.finetuning.loop import (
    TRAINED_ON,
    Progress,
    Sequences,
    Watch,
    arguments,
    check_perplexities,
    fit_sequences,
    minutes,
    perplexities,
    repeated,
    run,
    text_tokens,
    training_into,
    write_log,
)
from emoe.finetuning.states import SOURCES
from emoe.modeling.modeling_emoe import EMoEModelMixin
from emoe.report.card import write_history_card
from emoe.runtime import settle_folder, write_text
from emoe.surgery.history import digest_of, entry, provenance_of, with_entry
from emoe.surgery.usage import load_model

MEASURED = (0.25, 0.5, 0.75)
"""Shares of experts at which perplexity is measured before and after."""


def recover(config: RecoverConfig, progress: Progress) -> dict[str, Any]:
    """Train ``config.model`` and write ``config.output``. Returns the report that also lies there.

    Raises:
        UserError: not a converted causal language model, too little text, an output in the way.
    """
    folder = _checked_model(config)
    given_output(config.output)
    if config.teacher:
        _teacher_folder(config.teacher)
    with training_into(config, folder, "recovery", RECOVERED) as (target, training):
        return _recover(config, folder, target, training, progress)


def _recover(config: RecoverConfig, folder: Path, target: Path, training: Path, progress: Progress) -> dict[str, Any]:
    transformers.set_seed(config.seed)
    tokenizer = read_tokenizer(folder)
    config, notes = fit_sequences(config, folder)
    blocks = _read_text(config, tokenizer)
    require_same_sources(_digests(config, folder, blocks), training / SOURCES, "recovery")
    progress("loading", 0, config.steps)
    student, teacher = _load(folder), _load_teacher(config, folder)
    top_ks = _top_ks(config, student.config.to_dict())
    measured = sorted({max(1, round(f * student.config.num_experts)) for f in MEASURED} | set(top_ks))
    dense = _measure(teacher, [None], blocks, progress)[None]
    before = _measure(student, measured, blocks, progress)
    if config.gates == gating.SOFTMAX:
        student.set_top_k(max(k for k in top_ks if k < student.config.num_experts))
        softmax.install(student, blocks.calibration)
    if config.gates != "fixed":
        for ffn in student.sparse_ffns().values():
            ffn.router.learn()
    if config.train == "ffn":
        _freeze_all_but_ffns(student)
    trainer = _train(config, student, teacher, top_ks, blocks.calibration, training, progress)
    steps = trainer.state.global_step
    for ffn in student.sparse_ffns().values():
        ffn.router.learn(False)
    round_as_stored(student, folder)
    after = _measure(student, measured, blocks, progress)
    for found in after.values():
        check_perplexities(found["perplexity"])
    report = {
        "model": config.model,
        "steps": steps,
        "minutes": minutes(trainer),
        "tokens": text_tokens(config, steps),
        "text": config.text,
        "num_experts": student.config.num_experts,
        "dense": dense["perplexity"],
        "rows": [
            {
                "top_k": k,
                "active": after[k]["active"],
                "before": before[k]["perplexity"],
                "after": after[k]["perplexity"],
            }
            for k in measured
        ],
        "settings": config.model_dump(exclude={"model", "output", "resume", "overwrite"}),
        "notes": [*notes, *repeated(config, blocks.calibration, steps)],
        "emoe": emoe.__version__,
        "torch": torch.__version__,
    }
    progress("writing", config.steps, config.steps)
    write_log(trainer, target)
    _write(student, folder, target, report)
    progress("done", config.steps, config.steps)
    return report


def _checked_model(config: RecoverConfig) -> Path:
    """The model's folder, once everything is checked that takes no weights."""
    folder = given_model(config.model, CONVERTED)
    facts = read_converted(folder)
    if family(facts["emoe_source"]["family"]).encoder:
        raise UserError(f"--model: {folder} is an encoder; recovery is for causal language models")
    provenance = facts["emoe_provenance"]
    if not config.teacher and (provenance.get("outputs", SOURCE_S) != SOURCE_S or provenance.get("history")):
        raise UserError("--teacher: missing; this model has other weights than its source, so name the dense one")
    if config.gates == "learned" and not gating.tables_of(facts["emoe_gate"]):
        raise UserError(f"--gates: the {facts['emoe_gate']} gate of this model has no table to learn; use fixed")
    if config.gates == gating.SOFTMAX:
        softmax.check(facts, _top_ks(config, facts))
    for budget in config.budgets:
        if not 0 < budget <= 1:
            raise UserError(f"--budgets: {budget} is not a share above 0 and at most 1")
    return folder


def _read_text(config: RecoverConfig, tokenizer: Any) -> TokenBlocks:
    return load_blocks(
        config.text,
        tokenizer,
        length=config.sequence_length,
        calibration_tokens=text_tokens(config, config.steps),
        held_out_tokens=config.held_out_tokens,
        held_out=config.held_out,
        seed=config.seed,
        flag="--text",
        domain=TRAINED_ON,
    )


def _digests(config: RecoverConfig, folder: Path, blocks: TokenBlocks) -> dict[str, str]:
    """Of what is read, by flag."""
    found = {"--model": digest_of(folder), "--text": blocks.digest}
    if config.teacher:
        with _of_the_teacher():
            found["--teacher"] = digest_of(_teacher_folder(config.teacher))
    return found


def _load(folder: Path) -> EMoEModelMixin:
    model = load_model(folder, head=True)
    if not isinstance(model, EMoEModelMixin):
        raise UserError(f"--model: {folder} is no causal language model; recovery needs one")
    return model


def _load_teacher(config: RecoverConfig, folder: Path) -> torch.nn.Module:
    if config.teacher is None:
        teacher = _load(folder)
        teacher.set_top_k(teacher.config.num_experts)
    else:
        teacher = load_model(_teacher_folder(config.teacher), head=True, flag="--teacher")
    return teacher.requires_grad_(False)


def _teacher_folder(teacher: str) -> Path:
    from emoe.assets import resolve_model

    with _of_the_teacher():
        return resolve_model(teacher).folder


@contextlib.contextmanager
def _of_the_teacher() -> Iterator[None]:
    """What is said of a model is said of the teacher."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace("--model", "--teacher", 1)) from None


def _top_ks(config: RecoverConfig, facts: dict[str, Any]) -> list[int]:
    """Numbers of experts to train with, of a model whose config.json says ``facts``."""
    return [max(1, round(b * facts["num_experts"])) for b in config.budgets] or [facts["num_experts_per_tok"]]


def _freeze_all_but_ffns(student: EMoEModelMixin) -> None:
    student.requires_grad_(False)
    for ffn in student.sparse_ffns().values():
        for role in ("gate", "up", "down"):
            if ffn.layout[role]:
                ffn.linear(role).requires_grad_(True)
        ffn.router.requires_grad_(True)


@torch.no_grad()
def _measure(model: torch.nn.Module, top_ks: list[int | None], blocks: TokenBlocks, progress: Progress) -> dict:
    """Perplexity by domain and share of active experts at each K; None leaves the model as it is."""
    results = {}
    for k in top_ks:
        progress("measuring", 0, 1)
        ffns = []
        if k is not None:
            model.set_top_k(k)
            ffns = list(model.sparse_ffns().values())
        load = Load(max((ffn.num_experts for ffn in ffns), default=1))
        count = lambda _, __, routing: load.add(routing.experts_NK)  # noqa: B023, E731 - removed below
        hooks = [ffn.router.register_forward_hook(count) for ffn in ffns]
        perplexity = perplexities(model, blocks.held_out)
        for hook in hooks:
            hook.remove()
        results[k] = {"perplexity": perplexity, "active": round(load.active, 4)}
    return results


class _Distiller(BaseTrainer):
    """Trainer whose loss compares with a teacher."""

    def __init__(self, *args: Any, teacher: torch.nn.Module, top_ks: list[int], kind: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher, self.top_ks, self.kind = teacher, top_ks, kind

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # Drawn from the step's number, so that a resumed run draws what an undisturbed one would have drawn.
        draw = random.Random(self.args.seed * 1_000_003 + self.state.global_step)
        self.accelerator.unwrap_model(model).set_top_k(draw.choice(self.top_ks))
        hidden = self.kind == "hidden"
        with torch.no_grad():
            wanted = self.teacher(**inputs, use_cache=False, output_hidden_states=hidden)
        found = model(**inputs, use_cache=False, output_hidden_states=hidden)
        if hidden:
            student_BTD, teacher_BTD = found.hidden_states[-1].float(), wanted.hidden_states[-1].float()
            loss = (student_BTD - teacher_BTD).square().sum(-1).div(teacher_BTD.square().sum(-1)).mean()
        else:
            # Cross-entropy with the teacher's probabilities less their entropy: KL in fewer passes than kl_div makes.
            log_NV = wanted.logits.flatten(0, 1).float().log_softmax(-1)
            p_NV = log_NV.exp()
            entropy = -torch.linalg.vecdot(p_NV, log_NV).mean()
            loss = torch.nn.functional.cross_entropy(found.logits.flatten(0, 1).float(), p_NV) - entropy
        return (loss, found) if return_outputs else loss


def _train(config, student, teacher, top_ks, tokens, work: Path, progress: Progress) -> _Distiller:
    """The trainer, when it has trained."""
    trainer = _Distiller(
        model=student,
        args=arguments(config, work),
        train_dataset=Sequences(tokens),
        teacher=teacher,
        top_ks=top_ks,
        kind=config.loss,
        callbacks=[Watch(config, progress)],
    )
    teacher.to(trainer.args.device)
    run(trainer, work)
    return trainer


def _write(student: EMoEModelMixin, folder: Path, target: Path, report: dict[str, Any]) -> None:
    """The recovered checkpoint, into a folder that is not yet the output."""
    step = entry("recover", folder, **{key: report[key] for key in ("steps", "text", "settings")})
    changes = {"emoe_gate": student.config.emoe_gate, "emoe_provenance": with_entry(provenance_of(folder), step)}
    save_as_stored(student, folder, target, changes)
    copy_companions(folder, target)
    shutil.copyfile(folder / PARTITION, target / PARTITION)
    write_text(target / RECOVERED, json.dumps(report, indent=2) + "\n")
    write_history_card(target, folder, report)
    write_digests(target)
    settle_folder(target)
