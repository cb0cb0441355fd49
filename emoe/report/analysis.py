"""The analyses of a sweep as files: a table and a plot each, in the sweep's folder."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from emoe.analysis.gains import Gain, Gains, gains
from emoe.analysis.routing import LayerHistory, histories
from emoe.evaluation.compare import compare
from emoe.evaluation.runs import AS_TRAINED, read_run, read_sweep_record
from emoe.evaluation.sweep_config import Analysis, SweepConfig, slug
from emoe.report.comparison import as_markdown, interval, p_value, signed
from emoe.report.plots import new_figure
from emoe.runtime import atomic_write, write_text

Progress = Callable[[str, int, int], None]


def write_analyses(config: SweepConfig, output: Path, resamples: int, progress: Progress) -> list[Path]:
    """Every analysis that the sweep's file asks for. Returns the tables written."""
    written = []
    for wanted in config.analysis:
        if wanted.kind == "gains":
            written.append(_gains(wanted, config, output, resamples, progress))
        elif wanted.kind == "routing":
            written.append(_routing(output))
        else:
            written += _readings(output, resamples, progress)
    return written


def _gains(wanted: Analysis, config: SweepConfig, output: Path, resamples: int, progress: Progress) -> Path:
    found = gains(output, config, wanted.x, wanted.lines, resamples, progress)
    name = f"gains-by-{wanted.x}" + (f"-and-{wanted.lines}" if wanted.lines else "")
    write_text(output / f"{name}.md", gains_markdown(found))
    _save(gains_figure(found), output / f"{name}.png")
    return output / f"{name}.md"


def _readings(output: Path, resamples: int, progress: Progress) -> list[Path]:
    """All readings of arms that may be compared, in one table a group of them."""
    record, written = read_sweep_record(output), []
    for group, names in record.groups.items():
        runs = []
        for name in names:
            folder = output / record.chosen[name]
            runs.append(read_run(folder, name=name))
            others = [reading for reading in runs[-1].first.readings if reading != AS_TRAINED]
            runs += [read_run(folder, reading, f"{name} read as {reading}") for reading in others]
        if len(runs) < 2:
            continue
        written.append(output / ("-".join(["readings", *([slug(group)] if group else [])]) + ".md"))
        found = compare(runs, resamples=resamples, progress=progress)
        write_text(written[-1], as_markdown(found, brief=True))
    return written


def gains_markdown(found: Gains) -> str:
    """One line a point: difference, interval and p in each domain."""
    columns, settings = list(found.points[0].differences), list(dict.fromkeys([found.x, found.lines]))
    lines = [
        f"Gain over the baseline by {found.x}, points, with 95% intervals for new seeds and new examples; p over both, "
        "not adjusted.",
        "",
        "| " + " | ".join([*settings, "seeds", *columns]) + " |",
        "|---:" * (len(settings) + 1 + len(columns)) + "|",
    ]
    for point in found.points:
        cells = [_shown(point, column) for column in columns]
        keys = [*(str(point.point.get(setting, "–")) for setting in settings), str(point.seeds)]
        lines.append("| " + " | ".join([*keys, *cells]) + " |")
    lines += ["", *(f"- not finished: {name}" for name in found.missing)]
    return "\n".join(lines).rstrip() + "\n"


def _shown(point: Gain, column: str) -> str:
    difference = point.differences[column]
    return f"{signed(difference.difference)} {interval(difference)}, p {p_value(difference.p)}"


