"""The parts of a report as plain data for its template: each function reads one kind of artefact.

What lies in a folder may have been written by others: files are checked against `emoe.report.records` before anything
of them is used.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np

from emoe.checkpoint.converted import SOURCE_S
from emoe.conversion.workspace import RECOVERED
from emoe.plainfiles import read_json
from emoe.report.history import gate_line, history_line
from emoe.report.inspect import describe
from emoe.report.observe import CoActivation, Observation
from emoe.report.records import Cell, CellDomain, Conversion, Frontier, Quality, Recovery, checked
from emoe.report.svg import Line, chart
from emoe.report.tables import groups_line, short_facts, stock_kind


def conversion(folder: Path) -> dict[str, Any]:
    """What was converted, how well, in what time, and what was done since."""
    found = describe(folder)
    report = Conversion.model_validate(found["report"]) if found.get("report") else None
    kind = "a ModuleFormer" if "modules" in found else stock_kind(found) if found.get("stock") else None
    facts = short_facts(found) if kind else _converted(found)
    steps = found["provenance"].get("history", [])
    facts |= {f"history {number}": history_line(step) for number, step in enumerate(steps, 1)}
    title = Path(report.model).name if report else folder.name
    return {
        "title": title,
        "heading": title + (f", {kind}" if kind else " as its Emergent Mixture-of-Experts"),
        "folder": folder.name,
        "facts": facts,
        "experts": found.get("num_experts"),
        "qualities": _qualities(report.quality) if report and report.quality else [],
        "seconds": sum(report.seconds.values()) if report else None,
        "shares": _shares(report) if report else "",
    }


def _converted(found: dict[str, Any]) -> dict[str, str]:
    provenance = found["provenance"]
    untouched = not found["groups"] and not provenance.get("history")
    return {
        "source": provenance["source"],
        "family": found["source"]["family"],
        "parameters": f"{found['parameters']:,}" + (", none of them new" if untouched else ""),
        "converted layers": f"{len(found['layers'])}: {_ranges(found['layers'])}",
        "experts": _experts(found),
        "always on": str(found["shared_experts"]) if found["shared_experts"] else "none",
        "split": f"{provenance['split']['method']} ({provenance['split']['reference']})",
        "gate": f"{gate_line(found)}; "
        + (f"{found['gate_entries']:,} numbers" if found["gate_entries"] else "nothing is stored for it"),
        "routing": f"{found['routing']}; budget {found['allocation']}",
        "output matrices": str(provenance.get("outputs", SOURCE_S)),
        "calibrated on": f"{provenance['calibration']['tokens']:,} tokens of "
        f"{', '.join(provenance['calibration']['sources'])}",
        "seed": str(provenance["seed"]),
        "digest of the source": provenance["source_digest"],
        "made by": f"emoe {provenance['emoe_version']}",
    }


def _experts(found: dict[str, Any]) -> str:
    groups, fixed = found["groups"], found["routing"] == "top-k" and found["allocation"] == "uniform"
    if groups:
        said = f"{groups_line(groups)} by layer, of {found['neurons_per_expert']} neurons"
    else:
        said = f"{found['num_experts']} of {found['neurons_per_expert']} neurons in each layer"
    said += f"; a token gets {found['num_experts_per_tok']}" + ("" if fixed else " on average")
    extended = any(len(group) > 1 for group in groups or [])
    return said + (", and of those behind a + as many as their gates say" if extended else "")


def _ranges(numbers: list[int]) -> str:
    """``[0, 1, 2, 5]`` → "0–2, 5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _qualities(quality: Quality) -> list[dict[str, Any]]:
    """A table and a chart for each domain."""
    domains = {"calibration domain": quality, **(quality.domains or {})}
    return [
        {
            "domain": name,
            "measure": found.measure,
            "agreement": "cosine" if found.measure == "hidden-state error" else "top\u20111 as dense",
            "dense": found.dense,
            "tokens": found.tokens,
            "rows": found.rows,
            "chart": chart(
                [Line(name, [(100 * row.active, row.value) for row in found.rows])],
                "experts that a token gets, %",
                found.measure,
                log=found.measure == "perplexity",
                level=found.dense,
            ),
        }
        for name, found in domains.items()
    ]


def _shares(report: Conversion) -> str:
    """How the budget of experts was shared among layers."""
    points = [(float(layer.layer), 100 * layer.share) for layer in report.layers if layer.share is not None]
    if len({f"{share:.0f}" for _, share in points}) < 2:
        return ""
    return chart([Line("share", points)], "layer", "experts used, %")


