"""Rows of results: written as they are measured, read again, and shown as tables and a plot.

Legend: N tokens, D model width, F hidden width, E experts, S = F // E neurons per expert, K experts chosen per token.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from cases import Case, CaseError, Shape
from measure import Outcome, Peak
from registry import DENSE, OURS, by_name

WITHIN = 1.3
"""Times the ideal K / E: what the tables mark."""


class Setting(NamedTuple):
    """What all rows of a file have in common and a resumed run must share."""

    threads: int
    seed: int
    routing: str
    """"random", or the name of a trace file."""
    cache: str
    """"shared" or "cold"; see measure.py."""
    torch: str
    hardware: str
    commit: str | None
    """Git's, with "-dirty" where tracked files differ; None outside of a repository."""


def hardware() -> str:
    """Processor, cores and the instructions that matter here."""
    model, flags = platform.processor() or platform.machine(), set()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() == "flags":
                flags = set(value.split())
    units = [unit for unit in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if unit in flags]
    return f"{model}, {os.cpu_count()} cores, {' '.join(units) or 'no AVX2'}"


def commit() -> str | None:
    """The commit of the working tree that this file lies in."""
    git = ["git", "-C", str(Path(__file__).parent)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        return None
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    return head.stdout.strip() + ("-dirty" if changed else "")


@dataclass(frozen=True)
class Row:
    """One implementation in one case."""

    case: Case
    impl: str
    outcome: Outcome
    union: float
    """Distinct experts that the tokens of a routing use, mean over the routings."""
    peak: Peak | None
    """None where it was not measured."""
    setting: Setting

    def as_json(self) -> dict[str, Any]:
        """Flat, as it stands in the file."""
        shape = self.case.shape
        return {
            "shape": list(shape),
            "tokens": self.case.tokens,
            "dtype": self.case.dtype,
            "pass": self.case.pass_,
            "impl": self.impl,
            "ratio_to_dense": self.outcome.ratio_to_dense,
            "ideal": shape.ideal,
            **{k: v for k, v in asdict(self.outcome).items() if k != "ratio_to_dense"},
            "union": self.union,
            "peak_mib": self.peak and self.peak.first,
            "peak_again_mib": self.peak and self.peak.again,
            **self.setting._asdict(),
        }

    @classmethod
    def from_json(cls, flat: dict[str, Any]) -> Row:
        """The inverse of `as_json`. KeyError or TypeError for something else."""
        return cls(
            case=Case(Shape(*flat["shape"]), flat["tokens"], flat["dtype"], flat["pass"]),
            impl=flat["impl"],
            outcome=Outcome(**{f.name: flat[f.name] for f in fields(Outcome)}),
            union=flat["union"],
            peak=None if flat["peak_mib"] is None else Peak(flat["peak_mib"], flat["peak_again_mib"]),
            setting=Setting(**{name: flat[name] for name in Setting._fields}),
        )


def write_atomically(path: Path, content: str | bytes) -> None:
    """Written beside and renamed: a run that is killed leaves the rows of the last finished case."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content if isinstance(content, bytes) else content.encode())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_rows(path: Path, rows: list[Row]) -> None:
    """A JSON list, one row a line."""
    write_atomically(path, "[\n" + ",\n".join(json.dumps(row.as_json()) for row in rows) + "\n]\n")


def read_rows(path: Path) -> list[Row]:
    """CaseError if the file is not one that `write_rows` wrote."""
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, list):
            raise TypeError("not a list")
        return [Row.from_json(flat) for flat in found]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CaseError(f"--resume: {path} is not a file of results ({type(error).__name__})") from None


def by_case(rows: Iterable[Row]) -> dict[Case, dict[str, Row]]:
    """Rows by case and implementation, cases in the order of the grid."""
    found: dict[Case, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        found[row.case][row.impl] = row
    order = lambda c: (c.shape[:3], c.dtype != "fp32", c.pass_, c.tokens, c.shape.chosen)  # noqa: E731
    return {case: found[case] for case in sorted(found, key=order)}


class Standing(NamedTuple):
    """Ours against the rest, in one case."""

    ours: float
    best_name: str
    """The fastest other sparse implementation; dense does not count, its ratio is 1 by definition."""
    best: float

    @property
    def wins(self) -> bool:
        """Nobody is faster, dense included."""
        return self.ours <= min(self.best, 1.0)


def standing(cells: dict[str, Row]) -> Standing | None:
    """None where ours or every other one has no figure."""
    ratios = {name: row.outcome.ratio_to_dense for name, row in cells.items() if row.outcome.ratio_to_dense is not None}
    others = [name for name in ratios if name != DENSE and not name.startswith(OURS)]
    if OURS not in ratios or not others:
        return None
    best = min(others, key=ratios.get)
    return Standing(ratios[OURS], best, ratios[best])


def _cell(row: Row | None, best: float | None) -> str:
    if row is None:
        return ""
    outcome = row.outcome
    if outcome.error:
        return "wrong" if outcome.error.startswith("wrong") else "crash"
    if outcome.skipped:
        return "skip"
    text = f"{outcome.ratio_to_dense:.3g}"
    return f"**{text}**" if outcome.ratio_to_dense == best else text


def markdown(rows: list[Row], command: str) -> str:
    """Win and loss summary, one table a shape, dtype and pass, memory, and the reasons for missing figures."""
    cases = by_case(rows)
    names = [name for name in by_name() if any(name in cells for cells in cases.values())]
    compared = [name for name in names if name != DENSE]
    setting = rows[-1].setting
    lines = ["# Sparse FFN: time over the dense layer's", "", *_summary(cases), ""]
    groups: dict[tuple, list[Case]] = defaultdict(list)
    for case in cases:
        groups[case.shape[:3], case.dtype, case.pass_].append(case)
    for ((width, hidden, experts), dtype, pass_), members in groups.items():
        lines += [f"## ({width}, {hidden}), {experts} experts of {hidden // experts}, {dtype}, {pass_}", ""]
        heads = ["N", "K/E", "union", "dense ms", *compared, f"≤ {WITHIN} ideal", "fastest"]
        lines += ["| " + " | ".join(heads) + " |", "|---:" * len(heads) + "|"]
        for case in members:
            cells = cases[case]
            ratios = [r.outcome.ratio_to_dense for r in cells.values() if r.outcome.ratio_to_dense is not None]
            ours = cells[OURS].outcome.ratio_to_dense if OURS in cells else None
            place, any_row = standing(cells), next(iter(cells.values()))
            dense = cells[DENSE].outcome.median_ms if DENSE in cells else None
            values = [str(case.tokens), f"{case.shape.ideal:g}", f"{any_row.union:g}"]
            values.append("" if dense is None else f"{dense:.3g}")
            values += [_cell(cells.get(name), min(ratios, default=None)) for name in compared]
            values.append("" if ours is None else "yes" if ours <= WITHIN * case.shape.ideal else "no")
            values.append("" if place is None else "ours" if place.wins else "no")
            lines.append("| " + " | ".join(values) + " |")
        lines.append("")
    lines += _memory(cases, compared) + _spread(rows) + _reasons(rows)
    facts = [
        f"`{command}`, commit {(setting.commit or 'unknown')[:12]}{'-dirty' * str(setting.commit).endswith('-dirty')}",
        f"{setting.hardware}, {setting.threads} threads, torch {setting.torch}",
        f"routing {setting.routing}, caches {setting.cache}, seed {setting.seed}",
    ]
    return "\n".join([*lines, "; ".join(facts) + ".", ""])


def _summary(cases: dict[Case, dict[str, Row]]) -> list[str]:
    places = {case: place for case, cells in cases.items() if (place := standing(cells))}
    own = {case: cells[OURS].outcome.ratio_to_dense for case, cells in cases.items() if OURS in cells}
    own = {case: ratio for case, ratio in own.items() if ratio is not None}
    lines = [
        "Median over rounds of time / dense time of the same round, **fastest in bold**; below 1 is faster than dense. "
        "The ideal is K/E.",
        "",
        f"`{OURS}` is within {WITHIN} times the ideal in {sum(r <= WITHIN * c.shape.ideal for c, r in own.items())} of "
        f"{len(own)} cases, faster than dense in {sum(r < 1 for r in own.values())}, and the fastest of all in "
        f"{sum(p.wins for p in places.values())} of {len(places)} with a figure to compare with.",
    ]
    lost = {case: place for case, place in places.items() if not place.wins}
    if lost:
        lines += ["", f"Losses of `{OURS}`:", ""]
        for case, place in lost.items():
            winner, ratio = (place.best_name, place.best) if place.best < 1 else (DENSE, 1.0)
            lines.append(f"- {case}: {place.ours:.3g}, {winner} {ratio:.3g}")
    return lines


def _memory(cases: dict[Case, dict[str, Row]], names: list[str]) -> list[str]:
    known = {case: cells for case, cells in cases.items() if any(r.peak is not None for r in cells.values())}
    if not known:
        return []
    heads = ["case", DENSE, *names]
    lines = ["## Peak memory of a forward pass, MiB above inputs, weights and output", ""]
    lines += ["First call of a process (with what stays: packed weights, compiled primitives) / second call.", ""]
    lines += ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    for case, cells in known.items():
        peaks = [cells[n].peak if n in cells else None for n in heads[1:]]
        lines.append(f"| {case} | " + " | ".join(f"{p.first:.1f} / {p.again:.1f}" if p else "" for p in peaks) + " |")
    return [*lines, ""]


def _spread(rows: list[Row]) -> list[str]:
    """How much the rounds differ, so that a reader can tell a difference from noise."""
    widths = sorted(r.outcome.iqr_ms / r.outcome.median_ms for r in rows if r.outcome.iqr_ms is not None)
    few = sum(r.outcome.rounds is not None and r.outcome.rounds < 4 for r in rows)
    if not widths:
        return []
    middle, high = widths[len(widths) // 2], widths[len(widths) * 9 // 10]
    return [
        f"Spread: the interquartile range over the median time is {middle:.1%} in the middle row and {high:.1%} at the "
        f"ninth decile; {few} rows have fewer than four rounds. Rounds and minima stand in the JSON.",
        "",
    ]


def _reasons(rows: list[Row]) -> list[str]:
    reasons: dict[tuple[str, str], int] = defaultdict(int)
    for row in rows:
        if row.outcome.error or row.outcome.skipped:
            kind = "error" if row.outcome.error else "skipped"
            reasons[row.impl, f"{kind}: {row.outcome.error or row.outcome.skipped}"] += 1
    if not reasons:
        return []
    lines = [f"- {name}, {count} case{'s' * (count > 1)}, {reason}" for (name, reason), count in reasons.items()]
    return ["## Why figures are missing", "", *lines, ""]


def plot(rows: list[Row], path: Path) -> None:
    """Ratio against K/E: a panel a shape, dtype and pass; ours solid, the best other one dotted, a colour an N."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cases = by_case(rows)
    shapes = sorted({case.shape[:3] for case in cases})
    kinds = list(dict.fromkeys((case.dtype, case.pass_) for case in cases))
    tokens = sorted({case.tokens for case in cases})
    colours = dict(zip(tokens, ["#1f6feb", "#1a7f37", "#9a6700", "#bc4c00", "#8250df"] * len(tokens), strict=False))
    figure = Figure(figsize=(max(6, 4 * len(shapes)), 3 * len(kinds) + 0.8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(kinds), len(shapes), squeeze=False, sharex=True, sharey=True)
    handles, ticks = {}, [2.0**i for i in range(-3, 5)]
    for axes_row, (dtype, pass_) in zip(grid, kinds, strict=True):
        for axes, (width, hidden, experts) in zip(axes_row, shapes, strict=True):
            for n in tokens:
                kind = ((width, hidden, experts), n, dtype, pass_)
                group = [c for c in cases if (c.shape[:3], c.tokens, c.dtype, c.pass_) == kind]
                ours = [(c.shape.ideal, r) for c in group if (r := _ratio(cases[c], OURS)) is not None]
                other = [(c.shape.ideal, p.best) for c in group if (p := standing(cases[c]))]
                if ours:
                    handles[f"N {n}"] = axes.plot(*zip(*ours, strict=True), "o-", color=colours[n], ms=4)[0]
                if other:
                    axes.plot(*zip(*other, strict=True), "x:", color=colours[n], lw=1, ms=4)
            ideals = sorted({c.shape.ideal for c in cases})
            handles["ideal K/E"] = axes.plot(ideals, ideals, "_--", color="black", lw=1)[0]
            axes.axhline(1, color="#57606a", lw=0.8)
            axes.set(xscale="log", yscale="log", xticks=ideals, xticklabels=[f"{i:g}" for i in ideals])
            axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
            axes.set_title(f"({width}, {hidden}), {experts} experts, {dtype} {pass_}", fontsize=9)
    for axes in grid[-1]:
        axes.set_xlabel("K/E")
    for axes_row in grid:
        axes_row[0].set_ylabel("time / dense")
    title = f"dots: {OURS}; crosses: the fastest other sparse one"
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles), title=title)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    write_atomically(path, buffer.getvalue())


def _ratio(cells: dict[str, Row], name: str) -> float | None:
    return cells[name].outcome.ratio_to_dense if name in cells else None
