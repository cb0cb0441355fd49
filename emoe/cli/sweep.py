"""`emoe sweep`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from emoe.cli.options import Json, Quiet, Resamples


def sweep(
    config: Annotated[Path, typer.Argument(help="YAML file, such as configs/sweeps/sentiment_minilm.yaml.")],
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder; goes on if it exists. [default: runs/NAME-OF-THE-FILE]")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the cells and the time they need; run none.")
    ] = False,
    resamples: Resamples = 2000,
    json_output: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune many arms, seeds and settings from one file, and compare them. Run it again to go on."""
    from emoe.cli.progress import progress_bar
    from emoe.evaluation.sweep_config import read_sweep

    settings = read_sweep(config)
    folder = output or Path("runs") / config.stem
    if dry_run:
        from emoe.evaluation.sweep import estimate
        from emoe.report.sweep import print_estimate

        found = estimate(settings, folder)
        if json_output:
            print(json.dumps(asdict(found)))
        elif not quiet:
            print_estimate(found, folder)
        return
    from emoe.disk import full_disk_told
    from emoe.evaluation.sweep import sweep as run
    from emoe.report.analysis import write_analyses
    from emoe.report.sweep import print_sweep, write_summary

    say = (lambda line: None) if quiet else lambda line: print(line, file=sys.stderr, flush=True)
    with full_disk_told(folder, "start again: runs that are finished stay"):
        with progress_bar(quiet, unit="runs") as show:
            result = run(settings, folder, show, say)
        with progress_bar(quiet, unit="domains") as show:
            found = write_summary(folder, resamples, show)
            tables = write_analyses(settings, folder, resamples, show) if found else []
    if json_output:
        print(json.dumps(asdict(result)))
    elif not quiet:
        print_sweep(result, found, folder, tables)
    if result.failed:
        raise typer.Exit(1)
