"""`emoe models` and `emoe fetch`."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Annotated

import typer

from emoe.cli.options import Json, Quiet


def models(json_output: Json = False, quiet: Quiet = False) -> None:
    """List the models that have a short name, and where they come from; with --quiet the names alone."""
    from emoe.assets import list_models

    rows = list_models()
    if json_output:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
        return
    if quiet:
        print("\n".join(row.alias for row in rows))
        return
    from rich.table import Table

    from emoe.report.terminal import terminal

    table = Table()
    for heading in ("alias", "family", "parameters", "where", "licence", "here"):
        table.add_column(heading, justify="right" if heading == "parameters" else "left")
    for row in rows:
        where = f"package {row.package}" if row.package else f"hub {row.hub_id}"
        licence = row.licence + (", gated" if row.gated else "") + (", --accept-license" * row.needs_acceptance)
        table.add_row(row.alias, row.family, _millions(row.parameters), where, licence, "yes" if row.cached else "")
    terminal().print(table)


def _millions(count: int) -> str:
    return f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.0f} M"


def fetch(
    model: Annotated[str, typer.Argument(help="Alias (see `emoe models`), .gguf file or hub id.")],
    verify: Annotated[bool, typer.Option("--verify", help="Compare checksums of cached files too.")] = False,
    accept_license: Annotated[
        bool, typer.Option("--accept-license", help="Accept a licence that is not free for all use.")
    ] = False,
    json_output: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fetch a model into the cache, checksum-verified, and print its folder."""
    from emoe.assets import resolve_model
    from emoe.cli.progress import progress_bar

    note = (lambda line: None) if quiet else (lambda line: print(line, file=sys.stderr))
    with progress_bar(quiet or json_output, unit="MiB") as show:
        resolved = resolve_model(model, accept_license=accept_license, verify=verify, progress=note, show=show)
    if not quiet:
        print(f"{resolved.source}; licence: {resolved.licence or 'see its folder'}", file=sys.stderr)
    if json_output:
        facts = {"folder": str(resolved.folder), "source": resolved.source, "licence": resolved.licence}
        print(json.dumps(facts, indent=2))
    else:
        print(resolved.folder)
