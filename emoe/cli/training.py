"""What verbs that make one checkpoint from settings have in common: settings, progress, the report."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from emoe.checkpoint.given import given_model, given_output, require_folder
from emoe.cli.idle import refuse_idle
from emoe.config import Settings, merge_settings
from emoe.plainfiles import read_json


def perform(
    kind: type[Settings],
    flags: dict[str, Any],
    config: Path | None,
    json_output: bool,
    quiet: bool,
    run: str,
    show: str,
    *,
    model: str = "",
    check: Callable[[Any], None] = lambda settings: None,
    says: bool = False,
) -> None:
    """Run a verb and print its report.

    Args:
        kind: its settings.
        flags: those given on the command line.
        config: file with further ones.
        run: ``module:function`` that takes settings and progress and returns the report; imported late, so that
            ``--help`` and bad settings answer at once.
        show: name of the function in `emoe.report.tables` that prints the report.
        model: what ``--model`` is the folder of; empty for a verb without one.
        check: raises `UserError` for settings that fit no model.
        says: whether the function also takes ``say``, which prints a line.
    """
    settings = merge_settings(kind, flags, config)
    refuse_idle(settings)
    check(settings)
    check_early(settings, model)

    from emoe.cli.progress import progress_bar

    module, _, function = run.partition(":")
    verb = getattr(importlib.import_module(module), function)
    say = (lambda line: None) if quiet else (lambda line: print(line, file=sys.stderr, flush=True))
    with progress_bar(quiet, unit="steps") as progress:
        report = verb(settings, progress, **({"say": say} if says else {}))
    if json_output:
        print(json.dumps(report, indent=2))
    elif not quiet:
        getattr(importlib.import_module("emoe.report.tables"), show)(report)
        for note in report.get("notes", []):
            print(f"note: {note}")
        print(f"written: {settings.output}")


def check_early(settings: Any, model: str) -> None:
    """Raise `UserError` for a model that is not there and an output that has no name, before torch is imported.

    Args:
        settings: those of a verb.
        model: as for `perform`.
    """
    if model:
        folder = given_model(settings.model, model)
        if not getattr(settings, "resume", False):  # what is finished needs its model no more
            require_folder(folder, kind=model)
            read_json(folder / "config.json")
    given_output(settings.output)