def frontier(path: Path) -> dict[str, Any]:
    """The chart and table of a ``frontier.json``."""
    found = checked(Frontier, read_json(path, "report"), path)
    ways: dict[str, list[Cell]] = {}
    for cell in found.cells:
        ways.setdefault(cell.name, []).append(cell)
    wanted = sorted({cell.wanted for cell in found.cells}, reverse=True)
    domains = []
    for domain, dense in found.dense.items():
        value = lambda cell, domain=domain: _ratio(cell.domains[domain])  # noqa: E731
        own = {name: [c for c in cells if domain in c.domains] for name, cells in ways.items()}
        rows = []
        for name, cells in own.items():
            by_wanted = {cell.wanted: cell for cell in cells}
            shown = (by_wanted.get(w) for w in wanted)
            texts = ["" if c is None else f"{_plain(value(c))} ({100 * c.active:.0f}%)" for c in shown]
            rows.append([name, str(cells[0].experts) if cells else "", *texts])
        domains.append(
            {
                "name": domain,
                "dense": dense,
                "tokens": found.tokens.get(domain, 0),
                "head": ["", "experts", *(f"{100 * w:.0f}%" for w in wanted)],
                "rows": rows,
                "chart": chart(
                    [Line(name, [(100 * c.active, value(c)) for c in cells]) for name, cells in own.items()],
                    "experts that a token gets, %",
                    f"{found.measure} over dense",
                    log=True,
                    level=1.0,
                ),
            }
        )
    return {"model": Path(found.model).name, "measure": found.measure, "domains": domains}


def _plain(value: float) -> str:
    """Four digits, without a power of ten where there is room for the number."""
    return f"{value:,.0f}" if 1e4 <= value < 1e9 else f"{value:.4g}"


def _ratio(found: CellDomain) -> float:
    return found.value if found.ratio is None else found.ratio


def observation(seen: Observation) -> dict[str, Any]:
    """Pictures of co-activation and of load; how domains differ."""
    load_LE = np.sort(seen.load, axis=1)[:, ::-1]
    load_scale = max(2.0, float(np.quantile(load_LE, 0.99)))
    return {
        "tokens": seen.tokens,
        "domains": seen.domains,
        "pictures": [
            {
                "layer": picture.layer,
                "before": picture.before,
                "after": picture.after,
                "scale": (scale := _scale(picture)),
                "before_png": _png(picture.before_BB, -scale / 4, scale),
                "after_png": _png(picture.after_BB, -scale / 4, scale),
            }
            for picture in seen.pictures
        ],
        "load_png": _png(load_LE, 0, load_scale),
        "load_scale": load_scale,
        "load_most": float(load_LE.max()),
        "load_idle": float((load_LE < 0.1).mean()),
        "differences": _differences(seen),
        "specialists": _specialists(seen),
    }


def _scale(picture: CoActivation) -> float:
    """The correlation shown brightest, the same for both pictures of a layer."""
    return max(0.02, float(np.quantile(picture.after_BB.diagonal(), 0.75)))


def _png(values: np.ndarray, low: float, high: float) -> str:
    """A picture with a pixel a value, as a data URL."""
    import matplotlib.image

    file = io.BytesIO()
    matplotlib.image.imsave(file, values, vmin=low, vmax=high, cmap="magma", format="png", metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _differences(seen: Observation) -> str:
    """Share of the choices that would have to move to another expert to make a domain's use that of the first."""
    first, *others = seen.domains
    share = {name: use / np.maximum(use.sum(1, keepdims=True), 1e-12) for name, use in seen.usage.items()}
    lines = []
    for name in others:
        moved_L = 50 * np.abs(share[name] - share[first]).sum(1)
        lines.append(Line(f"{name} against {first}", list(zip(map(float, seen.layers), moved_L.tolist(), strict=True))))
    return chart(lines, "layer", "choices that differ, %")


def _specialists(seen: Observation, count: int = 8) -> list[dict[str, Any]]:
    """The experts whose use differs most between domains."""
    stack_MLE = np.stack([seen.usage[name] for name in seen.domains])
    spread_LE = stack_MLE.max(0) - stack_MLE.min(0)
    if len(seen.domains) < 2:
        return []
    best = np.argsort(spread_LE, axis=None)[::-1][:count]
    places = [np.unravel_index(i, spread_LE.shape) for i in best]
    return [{"layer": seen.layers[row], "expert": int(e), "use": stack_MLE[:, row, e].tolist()} for row, e in places]


def recovery(folder: Path) -> dict[str, Any] | None:
    """What `emoe recover` gained, if the checkpoint went through it."""
    path = folder / RECOVERED
    if not path.is_file():
        return None
    found = checked(Recovery, read_json(path, "report"), path)
    rows = [
        [domain, f"{row.top_k} of {found.num_experts}", f"{100 * row.active:.0f}%"]
        + [f"{perplexity:.4g}" for perplexity in (row.before[domain], row.after[domain])]
        + [f"{perplexity / dense:.3f}" for perplexity in (row.before[domain], row.after[domain])]
        for domain, dense in found.dense.items()
        for row in found.rows
    ]
    return {"steps": found.steps, "minutes": found.minutes, "rows": rows}
