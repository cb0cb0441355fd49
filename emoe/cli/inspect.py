"""`emoe inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from emoe.checkpoint.given import require_folder
from emoe.cli.options import Json, Quiet


def inspect(
    folder: Annotated[Path, typer.Argument(help="Folder that emoe wrote: converted, changed, exported.")],
    brief: Annotated[bool, typer.Option("--brief", help="What it is, without the report.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every weight file and compare its digest with what was written.")
    ] = False,
    json_output: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what is in a checkpoint that emoe wrote: layers, experts, gate, provenance, quality, what an export is."""
    require_folder(folder, "inspect")
    from emoe.cli.progress import progress_bar
    from emoe.report.inspect import describe
    from emoe.report.tables import print_inspection

    with progress_bar(quiet or json_output or not verify, unit="MiB") as show:
        found = describe(folder, verify, show)
    if json_output:
        print(json.dumps(found, indent=2))
    elif not quiet:
        print_inspection(found, brief)
