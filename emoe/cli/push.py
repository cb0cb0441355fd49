"""`emoe push`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from emoe.cli.options import Json, Quiet


def push(
    model: Annotated[Path, typer.Option("--model", help="Folder of a checkpoint that emoe wrote.")],
    repo: Annotated[str, typer.Option("--repo", help="Repository on the hub.", metavar="ORG/NAME")],
    private: Annotated[bool, typer.Option("--private", help="If the repository is new, make it private.")] = False,
    json_output: Json = False,
    quiet: Quiet = False,
) -> None:
    """Upload a checkpoint with its model card to the Hugging Face hub."""
    from emoe.exporting.hub import push as upload

    silent = quiet or json_output
    url = upload(model, repo, private=private, quiet=silent, flag="--repo", say=None if silent else print)
    if json_output:
        print(json.dumps({"url": url}))
    elif not quiet:
        print(f"uploaded: {url}")
