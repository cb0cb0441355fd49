"""Table and plot of a frontier: quality against active experts, one line a way of converting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from emoe.report.terminal import terminal
from emoe.runtime import atomic_write, write_text


def write_frontier(report: dict[str, Any], output: Path) -> None:
    """frontier.json, frontier.md and frontier.png."""
    write_text(output / "frontier.json", json.dumps(report, indent=1) + "\n")
    write_text(output / "frontier.md", markdown(report))
    plot(report, output / "frontier.png")


def _by_way(report: dict[str, Any]) -> dict[str, dict[float, dict[str, Any]]]:
    ways: dict[str, dict[float, dict[str, Any]]] = {}
    for cell in report["cells"]:
        ways.setdefault(cell["name"], {})[cell["wanted"]] = cell
    return ways


def _shown(cell: dict[str, Any] | None, domain: str) -> str:
    """Ratio to dense, and the share that was really active; the value itself where dense is 0."""
    if cell is None:
        return ""
    found = cell["domains"][domain]
    number = found["value"] if found["ratio"] is None else found["ratio"]
    text = f"{number:.3f}" if number < 10 else f"{number:.3g}"
    return f"{text} ({100 * cell['active']:.0f}%)"


def markdown(report: dict[str, Any]) -> str:
    """One table a domain."""
    wanted = sorted({cell["wanted"] for cell in report["cells"]}, reverse=True)
    parts = []
    for domain, dense in report["dense"].items():
        ways = _by_way(report)
        parts += [
            f"{report['measure'].capitalize()} over dense ({dense:.4g}) on {report['tokens'][domain]} held-out tokens, "
            f"{domain}; in brackets the share of experts that tokens got.",
            "",
            "| | experts | " + " | ".join(f"{100 * w:.0f}%" for w in wanted) + " |",
            "|---|---:" + "|---:" * len(wanted) + "|",
        ]
        for name, cells in ways.items():
            experts = next(iter(cells.values()))["experts"]
            row = " | ".join(_shown(cells.get(w), domain) for w in wanted)
            parts.append(f"| {name} | {experts} | {row} |")
        parts.append("")
    return "\n".join(parts)


def print_frontier(report: dict[str, Any]) -> None:
    """The tables on the terminal."""
    wanted = sorted({cell["wanted"] for cell in report["cells"]}, reverse=True)
    for domain, dense in report["dense"].items():
        table = Table(title=f"{report['model']}: {report['measure']} over dense ({dense:.4g}), {domain}")
        for heading in ("", "experts", *(f"{100 * w:.0f}%" for w in wanted)):
            table.add_column(heading, justify="right" if heading else "left")
        for name, cells in _by_way(report).items():
            experts = str(next(iter(cells.values()))["experts"])
            table.add_row(name, experts, *(_shown(cells.get(w), domain) for w in wanted))
        terminal().print(table)  # names come from files that others wrote


def plot(report: dict[str, Any], path: Path) -> None:
    """One panel a domain, a line a way."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    domains = list(report["dense"])
    figure = Figure(figsize=(6.5 * len(domains), 4.8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for place, domain in enumerate(domains):
        axes = figure.add_subplot(1, len(domains), place + 1)
        for number, (name, cells) in enumerate(_by_way(report).items()):
            points = sorted(
                (100 * c["active"], c["domains"][domain]["ratio"] or c["domains"][domain]["value"])
                for c in cells.values()
            )
            style = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":")[number // 10 % 3]}
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name, **style)
        if report["measure"] != "hidden-state error":
            axes.set_yscale("log")
            axes.axhline(1.0, color="#57606a", linestyle="--", linewidth=1)
        axes.set_xlabel("experts that a token gets, % of all")
        axes.set_ylabel(f"{report['measure']} over dense")
        axes.set_title(domain, fontsize=10)
        axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
