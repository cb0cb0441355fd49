"""`emoe eval`."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from emoe.cli.options import ConfigFile, Json, Quiet, with_settings
from emoe.config import merge_settings
from emoe.finetuning.record import find_run
from emoe.finetuning.settings import EvalConfig

_As = Annotated[str | None, typer.Option("--as", help="Short for --read-as.", metavar="TEXT")]


@with_settings(settings=EvalConfig)
def evaluate(
    flags: dict[str, Any],
    read_as_too: _As = None,
    config: ConfigFile = None,
    json_output: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score a fine-tuned model again: on other sets, read as dense or as EMoE, or on the benchmarks of lm-eval."""
    settings = merge_settings(EvalConfig, flags | ({"read_as": read_as_too} if read_as_too else {}), config)
    find_run(settings.model)

    from emoe.cli.progress import progress_bar
    from emoe.finetuning.evaluate import evaluate as run

    with progress_bar(quiet, unit="sets") as show:
        report = run(settings, show, None if quiet else lambda line: print(line, file=sys.stderr))
    if json_output:
        print(json.dumps(report, indent=2))
    elif not quiet:
        from emoe.report.scores import print_scores

        print_scores(report)
