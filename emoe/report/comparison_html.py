"""A comparison as one HTML file: tables and plots (SVG) inside it, nothing fetched, every name escaped."""

from __future__ import annotations

import io
import re

from emoe.evaluation.compare import Comparison
from emoe.report.comparison import grids, statements

BASELINE_GREY = "#57606a"


def as_html(found: Comparison) -> str:
    """Render ``comparison.html.jinja``."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("emoe.report", "."),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("comparison.html.jinja").render(
        found=found,
        grids=grids(found),
        statements=statements(found),
        plots=[svg(differences_figure(found)), svg(seeds_figure(found))],
    )


def svg(figure) -> str:
    """The figure as an inline element, the same bytes for the same data."""
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "emoe", "svg.fonttype": "none", "text.parse_math": False}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)


def new_figure(width: float, height: float):
    """An empty figure, inches; outside of pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def differences_figure(found: Comparison):
    """A panel a domain: each run's difference from the baseline with its interval; filled if significant."""
    rows, columns = found.rows[1:], found.columns
    figure = new_figure(1.2 + 2.4 * len(columns), 1.2 + 0.35 * len(rows))
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axes, column in zip(panels, columns, strict=True):
        axes.axvline(0.0, color=BASELINE_GREY, linestyle="--", linewidth=1)
        for place, row in enumerate(rows):
            d = row.differences[column]
            axes.plot([d.low, d.high], [place, place], color=f"C{place % 10}", linewidth=2)
            face = f"C{place % 10}" if d.significant else "white"
            axes.plot(d.difference, place, "o", color=f"C{place % 10}", markerfacecolor=face)
        axes.set_title(column, fontsize=9, parse_math=False)
        axes.grid(alpha=0.3, axis="x")
        axes.tick_params(labelsize=8)
    panels[0].set_yticks(range(len(rows)), [row.name for row in rows], parse_math=False)
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    figure.supxlabel(f"points over {found.baseline}, 95% interval; filled: p Holm < 0.05", fontsize=8, parse_math=False)
    return figure


def seeds_figure(found: Comparison):
    """A panel a domain: every seed of every run as a dot, a line through the mean; a seed's dots joined."""
    columns = found.columns
    figure = new_figure(1.2 + 2.4 * len(columns), 3.2)
    for axes, column in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns, strict=True):
        scores = [row.scores[column] for row in found.rows]
        for of_seed in zip(*(s.by_seed for s in scores), strict=True):
            axes.plot(range(len(scores)), of_seed, color=BASELINE_GREY, alpha=0.25, linewidth=0.8)
        for place, of_run in enumerate(scores):
            colour = BASELINE_GREY if place == 0 else f"C{(place - 1) % 10}"
            axes.plot([place] * len(of_run.by_seed), of_run.by_seed, ".", color=colour)
            axes.plot([place - 0.3, place + 0.3], [of_run.mean] * 2, color=colour, linewidth=2)
        names = [row.name for row in found.rows]
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7, parse_math=False)
        axes.set_title(column, fontsize=9, parse_math=False)
        axes.grid(alpha=0.3, axis="y")
        axes.tick_params(axis="y", labelsize=8)
    figure.supylabel("points", fontsize=8)
    return figure
