"""Where the record of a fine-tuned run lies, and the model that it speaks of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from emoe.checkpoint.given import given_model
from emoe.errors import UserError
from emoe.plainfiles import read_json

RECORD = "run.json"


def find_run(name: str) -> tuple[dict[str, Any] | None, Path]:
    """The run's record, if ``--model`` names one, and the folder with the model.

    Raises:
        UserError: nothing was named, or what is there is no run and no model, or not one alone.
    """
    folder = given_model(name, "a run (OUTPUT/seed-S) or of a model").expanduser()
    if (folder / "model").is_dir() and (folder / RECORD).is_file():
        return read_json(folder / RECORD), folder / "model"
    if (folder / RECORD).is_file():
        raise UserError(f"--model: the run {folder} was made with --discard-model; its weights are gone")
    seeds = sorted(path.parent.name for path in folder.glob(f"seed-*/{RECORD}"))
    if seeds:
        raise UserError(f"--model: {folder} holds several runs; choose one, such as {folder / seeds[0]}")
    if not (folder / "config.json").is_file():
        raise UserError(f"--model: {folder} is not a model folder: it has neither {RECORD} nor config.json")
    return None, folder
