"""What an interrupted training goes on from: the Trainer's states and the settings that they were made with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from emoe.errors import UserError
from emoe.plainfiles import read_json
from emoe.runtime import write_text


def states(training: Path) -> list[Path]:
    """Complete states of the Trainer, the latest last."""
    found = [path for path in training.glob("checkpoint-*") if _is_complete(path)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def _is_complete(state: Path) -> bool:
    """Whether the Trainer came to the end of its last file, which it does not write atomically."""
    try:
        return "global_step" in read_json(state / "trainer_state.json", "--resume")
    except UserError:
        return False


def same_settings(settings: dict[str, Any], training: Path, *, resume: bool, what: str) -> None:
    """Start `training` anew, or refuse to go on with the states of another run.

    Args:
        settings: all that the result depends on.
        what: the kind of run, for the message: "recovery".
    """
    text = json.dumps(settings)
    kept = training / "settings.json"
    if not resume or not states(training):
        shutil.rmtree(training, ignore_errors=True)
        training.mkdir(parents=True)
        write_text(kept, text)
    elif kept.read_text(encoding="utf-8") != text:
        raise UserError(f"--resume: the unfinished {what} had other settings; use the same ones or --overwrite")
