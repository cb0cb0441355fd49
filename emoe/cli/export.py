"""`emoe export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from emoe.cli.options import Json, Quiet


def export(
    model: Annotated[Path, typer.Option("--model", help="Folder of a converted checkpoint.")],
    output: Annotated[Path, typer.Option("--output", help="Folder to write; must not exist.")],
    to: Annotated[str, typer.Option("--to", help="Format: dense.")] = "dense",
    pad: Annotated[bool, typer.Option("--pad", help="Where layers differ in width, fill up with zeros.")] = False,
    json_output: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a converted checkpoint in another format; 'dense' is the exact way back."""
    from emoe import exporting as formats
    from emoe.cli.progress import progress_bar

    with progress_bar(quiet) as show:
        result = formats.export(model, output, to, pad=pad, progress=show)
    if json_output:
        print(json.dumps(result))
    elif not quiet:
        same = f"{result['identical']} of {result['layers']}"
        if "width" in result:
            padding = f", {result['padded']:,} of them padding" if result["padded"] else ""
            print(f"written: {output}; FFNs of {result['width']:,} neurons{padding}")
        else:
            print(f"written: {output}; {same} converted layers equal the source bit for bit")
