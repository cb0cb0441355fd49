"""Plots of reports, as PNG files whose bytes depend on the data alone."""

from __future__ import annotations

from pathlib import Path

from emoe.runtime import atomic_write


def new_figure(width: float, height: float):
    """An empty figure, inches; outside of pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plot_quality(report: dict, path: Path) -> None:
    """Quality against the share of experts a token uses, with the dense model as a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    quality = report["quality"]
    figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    active = [100 * row["active"] for row in quality["rows"]]
    values = [row["value"] for row in quality["rows"]]
    axes.plot(active, values, marker="o", color="#1f6feb", label="Emergent MoE")
    axes.axhline(quality["dense"], color="#57606a", linestyle="--", label=f"dense: {quality['dense']:.4g}")
    if quality["measure"] == "perplexity" and min(values) > 0:
        axes.set_yscale("log")
    for x, y in zip(active, values, strict=True):
        axes.annotate(f"{y:.4g}", (x, y), textcoords="offset points", xytext=(6, 6), fontsize=8)
    axes.set_xlabel("experts used by a token, % of all")
    axes.set_ylabel(quality["measure"] + (" (log scale)" if axes.get_yscale() == "log" else ""))
    name = Path(str(report["model"])).name
    axes.set_title(f"{name}: {report['num_experts']} experts, {report['split']} + {report['gate']}", fontsize=10)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
