"""The report of `emoe analyze`: tables, heat maps and one page that needs no other file."""

from __future__ import annotations

import base64
import csv
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from emoe.config import flag_of
from emoe.report.plots import new_figure
from emoe.report.templates import render
from emoe.report.terminal import terminal
from emoe.runtime import atomic_write, write_text

HOW = (
    "A module's domain is the one that gives it the largest share of its choices, over all of the domain's tokens; its "
    "tokens are the single ones, of whatever domain, in which it has the largest share of the layer's energy (or of "
    "the weights, where no energy was measured)."
)
"""Why the two may disagree."""


def write_usage(report: dict[str, Any], folder: Path) -> None:
    """frequencies.csv, divergence-KIND.png, usage.png and index.html, which holds the plots itself."""
    write_text(folder / "frequencies.csv", frequencies(report))
    plots = {}
    for kind in report["divergence"]:
        path = folder / f"divergence-{kind}.png"
        plot_divergence(report, kind, path)
        plots[f"Divergence of domains, {kind} modules"] = path
        usage = folder / f"usage-{kind}.png"
        plot_usage(report, kind, usage)
        plots[f"Use of {kind} modules by layer"] = usage
    embedded = {title: base64.b64encode(path.read_bytes()).decode() for title, path in plots.items()}
    page = render(
        "usage.html.jinja",
        report={"neurons": None, **report},
        plots=embedded,
        how=HOW,
        settings=shown_settings(report["settings"]),
        signed=signed,
        visible=visible,
    )
    write_text(folder / "index.html", page)


def shown_settings(settings: dict[str, Any]) -> dict[str, str]:
    """Flag → value as prose; without those that were left to the model."""
    return {flag_of(key): _shown(value) for key, value in settings.items() if value is not None}


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def visible(token: str) -> str:
    """Ends of lines and tabs as signs, so that they neither break the table nor vanish."""
    return token.replace("\r", "␍").replace("\n", "↵").replace("\t", "⇥")


def signed(change: float) -> str:
    """``+0.00012``; what rounds to 0 has no sign."""
    rounded = round(change, 5)
    return f"{rounded:+.5f}" if rounded else "0.00000"


def frequencies(report: dict[str, Any]) -> str:
    """Comma-separated: a row a module, a column a domain and measure."""
    text = io.StringIO()
    domains, measures = list(report["domains"]), ("frequency", "probability", "energy")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["set", "expert", *(f"{measure} {domain}" for measure in measures for domain in domains)])
    for row in report["sets"]:
        for expert in range(sum(row["groups"])):
            values = [row[m][d][expert] if m in row else None for m in measures for d in domains]
            writer.writerow([row["set"], expert, *("" if v is None else f"{v:.6g}" for v in values)])
    return text.getvalue()


def _save(figure, path: Path) -> None:
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})


def heat_map(axes, values: list[list[float]], names: list[str], title: str) -> None:
    """A square table of domains as colours, with its numbers."""
    values_CC = np.array(values)
    highest = max(1e-9, values_CC.max())  # domains that use modules alike leave no range of colours
    axes.imshow(values_CC, cmap="Blues", vmin=0, vmax=highest)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    for (i, j), value in np.ndenumerate(values_CC):
        colour = "w" if value > highest / 2 else "k"
        axes.text(j, i, f"{value:.3f}", ha="center", va="center", fontsize=7, color=colour)
    axes.set_title(title, fontsize=9)


def plot_divergence(report: dict[str, Any], kind: str, path: Path) -> None:
    """KL and Jensen–Shannon side by side, mean over layers."""
    names, found = list(report["domains"]), report["divergence"][kind]
    side = 1.8 + 0.6 * len(names)
    figure = new_figure(2 * side, side)
    for place, (name, title) in enumerate((("kl", "KL(row ‖ column), nats"), ("js", "Jensen–Shannon, nats"))):
        heat_map(figure.add_subplot(1, 2, place + 1), found[name], names, title)
    _save(figure, path)


def plot_usage(report: dict[str, Any], kind: str, path: Path) -> None:
    """For each domain, layers by modules: how often a token uses it, relative to the mean over domains."""
    rows = [row for row in report["sets"] if row["kind"] == kind]
    names, most = list(report["domains"]), max(sum(row["groups"]) for row in rows)
    tables = np.full((len(names), len(rows), most), np.nan)
    for layer, row in enumerate(rows):
        for place, name in enumerate(names):
            tables[place, layer, : sum(row["groups"])] = row["frequency"][name]
    mean_LE = tables.mean(0)
    figure = new_figure(2.5 + 0.06 * most, (0.9 + 0.12 * len(rows)) * len(names))
    for place, name in enumerate(names):
        axes = figure.add_subplot(len(names), 1, place + 1)
        ratio_LE = np.log2((tables[place] + 1e-3) / (mean_LE + 1e-3))
        image = axes.imshow(ratio_LE, cmap="RdBu_r", vmin=-2, vmax=2, aspect="auto", interpolation="nearest")
        axes.set_title(name, fontsize=9)
        axes.set_ylabel("layer", fontsize=8)
        axes.set_yticks(*layer_ticks(rows))
    axes.set_xlabel("module", fontsize=8)
    figure.colorbar(image, ax=figure.axes, label="log2 of use over mean use", shrink=0.6)
    _save(figure, path)


def layer_ticks(rows: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
    """Rows of a heat map to mark, at most ten, and the numbers of their layers."""
    places = list(range(0, len(rows), math.ceil(len(rows) / 10)))
    return places, [rows[place]["layer"] for place in places]


def print_usage(report: dict[str, Any]) -> None:
    """Domains, divergences and the most specialised modules on the terminal."""
    console = terminal()
    names = list(report["domains"])
    table = Table(title=report["model"])
    for heading in ("domain", "tokens", "perplexity"):
        table.add_column(heading, justify="left" if heading == "domain" else "right")
    for name, row in report["domains"].items():
        table.add_row(name, str(row["tokens"]), "–" if row["perplexity"] is None else f"{row['perplexity']:.4g}")
    console.print(table)
    for kind, found in report["divergence"].items() if len(names) > 1 else ():
        table = Table(title=f"KL(row ‖ column) of {kind} modules, nats, mean over layers")
        for heading in ("", *names):
            table.add_column(heading, justify="right" if heading else "left")
        for name, values in zip(names, found["kl"], strict=True):
            table.add_row(name, *(f"{value:.4f}" for value in values))
        console.print(table)
    table = Table(title="most specialised modules")
    for heading in ("module", "domain", "specialisation", "tokens"):
        table.add_column(heading)
    for row in report["specialised"][:10]:
        tokens = " ".join(repr(example["token"]) for example in row["examples"][:6])
        table.add_row(f"{row['set']} {row['expert']}", row["domain"], f"{row['specialisation']:.3f}", tokens)
    console.print(table)
    console.print(HOW, highlight=False)
    for note in report["notes"]:
        console.print(f"note: {note}", highlight=False)
