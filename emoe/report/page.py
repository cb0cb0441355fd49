"""`emoe report`: conversions, frontiers and fine-tuned runs on one page that needs no network."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from emoe.conversion.workspace import EXPORTED
from emoe.disk import full_disk_told
from emoe.errors import UserError
from emoe.report.templates import render
from emoe.runtime import write_text

FRONTIER = "frontier.json"
TEXTS = ["builtin", "builtin-code"]
"""Text that experts are watched on by default: Python's documentation and its source code."""

TOKENS = 1024
"""Of each text by default."""

Progress = Callable[[str, int, int], None]


def report(
    paths: list[Path], output: Path, texts: list[str], tokens: int | None, progress: Progress
) -> dict[str, list[str]]:
    """Write the page. Returns what is on it: names of models, of frontiers and of runs; and notes on what is not.

    Args:
        paths: converted checkpoints, folders of `emoe frontier`, run folders; a frontier inside a checkpoint's folder
            goes along.
        output: HTML file; replaced if it exists.
        texts: to watch the experts on, as for ``--calibration``.
        tokens: of each text; 0 for no such pictures, None for `TOKENS` where experts can be watched.

    Raises:
        UserError: a path that is none of these, something damaged in one, or a file that cannot be written.
    """
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise UserError(f"--html: {output} is a folder or lies in none; name a file in an existing folder")
    models, frontiers, runs = _sort(paths)

    from emoe.report import sections
    from emoe.report.observe import observe

    converted, notes = [], []
    for folder in models:
        why_not = _unwatched(folder) if tokens is None else None
        if why_not:
            notes.append(why_not)
        wanted = 0 if why_not else TOKENS if tokens is None else tokens
        part = sections.conversion(folder) | {"recovery": sections.recovery(folder)}
        seen = observe(folder, list(dict.fromkeys(texts)), wanted, progress) if wanted else None
        converted.append(part | {"seen": sections.observation(seen) if seen else None})
    grids = [sections.frontier(path) for path in frontiers]
    comparison = _comparison(runs, progress) if runs else None
    page = render("page.html.jinja", converted=converted, grids=grids, runs=comparison)
    with full_disk_told(output, flag="--html"):
        write_text(output, page)
    return {
        "models": [part["title"] for part in converted],
        "frontiers": [str(path.parent) for path in frontiers],
        "runs": [str(run) for run in runs],
        "written": [str(output)],
        "notes": notes,
    }


def _unwatched(folder: Path) -> str | None:
    """Why a model's experts are not watched unless that is asked for; None if they are."""
    from emoe.calibration.text import read_tokenizer
    from emoe.report.observe import unwatchable

    if kind := unwatchable(folder):
        return f"{folder} is {kind}: no pictures of experts on text; emoe analyze shows their use"
    try:
        read_tokenizer(folder, "no pictures of experts on text", "report")
    except UserError as error:
        return str(error).removeprefix("report: ")
    return None


def _sort(paths: list[Path]) -> tuple[list[Path], list[Path], list[Path]]:
    """Checkpoints, frontier.json files and run folders among `paths`."""
    models, frontiers, runs = [], [], []
    for path in paths:
        if not path.is_dir():
            raise UserError(f"report: {path} is not a folder; give converted checkpoints, frontiers or run folders")
        inside = [path / FRONTIER, path / "frontier" / FRONTIER]
        found = next((file for file in inside if file.is_file()), None)
        if found:
            frontiers.append(found)
        if (path / "config.json").is_file() or (path / EXPORTED).is_file():  # a .gguf file has its own config
            models.append(path)
        elif next(path.glob("seed-*/run.json"), None) or next(path.glob("*/seed-*/run.json"), None):
            runs.append(path)
        elif not found:
            raise UserError(
                f"report: {path} holds no converted checkpoint (config.json), no {FRONTIER} and no finished run "
                "(seed-0/run.json)"
            )
    return models, frontiers, runs


def _comparison(runs: list[Path], progress: Progress) -> dict[str, Any]:
    """What the page of `emoe compare` says."""
    if importlib.util.find_spec("emoe.evaluation") is None:
        raise UserError("report: this version cannot compare runs; give checkpoints and frontiers")
    from emoe.evaluation.compare import compare
    from emoe.evaluation.runs import read_runs
    from emoe.report.comparison_html import parts

    single = [run if next(run.glob("seed-*/run.json"), None) else child for run in runs for child in _children(run)]
    return parts(compare(read_runs(list(dict.fromkeys(map(str, single)))), None, 2000, 0, progress))


def _children(run: Path) -> list[Path]:
    """The run folders in a folder of runs; of a run folder, itself."""
    if next(run.glob("seed-*/run.json"), None):
        return [run]
    return sorted({found.parents[1] for found in run.glob("*/seed-*/run.json")})