def gains_figure(found: Gains):
    """A panel a domain, a line with intervals for each value of ``lines``."""
    columns = list(found.points[0].differences)
    values = list(dict.fromkeys(point.point.get(found.x) for point in found.points))
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    figure = new_figure(1.2 + 2.6 * len(columns), 3.6)
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    by_line: dict[Any, list[Gain]] = {}
    for point in found.points:
        by_line.setdefault(point.point.get(found.lines), []).append(point)
    for axes, column in zip(panels, columns, strict=True):
        axes.axhline(0.0, color="#57606a", linestyle="--", linewidth=1)
        for number, (line, points) in enumerate(by_line.items()):
            shift = 1 + 0.02 * (number - (len(by_line) - 1) / 2)  # so that intervals do not hide one another
            xs = [
                p.point[found.x] * shift if numbers else values.index(p.point.get(found.x)) + shift - 1 for p in points
            ]
            middle = np.array([p.differences[column].difference for p in points])
            half = middle - [p.differences[column].low for p in points]
            style = "-o" if numbers else "o"
            axes.errorbar(xs, middle, yerr=half, fmt=style, markersize=4, capsize=2, linewidth=1, label=str(line))
        if numbers:
            if min(values) > 0 and max(values) / min(values) > 8:
                axes.set_xscale("log", base=2)
            axes.set_xticks(values, [f"{value:g}" for value in values])
            axes.minorticks_off()
        else:
            axes.set_xticks(range(len(values)), [str(v) for v in values], rotation=30, ha="right", parse_math=False)
        axes.set_title(column, fontsize=9, parse_math=False)
        axes.set_xlabel(found.x, fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("points over the baseline", fontsize=8)
    if len(by_line) > 1:
        panels[-1].legend(title=found.lines, fontsize=7, title_fontsize=7)
    return figure


def _routing(output: Path) -> Path:
    """Expert selection over training of every arm that has routers."""
    chosen = read_sweep_record(output).chosen
    found = {name: histories(read_run(output / folder)) for name, folder in chosen.items()}
    routed = {name: by_seed for name, by_seed in found.items() if any(by_seed.values())}
    write_text(output / "routing.md", routing_markdown(routed))
    for number, (name, by_seed) in enumerate(routed.items()):
        _save(routing_figure(name, by_seed), output / f"routing-{number}.png")
    return output / "routing.md"


def routing_markdown(routed: dict[str, dict[int, dict[str, LayerHistory]]]) -> str:
    """One line an arm and layer: first and last logged step, means over seeds."""
    lines = [
        "Routing of the same texts at the first and the last logged step, means over seeds. Entropy of the load: 1 is "
        "uniform. Overlap: share of a token's experts that it had at the logged step before. Drift: share of the load "
        "that moved to other experts.",
        "",
        "| arm | layer | seeds | entropy first | last | busiest share first | last | mean overlap | drift | plot |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for number, (name, by_seed) in enumerate(routed.items()):
        for layer in dict.fromkeys(layer for layers in by_seed.values() for layer in layers):
            runs = [layers[layer] for layers in by_seed.values() if layer in layers]
            overlaps = [np.nanmean(r.overlap_T) for r in runs if not np.isnan(r.overlap_T).all()]
            overlap = f"{np.mean(overlaps):.3f}" if overlaps else "–"
            lines.append(
                f"| {name} | {layer} | {len(runs)} "
                f"| {_mean(r.entropy_T[0] for r in runs)} | {_mean(r.entropy_T[-1] for r in runs)} "
                f"| {_mean(r.max_share_T[0] for r in runs)} | {_mean(r.max_share_T[-1] for r in runs)} "
                f"| {overlap} | {_mean(r.drift for r in runs)} | [plot](routing-{number}.png) |"
            )
    return "\n".join(lines) + "\n"


def _mean(values) -> str:
    return f"{np.mean(list(values)):.3f}"


def routing_figure(name: str, by_seed: dict[int, dict[str, LayerHistory]]):
    """A row a layer: frequency of each expert over training (first seed), and entropy and overlap of all seeds."""
    layers = list(dict.fromkeys(layer for of_seed in by_seed.values() for layer in of_seed))
    figure = new_figure(9, 0.6 + 2.6 * len(layers))
    for row, axes in zip(layers, figure.subplots(len(layers), 2, squeeze=False), strict=True):
        seed = min(seed for seed, of_seed in by_seed.items() if row in of_seed)
        history = by_seed[seed][row]
        order = np.argsort(-history.frequencies_TE[0], kind="stable")
        edges = (history.steps_T[0], max(history.steps_T[-1], history.steps_T[0] + 1))
        shown = axes[0].imshow(
            history.frequencies_TE[:, order].T,
            aspect="auto",
            vmin=0,
            vmax=max(1e-9, math.ceil(10 * history.frequencies_TE.max()) / 10),
            extent=(*edges, len(order) - 0.5, -0.5),
            interpolation="nearest",
        )
        figure.colorbar(shown, ax=axes[0], label="share of tokens")
        axes[0].set_ylabel(f"layer {row}: experts, by\nfrequency at first", fontsize=8)
        for of_layer in (of_seed[row] for of_seed in by_seed.values() if row in of_seed):
            axes[1].plot(of_layer.steps_T, of_layer.entropy_T, color="C0", alpha=0.6, linewidth=1)
            axes[1].plot(of_layer.steps_T, of_layer.overlap_T, color="C1", alpha=0.6, linewidth=1)
        axes[1].set_ylim(0, 1.02)
        axes[1].set_ylabel("entropy of the load (blue)\noverlap with the log before (orange)", fontsize=7)
        for panel in axes:
            panel.set_xlabel("optimizer step", fontsize=8)
            panel.tick_params(labelsize=7)
    figure.suptitle(
        f"{name}: experts chosen over training, seed {seed}; curves: all seeds", fontsize=9, parse_math=False
    )
    return figure


def _save(figure, path: Path) -> None:
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
