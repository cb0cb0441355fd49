"""`emoe compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from emoe.cli.options import Json, Quiet, Resamples
from emoe.errors import UserError, nearest

FORMATS = ("md", "csv", "json", "html", "latex")


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            help="Run folders, the baseline first; FOLDER@dense or FOLDER@emoe for another reading. A folder of "
            "`emoe sweep` stands for the runs that it chose."
        ),
    ],
    baseline: Annotated[
        str | None, typer.Option("--baseline", help="Run to compare with. [default: the first]")
    ] = None,
    reading: Annotated[
        str, typer.Option("--reading", help="How the tuned weights were run: as-trained, dense or emoe.")
    ] = "as-trained",
    format: Annotated[
        str | None, typer.Option("--format", help="md, csv, json, html or latex. [default: the suffix of --output]")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", help="File to write; replaced if it exists.")] = None,
    resamples: Resamples = 2000,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of these draws.")] = 0,
    per_seed: Annotated[bool, typer.Option("--per-seed", help="Show every seed on the terminal, too.")] = False,
    json_output: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare fine-tuned runs with a baseline: mean and spread, paired differences, intervals, significance, cost."""
    format = _format(format, output)
    if json_output and output is None:
        if format not in (None, "json"):
            raise UserError(f"--json: standard output has room for one format, --format {format}; add --output")
        format = "json"

    if output is not None and not output.parent.is_dir():
        raise UserError(f"--output: {output.parent} is not a folder; make it first")

    from emoe.evaluation.runs import read_runs

    found = read_runs(runs, reading)

    from emoe.cli.progress import progress_bar
    from emoe.disk import full_disk_told
    from emoe.evaluation.compare import compare as compute
    from emoe.report.comparison import formats, print_comparison
    from emoe.runtime import write_text

    with progress_bar(quiet, unit="domains") as show:
        found = compute(found, baseline, resamples, seed, show)
    if format is None:
        if not quiet:
            print_comparison(found, per_seed)
        return
    text = formats()[format](found)
    if output is None:
        print(text, end="")
        return
    with full_disk_told(output):
        write_text(output, text)
    if json_output:
        print(formats()["json"](found), end="")
    elif not quiet:
        print_comparison(found, per_seed)
        print(f"written: {output}")


def _format(given: str | None, output: Path | None) -> str | None:
    """The format asked for, or that of the file's name."""
    if given is not None and given not in FORMATS:
        raise UserError(f"--format: unknown '{given}'{nearest(given, FORMATS)}. Known: {', '.join(FORMATS)}")
    if given is None and output is not None:
        suffix = {".tex": "latex", ".htm": "html", ".markdown": "md"}.get(output.suffix, output.suffix[1:])
        if suffix not in FORMATS:
            raise UserError(f"--format: '{output.name}' tells no format; give one of {', '.join(FORMATS)}")
        return suffix
    return given
