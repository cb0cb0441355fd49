"""What an interrupted training goes on from: the Trainer's states and the settings that they were made with."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerState

from emoe.conversion.resuming import require_same_settings
from emoe.disk import remove_folder
from emoe.errors import UserError
from emoe.plainfiles import read_json
from emoe.runtime import write_text

STATE = "trainer_state.json"

PARTS = (r"(adapter_)?model.*\.safetensors.*|pytorch_model.*", r"optimizer.*", r"scheduler\.pt", r"rng_state.*\.pth")
"""Names of what a state has beside `STATE`: weights, also in shards, of an adapter or of FSDP, and what trains them."""

SOURCES = "digests.json"
"""Beside the states: digests of the model and the text that they were made from."""


def states(training: Path) -> list[Path]:
    """Complete states of the Trainer, the latest last."""
    found = [path for path in training.glob("checkpoint-*") if _is_complete(path)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def _is_complete(state: Path) -> bool:
    """Whether the Trainer came to the end of its last file, which it does not write atomically, and all others are
    there: it does not remove a state atomically, either."""
    try:
        facts = read_json(state / STATE, "--resume")
    except UserError:
        return False
    names = [path.name for path in state.iterdir()]
    return "global_step" in facts and all(any(re.fullmatch(part, name) for name in names) for part in PARTS)


def keep_latest(training: Path, facts: TrainerState) -> None:
    """Remove all states but the one just saved and the best."""
    kept = {f"checkpoint-{step}" for step in (facts.global_step, facts.best_global_step)}
    for state in training.glob("checkpoint-*"):
        if state.name not in kept:
            remove_folder(state)


def train_from(trainer: Trainer, state: Path | None) -> None:
    """Train, from `state` if there is one, whatever folder it was in when it was written.

    With a state that has made all steps, or was to be the last by --patience, the Trainer would make one more: that one
    is only loaded. Not with FSDP, whose states take a wrapped model; there the further step after all of them has a
    learning rate of 0.

    Raises:
        UserError: the best of the states so far is gone.
    """
    if state is None:
        trainer.train()
        return
    facts = TrainerState.load_from_json(str(state / STATE))
    best = _best(facts, state)
    if not _is_last(facts) or trainer.args.fsdp:
        if best:
            trainer.add_callback(_Best(best))
        trainer.train(resume_from_checkpoint=str(state))
        return
    trainer.state = facts
    trainer.state.best_model_checkpoint = best
    trainer._load_from_checkpoint(str(state))
    if trainer.args.load_best_model_at_end and best:
        trainer._load_best_model()


def _best(facts: TrainerState, state: Path) -> str | None:
    """The best state, beside `state`. The path that the Trainer keeps was relative to the folder of another process."""
    if not facts.best_global_step:
        return None
    best = state.parent / f"checkpoint-{facts.best_global_step}"
    if not (best.is_dir() and _is_complete(best)):
        raise UserError(f"--resume: {best}, the best state so far, is gone; add --overwrite to start again")
    return str(best)


class _Best(TrainerCallback):
    """Gives a Trainer that goes on the path of the best state, once it has read the path that was kept."""

    def __init__(self, best: str) -> None:
        self.best = best

    def on_train_begin(self, args, state, control, **kwargs):
        state.best_model_checkpoint = self.best


def _is_last(facts: TrainerState) -> bool:
    control = facts.stateful_callbacks.get("TrainerControl", {}).get("args", {})
    return facts.global_step >= facts.max_steps or bool(control.get("should_training_stop"))


def same_settings(settings: dict[str, Any], training: Path, *, resume: bool, what: str) -> None:
    """Start `training` anew, or refuse to go on with the states of another run.

    Args:
        settings: all that the result depends on.
        what: the kind of run, for the message: "recovery".
    """
    kept = training / "settings.json"
    if not resume or not states(training):
        remove_folder(training)
        training.mkdir(parents=True)
        write_text(kept, json.dumps(settings))
    else:
        require_same_settings(settings, kept, what)
