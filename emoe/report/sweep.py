"""A sweep's summary: what was chosen and why, what failed, the comparison of what was chosen, its analyses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from emoe.checkpoint.reader import read_json
from emoe.evaluation.compare import Comparison, compare
from emoe.evaluation.runs import read_runs
from emoe.evaluation.sweep import Estimate, SweepResult
from emoe.report.comparison import as_json, as_markdown, points, print_comparison
from emoe.report.comparison_html import as_html
from emoe.runtime import write_text


def write_summary(output: Path, resamples: int, progress: Callable[[str, int, int], None]) -> Comparison | None:
    """comparison.md, .json and .html, summary.md; the comparison is None if fewer than two arms finished."""
    facts = read_json(output / "sweep.json")
    found = None
    if len(facts["chosen"]) > 1:
        found = compare(read_runs([str(output)]), facts["baseline"], resamples, progress=progress)
        for suffix, write in {"md": as_markdown, "json": as_json, "html": as_html}.items():
            write_text(output / f"comparison.{suffix}", write(found))
    write_text(output / "summary.md", _summary(facts))
    return found


def _summary(facts: dict) -> str:
    lines = []
    if facts["selection"]:
        lines += ["Chosen on ID validation alone (mean score, points):", ""]
        for arm, scores in facts["selection"].items():
            shown = ", ".join(
                f"**{name}: {points(score)}**" if name == facts["chosen"].get(arm) else f"{name}: {points(score)}"
                for name, score in scores.items()
            )
            lines.append(f"- {arm}: {shown}")
        lines.append("")
    if facts["failed"]:
        lines += ["Failed:", "", *(f"- {cell}: {why}" for cell, why in facts["failed"].items()), ""]
    lines.append("[Comparison](comparison.md)" if len(facts["chosen"]) > 1 else "Nothing to compare yet.")
    return "\n".join(lines) + "\n"


def print_sweep(result: SweepResult, found: Comparison | None, output: Path, tables: list[Path]) -> None:
    """On the terminal."""
    if found is not None:
        print_comparison(found)
    console = Console(markup=False, highlight=False)
    for arm, scores in result.selection.items():
        shown = ", ".join(f"{name} {points(score)}" for name, score in scores.items())
        console.print(f"{arm}: {result.chosen[arm]} was chosen on ID validation ({shown})")
    for path in tables:
        console.print(f"analysis: {path}")
    console.print(f"{result.ran} runs in {duration(result.seconds)}, {len(result.failed)} failed; written: {output}")


def print_estimate(found: Estimate, output: Path) -> None:
    """Cells, and the time they need."""
    console = Console(markup=False, highlight=False)
    for name in found.left:
        console.print(f"to run: {name}")
    for name in found.done:
        console.print(f"done:   {name}")
    needed = "unknown" if found.seconds is None else duration(found.seconds)
    console.print(f"{len(found.left)} to run, {len(found.done)} done in {output}; time left: {needed} ({found.basis})")


def duration(seconds: float) -> str:
    """``2 h 05 min``, ``3 min 20 s``, ``12 s``."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
