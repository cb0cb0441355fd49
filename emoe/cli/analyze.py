"""`emoe analyze`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from emoe.checkpoint.given import WITH_EXPERTS
from emoe.cli.options import ConfigFile, Json, Quiet, with_settings
from emoe.cli.training import check_early
from emoe.config import AnalyzeConfig, merge_settings


@with_settings(settings=AnalyzeConfig)
def analyze(
    flags: dict[str, Any],
    more: Annotated[list[str] | None, typer.Argument(metavar="[NAME=TEXT]...", help="Further --domains.")] = None,
    config: ConfigFile = None,
    json_output: Json = False,
    quiet: Quiet = False,
) -> None:
    """Look inside a model: which experts it uses on which text, and what happens without them."""
    if more:
        flags["domains"] = [*flags.get("domains", []), *more]
    settings = merge_settings(AnalyzeConfig, flags, config)
    check_early(settings, WITH_EXPERTS)

    from emoe.analysis.analyze import analyze as run
    from emoe.cli.progress import progress_bar
    from emoe.report.usage import print_usage, write_usage

    with progress_bar(quiet, unit="steps") as show:
        report = run(settings, show, write_usage)
    if json_output:
        print(json.dumps(report, indent=2))
    elif not quiet:
        print_usage(report)
        print(f"written: {Path(settings.output)}/index.html, usage.json and plots")
