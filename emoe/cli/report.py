"""`emoe report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from emoe.cli.options import Json, Quiet


def report(
    paths: Annotated[
        list[Path], typer.Argument(help="Converted checkpoints, folders of `emoe frontier`, run folders.")
    ],
    html: Annotated[Path, typer.Option("--html", help="File to write; replaced if it exists.")],
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            help="Text to watch the experts on, such as corpus:essays, once for each; as for `emoe convert "
            "--calibration`. [default: builtin, builtin-code]",
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens",
            help="Tokens of each text; 0 for no pictures of experts. [default: 1024; 0 of ModuleFormers, of models "
            "after surgery and of those without a tokenizer]",
        ),
    ] = None,
    json_output: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write one HTML page on conversions, frontiers and fine-tuned runs, to be read without a network."""
    from emoe.cli.progress import COMPARING, progress_bar
    from emoe.report.page import TEXTS
    from emoe.report.page import report as write

    with progress_bar(quiet, others=COMPARING) as show:
        found = write(paths, html, text or TEXTS, tokens, show)
    if json_output:
        print(json.dumps(found, indent=2))
    elif not quiet:
        for note in found["notes"]:
            print(f"note: {note}")
        print(f"written: {html}")
