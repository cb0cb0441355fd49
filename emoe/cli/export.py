"""`emoe export`."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from emoe.cli.options import Json, Quiet
from emoe.errors import UserError
from emoe.exporting import FORMATS, VERIFY_TOKENS

FORMAT_HELP = "Format. " + " ".join(f"{name}: {what}." for name, what in FORMATS.items())


def export(
    model: Annotated[Path, typer.Option("--model", help="Folder of a converted checkpoint.")],
    output: Annotated[
        Path, typer.Option("--output", help="Folder to write; must not exist unless --overwrite is given.")
    ],
    to: Annotated[str, typer.Option("--to", help=FORMAT_HELP)] = "dense",
    pad: Annotated[bool, typer.Option("--pad", help="Where layers differ in width, fill up with zeros.")] = False,
    fix_k: Annotated[
        int | None, typer.Option("--fix-k", help="Give every token of every layer so many experts.", metavar="K")
    ] = None,
    approximate: Annotated[
        bool,
        typer.Option(
            "--approximate",
            help="Write formats, too, that cannot choose as the model does, and added experts without their gates.",
        ),
    ] = False,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; default: the checkpoint's.")
    ] = None,
    verify_tokens: Annotated[
        int, typer.Option("--verify-tokens", help="Tokens to compare both models on; 0 for no comparison.", metavar="N")
    ] = VERIFY_TOKENS,
    verify_text: Annotated[
        str | None,
        typer.Option(
            "--verify-text", help="Text to compare on, such as corpus:essays; as for `emoe convert --calibration`."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing output folder, once the new one is complete.")
    ] = False,
    push_to_hub: Annotated[
        str | None, typer.Option("--push-to-hub", help="Also upload the result to this repository.", metavar="ORG/NAME")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="If the repository is new, make it private.")] = False,
    json_output: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a converted checkpoint in another format and compare the two; 'dense' is the exact way back."""
    if verify_text and not verify_tokens:
        raise UserError("--verify-text: has no effect with --verify-tokens 0; leave it out")
    if private and not push_to_hub:
        raise UserError("--private: has no effect without --push-to-hub; leave it out")
    from emoe import exporting
    from emoe.cli.progress import progress_bar
    from emoe.exporting.hub import check_repository, push

    if push_to_hub:
        check_repository(push_to_hub)
    say = (lambda line: None) if quiet else (lambda line: print(line, file=sys.stderr, flush=True))
    with progress_bar(quiet, unit="parts") as show:
        report = exporting.export(
            model,
            output,
            to,
            pad=pad,
            fix_k=fix_k,
            approximate=approximate,
            dtype=dtype,
            overwrite=overwrite,
            verify_tokens=verify_tokens,
            verify_text=verify_text,
            progress=show,
            say=say,
        )
    if push_to_hub:
        try:
            report["url"] = push(output, push_to_hub, private=private, quiet=quiet or json_output, say=say)
        except UserError as error:
            again = f"`emoe push --model {shlex.quote(str(output))} --repo {push_to_hub}{' --private' * private}`"
            raise UserError(f"{error}; the export is complete in {output}, {again} uploads it") from None
    if json_output:
        print(json.dumps(report))
    elif not quiet:
        from emoe.report.tables import print_export

        print_export(report)
        print(f"written: {output}" + (f", {report['url']}" if push_to_hub else ""))
