"""`emoe frontier`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from emoe.assets.resolve import check_name
from emoe.cli.options import Json, Quiet, with_settings
from emoe.config import resolve_config
from emoe.errors import UserError

_NOT_HERE = frozenset(
    {"output", "resume", "overwrite", "dry_run", "checkpoint_seconds", "split", "gate", "active", "budget", "top_k"}
)


@with_settings(leave_out=_NOT_HERE)
def frontier(
    flags: dict[str, Any],
    output: Annotated[Path, typer.Option("--output", help="Folder for cells, table and plot; goes on if it exists.")],
    splits: Annotated[str, typer.Option("--splits", help="Splits to cross with --gates, by commas.")] = "",
    gates: Annotated[str, typer.Option("--gates", help="Gates to cross with --splits; 'oracle' is the bound.")] = "",
    methods: Annotated[
        str, typer.Option("--methods", help="Known methods by commas, or 'all'. [default: emoe, if nothing is named]")
    ] = "",
    grid: Annotated[Path | None, typer.Option("--grid", help="YAML file: names, and settings under each.")] = None,
    active: Annotated[str, typer.Option("--active", help="Shares of experts, by commas.")] = "0.25,0.5,0.75",
    json_output: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure many ways of converting one model: a table and a plot of quality against active experts."""
    if bool(splits) != bool(gates):
        raise UserError("--splits and --gates are crossed with each other; give both or neither")
    try:
        actives = [float(a) for a in _listed(active)]
    except ValueError:
        raise UserError(f"--active: '{active}' is not a list of numbers such as 0.25,0.5,0.75") from None
    resolve_config(flags)
    check_name(flags.get("model", ""))

    from emoe.cli.progress import progress_bar
    from emoe.conversion.frontier import frontier as compute
    from emoe.conversion.frontier import known_methods, read_grid

    ways = {f"{s} + {g}": {"split": s, "gate": g} for s in _listed(splits) for g in _listed(gates)}
    ways |= known_methods(_listed(methods)) if methods else {}
    ways |= read_grid(grid) if grid else {}
    with progress_bar(quiet, unit="% of a cell") as show:
        report = compute(flags, ways or known_methods(["emoe"]), actives, output, show)
    if json_output:
        print(json.dumps(report, indent=1))
    elif not quiet:
        from emoe.report.frontier import print_frontier

        print_frontier(report)
        print(f"written: {output}/frontier.json, .md, .png")


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
