"""Train a model further on plain text, whole or in part: what `emoe extend` added, its gates, or LoRA's matrices."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import TrainerCallback

import emoe
from emoe.calibration.text import load_blocks, read_tokenizer
from emoe.checkpoint.companions import copy_companions
from emoe.checkpoint.digests import write_digests
from emoe.checkpoint.given import CAUSAL, given_model, given_output
from emoe.checkpoint.partition import NAME as PARTITION
from emoe.checkpoint.stored import round_as_stored, save_as_stored
from emoe.config import TuneConfig, loss_factors
from emoe.conversion.resuming import require_same_sources
from emoe.conversion.workspace import TUNED, has_own_config
from emoe.disk import remove_folder
from emoe.errors import UserError
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
    workspace_of,
    write_log,
)
from emoe.finetuning.low_rank import merged, with_lora
from emoe.finetuning.states import SOURCES
from emoe.finetuning.tuning import trainable
from emoe.plainfiles import read_json
from emoe.report.card import write_history_card
from emoe.runtime import settle_folder, write_text
from emoe.surgery.history import digest_of, entry, provenance_of, with_entry
from emoe.surgery.modules import Anatomy, anatomy_of, has_modules
from emoe.surgery.training import LOSSES, Frozen, RouterLosses, check_losses, check_new_modules, train_only
from emoe.surgery.usage import check_budget, load_model

IDLE_STEPS = 5
"""Steps without any gradient, at the beginning, after which a training is given up."""


def tune(config: TuneConfig, progress: Progress) -> dict[str, Any]:
    """Train ``config.model`` and write ``config.output``. Returns the report that also lies there.

    Raises:
        UserError: no causal language model, nothing of the kind to train, nothing that learns, too little text, an
            output in the way.
    """
    folder = given_model(config.model, CAUSAL)
    given_output(config.output)
    factors = loss_factors(config.loss, LOSSES)
    workspace_of(config, folder, "training", TUNED).check_early()
    check_losses(factors, config.train)
    check_budget(folder, config.top_k)
    anatomy = _anatomy(folder, config)
    if config.train in ("new-modules", "new-experts"):
        check_new_modules(anatomy)
    with training_into(config, folder, "training", TUNED) as (target, training):
        return _tune(config, factors, anatomy, target, training, progress)


def _tune(
    config: TuneConfig,
    factors: dict[str, float],
    anatomy: Anatomy | None,
    target: Path,
    training: Path,
    progress: Progress,
) -> dict[str, Any]:
    folder = Path(config.model)
    transformers.set_seed(config.seed)
    config, notes = fit_sequences(config, folder)
    blocks = load_blocks(
        config.text,
        read_tokenizer(folder),
        length=config.sequence_length,
        calibration_tokens=text_tokens(config, config.steps),
        held_out_tokens=config.held_out_tokens,
        held_out=config.held_out,
        seed=config.seed,
        flag="--text",
        domain=TRAINED_ON,
    )
    require_same_sources({"--model": digest_of(folder), "--text": blocks.digest}, training / SOURCES, "training")
    progress("loading", 0, config.steps)
    model = load_model(folder, head=True)
    if config.top_k is not None:
        model.set_top_k(config.top_k)
    before = perplexities(model, blocks.held_out)
    model, frozen = _prepare(model, anatomy, config)
    trained = trainable(model)
    losses = RouterLosses(model, anatomy, factors, config.train) if factors else None
    trainer = _Tuner(
        model=model,
        args=arguments(config, training),
        train_dataset=Sequences(blocks.calibration),
        callbacks=[Watch(config, progress), _Curve(config.evaluate_steps, blocks.held_out)],
        losses=losses,
        what=config.train,
    )
    try:
        steps = run(trainer, training)
    except _IdleError:
        remove_folder(training)  # nobody wants to go on from there
        raise
    if losses:
        losses.close()
    frozen.check(model)
    frozen.merge()
    if config.train == "lora":
        model = merged(model)
    round_as_stored(model, folder)
    after = perplexities(model, blocks.held_out)
    check_perplexities(after)
    report = {
        "verb": "tune",
        "model": config.model,
        "steps": steps,
        "minutes": minutes(trainer),
        "tokens": text_tokens(config, steps),
        "trained": trained,
        "parameters": sum(p.numel() for p in model.parameters()),
        "perplexity": {name: {"before": before[name], "after": after[name]} for name in before},
        "curve": [row for row in trainer.state.log_history if "perplexity" in row],
        "settings": config.model_dump(exclude={"model", "output", "resume", "overwrite"}),
        "notes": [*notes, *repeated(config, blocks.calibration, steps)],
        "emoe": emoe.__version__,
        "torch": torch.__version__,
    }
    progress("writing", config.steps, config.steps)
    write_log(trainer, target)
    _write(model, anatomy, folder, target, report)
    progress("done", config.steps, config.steps)
    return report


def _anatomy(folder: Path, config: TuneConfig) -> Anatomy | None:
    """None for a model without modules, which can be trained whole or by LoRA, without losses on routers."""
    if has_modules(folder) or config.train in ("router", "new-modules", "new-experts") or config.loss:
        return anatomy_of(folder)
    return None


def _prepare(model: nn.Module, anatomy: Anatomy | None, config: TuneConfig) -> tuple[nn.Module, Frozen]:
    if config.train == "lora":
        return with_lora(model, config.lora_rank), Frozen({}, {})
    return model, train_only(model, anatomy, config.train) if anatomy else Frozen({}, {})


class _IdleError(UserError):
    pass


class _Tuner(BaseTrainer):
    """Next-token loss plus those on routers; stops where what trains has no part in them.

    Raises:
        _IdleError: from `train`, when all gradients of the first steps are 0.
    """

    def __init__(self, *args: Any, losses: RouterLosses | None, what: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.losses, self.what = losses, what
        self.idle: int | None = 0
        """Steps of this process so far if none had a gradient; None from the first that had one."""

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        if self.idle is not None:
            self.idle = self.idle + 1 if torch.as_tensor(norm) == 0 else None
            last = self.state.global_step + 1 == self.args.max_steps
            if self.idle == IDLE_STEPS or (self.idle and last):
                raise _IdleError(
                    f"--train: with {self.what} nothing learns, in the first steps no weight got a gradient: no token "
                    "of --text uses what trains, or the loss does not depend on it; give other text or another --train"
                )
        return norm

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # The model's own loss would add its balancing loss, which is not what is asked for here.
        ids_BT = inputs["input_ids"]
        found = model(input_ids=ids_BT, use_cache=False)
        logits_NV = found.logits[:, :-1].flatten(0, 1).float()
        loss = torch.nn.functional.cross_entropy(logits_NV, ids_BT[:, 1:].flatten())
        if self.losses:
            loss = loss + self.losses.take()
        return (loss, found) if return_outputs else loss


class _Curve(TrainerCallback):
    """Perplexities on the way, kept among the Trainer's log, so that a resumed run has them too."""

    def __init__(self, interval: int | None, held_out: dict[str, torch.Tensor]) -> None:
        self.interval, self.held_out = interval, held_out

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.interval and state.global_step % self.interval == 0:
            state.log_history.append({"step": state.global_step, "perplexity": perplexities(model, self.held_out)})
            model.train()


def _write(model: nn.Module, anatomy: Anatomy | None, folder: Path, target: Path, report: dict[str, Any]) -> None:
    """The trained checkpoint, into a folder that is not yet the output."""
    if anatomy:
        for ffn in model.sparse_ffns().values() if hasattr(model, "sparse_ffns") else ():
            ffn.router.learn(False)
    step = entry("tune", folder, **{key: report[key] for key in ("steps", "settings")})
    provenance = with_entry(provenance_of(folder), step)
    if has_own_config(read_json(folder / "config.json")):
        save_as_stored(model, folder, target, {"emoe_provenance": provenance})
    else:
        save_as_stored(model, folder, target, {})
        report["provenance"] = provenance
    copy_companions(folder, target)
    if (folder / PARTITION).is_file():
        shutil.copyfile(folder / PARTITION, target / PARTITION)
    write_digests(target)
    write_text(target / TUNED, json.dumps(report, indent=2) + "\n")
    write_history_card(target, folder, report)
    settle_folder(target)
