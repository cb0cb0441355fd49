"""A sweep's summary: what was chosen and why, what failed, the comparison of what was chosen, its analyses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from emoe.evaluation.compare import Comparison, compare
from emoe.evaluation.runs import SweepRecord, read_run, read_sweep_record
from emoe.evaluation.sweep import Estimate, SweepResult
from emoe.evaluation.sweep_config import slug
from emoe.report.comparison import as_json, as_markdown, points, print_comparison
from emoe.report.comparison_html import as_html
from emoe.report.terminal import terminal
from emoe.runtime import write_text


def write_summary(output: Path, resamples: int, progress: Callable[[str, int, int], None]) -> list[Comparison]:
    """comparison.md, .json and .html for each group of runs that are to be compared, and summary.md.

    Groups differ in what the sweep crosses with all arms; of a group with fewer than two finished arms there is none.
    """
    facts = read_sweep_record(output)
    found, pages = [], {}
    for group, names in facts.groups.items():
        if len(names) < 2:
            continue
        runs = [read_run(output / facts.chosen[name], name=name) for name in names]
        found.append(compare(runs, resamples=resamples, progress=progress))
        stem = "-".join(["comparison", *([slug(group)] if group else [])])
        for suffix, write in {"md": as_markdown, "json": as_json, "html": as_html}.items():
            write_text(output / f"{stem}.{suffix}", write(found[-1]))
        pages[group or "all runs"] = f"{stem}.md"
    write_text(output / "summary.md", _summary(facts, pages))
    return found


def _summary(facts: SweepRecord, pages: dict[str, str]) -> str:
    lines = []
    if facts.selection:
        lines += ["Chosen on ID validation alone (mean score, points):", ""]
        for arm, scores in facts.selection.items():
            shown = ", ".join(
                f"**{name}: {points(score)}**" if name == facts.chosen.get(arm) else f"{name}: {points(score)}"
                for name, score in scores.items()
            )
            lines.append(f"- {arm}: {shown}")
        lines.append("")
    if facts.failed:
        lines += ["Failed:", "", *(f"- {cell}: {why}" for cell, why in facts.failed.items()), ""]
    lines += [f"- [Comparison of {group}]({page})" for group, page in pages.items()] or ["Nothing to compare yet."]
    return "\n".join(lines) + "\n"


def print_sweep(result: SweepResult, found: list[Comparison], output: Path, tables: list[Path]) -> None:
    """On the terminal."""
    for comparison in found:
        print_comparison(comparison)
    console = terminal(highlight=False)
    for arm, scores in result.selection.items():
        shown = ", ".join(f"{name} {points(score)}" for name, score in scores.items())
        console.print(f"{arm}: {result.chosen[arm]} was chosen on ID validation ({shown})")
    for path in tables:
        console.print(f"analysis: {path}")
    console.print(f"{result.ran} runs in {duration(result.seconds)}, {len(result.failed)} failed; written: {output}")


def print_estimate(found: Estimate, output: Path) -> None:
    """Cells, and the time they need."""
    console = terminal(highlight=False)
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
