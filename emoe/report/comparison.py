"""A comparison as text: terminal tables, Markdown, CSV and LaTeX. HTML is in `comparison_html`."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass

from rich import box
from rich.table import Table

from emoe.evaluation.compare import LEVEL, Comparison, Cost, Difference, Row, Scores
from emoe.evaluation.significance import smallest_p
from emoe.report.terminal import terminal
from emoe.runtime import format_bytes


@dataclass(frozen=True)
class Grid:
    """A table of text, whatever it is printed as. The first column is left, the others right."""

    title: str
    head: list[str]
    body: list[list[str]]
    strong: frozenset[tuple[int, int]] = frozenset()
    """(row, column) of cells that stand out."""


def grids(found: Comparison, per_seed: bool = True) -> list[Grid]:
    """Everything that a comparison says, table by table."""
    tables = [_scores(found), _differences(found), _costs(found)]
    return [*tables, _by_seed(found)] if per_seed else tables


def statements(found: Comparison) -> list[str]:
    """What must be known to read the tables: conditions first, then what was left out or differs."""
    seeds = ", ".join(map(str, found.seeds))
    lines = [
        f"Task {found.task}; {_seeds(len(found.seeds))} in pairs ({seeds}); baseline {found.baseline}; in points.",
        _question(found),
        _power(found),
    ]
    if any(interval(d) == "–" for row in found.rows for d in row.differences.values()):
        lines.append(
            "No interval (–): no draw of examples changes the difference, as where two runs give the same answers, or "
            "each the same answer to everything."
        )
    if found.friedman_p is not None:
        ood = sum(domain.role == "ood" for domain in found.domains)
        lines.append(
            f"Friedman's test over {ood} OOD domains that all runs rank alike: {equation(found.friedman_p)}. The same "
            "trained models are scored on all of them, so it tells whether runs rank alike over these domains, not "
            "whether new seeds would."
        )
    return lines + [f"Note: {note}." for note in found.notes]


def _question(found: Comparison) -> str:
    """What intervals and p are about."""
    if len(found.seeds) == 1:
        said = "Intervals (95%) and p examples are for new examples alone: one seed tells nothing of other seeds"
    else:
        said = "Intervals (95%) and p are for new seeds and new examples together"
    holm = f"; Holm adjusts p over the {len(found.domains)} domains, not over runs" if len(found.domains) > 1 else ""
    return f"{said}, from {found.resamples} resamples{holm}."


def _power(found: Comparison) -> str:
    seeds, least, family = len(found.seeds), p_value(found.smallest_p), len(found.domains)
    adjusted = min(1.0, family * found.smallest_p)
    needed = next(count for count in range(1, 99) if family * smallest_p(count) < LEVEL)
    if found.smallest_p > LEVEL:
        domains = f", {needed} after Holm over {family} domains" if family > 1 else ""
        return (
            f"With {_seeds(seeds)} no exchange of arms can give a p below {least}: nothing in this table can be "
            f"significant at 0.05, whatever the difference; 6 seeds are the least{domains}, 8 to 10 are sensible."
        )
    floor = f"With {_seeds(seeds)} the smallest p that exchanging arms can give is {least}"
    if family == 1:
        return f"{floor}."
    floor += f", {p_value(adjusted)} after Holm over {family} domains"
    if adjusted < LEVEL:
        return f"{floor}."
    return f"{floor}: no single domain can be significant at 0.05, whatever the difference; that takes {needed} seeds."


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


def points(value: float) -> str:
    """``83.41``."""
    return f"{value:.2f}"


def signed(value: float) -> str:
    """``+0.31``; a minus sign proper."""
    return f"{value:+.2f}".replace("-", "−")


def p_value(value: float) -> str:
    """Three digits, never a 0."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def equation(p: float) -> str:
    """``p = 0.031`` or ``p < 0.001``."""
    return f"p {'' if p < 0.001 else '= '}{p_value(p)}"


def mean_std(scores: Scores) -> str:
    """``83.41 ± 0.52``."""
    return points(scores.mean) + ("" if scores.std is None else f" ± {scores.std:.2f}")


def interval(difference: Difference) -> str:
    """``[−0.20, +0.83]``, or – where nothing varies."""
    if difference.high - difference.low < 1e-9:
        return "–"
    return f"[{signed(difference.low)}, {signed(difference.high)}]"


def _headings(found: Comparison) -> list[str]:
    roles = {domain.name: {"ood": "OOD", "id-test": "ID"}[domain.role] for domain in found.domains}
    return [f"{column} ({roles[column]})" if column in roles else column for column in found.columns]


def _scores(found: Comparison) -> Grid:
    best = {column: max(row.scores[column].mean for row in found.rows) for column in found.columns}
    ranked = any(row.ood_rank is not None for row in found.rows)
    body, strong = [], set()
    for number, row in enumerate(found.rows):
        cells = [row.name]
        for place, column in enumerate(found.columns):
            cells.append(mean_std(row.scores[column]))
            if row.scores[column].mean == best[column]:
                strong.add((number, place + 1))
        cells.append(f"{row.rank:.2f}")
        body.append(cells + ([f"{row.ood_rank:.2f}"] if ranked else []))
    metrics = ", ".join(dict.fromkeys(domain.metric.replace("_", " ") for domain in found.domains))
    head = ["run", *_headings(found), "rank", *(["OOD rank"] if ranked else [])]
    return Grid(f"{metrics}, mean ± std over {_seeds(len(found.seeds))}", head, body, frozenset(strong))


def _differences(found: Comparison) -> Grid:
    head = ["run", "domain", "difference", "95% interval", "p seeds", "p examples", "p both", "p Holm"]
    body, strong = [], set()
    for row in found.rows[1:]:
        for column in found.columns:
            d = row.differences[column]
            if d.significant:
                strong.add((len(body), 2))
            holm = "–" if d.p_holm is None else p_value(d.p_holm)
            body.append(
                [
                    *(row.name, column, signed(d.difference), interval(d)),
                    *(p_value(d.p_seeds), p_value(d.p_examples), p_value(d.p), holm),
                ]
            )
    return Grid(f"difference from {found.baseline}, points", head, body, frozenset(strong))


def _costs(found: Comparison) -> Grid:
    head = ["run", "method", "tuning", "trainable", "steps", "seconds", "ms a step", "peak memory"]
    body = [
        [
            *(row.name, row.method, row.tuning, f"{row.cost.trainable_parameters:,}", f"{row.cost.steps:.0f}"),
            *(f"{row.cost.seconds:.0f}", f"{1000 * row.cost.seconds_per_step:.0f}"),
            format_bytes(row.cost.peak_memory_bytes),
        ]
        for row in found.rows
    ]
    return Grid("cost, mean over seeds", head, body)


def _by_seed(found: Comparison) -> Grid:
    body = [
        [row.name, str(seed), *(points(row.scores[column].by_seed[place]) for column in found.columns)]
        for row in found.rows
        for place, seed in enumerate(found.seeds)
    ]
    return Grid("every seed", ["run", "seed", *_headings(found)], body)


def print_comparison(found: Comparison, per_seed: bool = False) -> None:
    """On the terminal."""
    console = terminal(highlight=False)
    for grid in grids(found, per_seed):
        table = Table(title=grid.title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for number, heading in enumerate(grid.head):
            table.add_column(heading, justify="right" if number else "left")
        for number, cells in enumerate(grid.body):
            table.add_row(*(_bold(cell, (number, place) in grid.strong) for place, cell in enumerate(cells)))
        console.print(table)
    for line in statements(found):
        console.print(line)


def _bold(cell: str, strong: bool):
    from rich.text import Text

    return Text(cell, style="bold" if strong else "")


def as_markdown(found: Comparison, brief: bool = False) -> str:
    """Tables of Markdown, with what must be known to read them; if brief, without costs and single seeds."""
    clean: Callable[[str], str] = lambda text: re.sub(r"([|\\`*_<>\[\]])", r"\\\1", text)  # noqa: E731
    parts = []
    for grid in grids(found)[: 2 if brief else None]:
        parts += [f"**{clean(grid.title[0].upper() + grid.title[1:])}**", ""]
        parts.append("| " + " | ".join(map(clean, grid.head)) + " |")
        parts.append("|---" + "|---:" * (len(grid.head) - 1) + "|")
        for number, cells in enumerate(grid.body):
            shown = [f"**{clean(c)}**" if (number, place) in grid.strong else clean(c) for place, c in enumerate(cells)]
            parts.append("| " + " | ".join(shown) + " |")
        parts.append("")
    return "\n".join([*parts, *(f"- {clean(line)}" for line in statements(found)), ""])


def as_json(found: Comparison) -> str:
    """All of it."""
    return json.dumps(found.to_dict(), indent=1) + "\n"


def as_csv(found: Comparison) -> str:
    """One line a run and domain, unrounded; scores of the seeds as further lines' columns ``seed_0`` and so on."""
    head = [
        *("run", "reading", "model", "method", "tuning", "domain", "role", "metric", "examples", "mean", "std"),
        *(f"seed_{seed}" for seed in found.seeds),
        *Difference.__dataclass_fields__,
        *("rank", "ood_rank"),
        *Cost.__dataclass_fields__,
    ]
    file = io.StringIO()
    writer = csv.DictWriter(file, head, restval="", lineterminator="\n")
    writer.writeheader()
    domains = {domain.name: domain for domain in found.domains}
    for row in found.rows:
        for column in found.columns:
            writer.writerow(_csv_line(found, row, column, domains.get(column)))
    return file.getvalue()


def _csv_line(found: Comparison, row: Row, column: str, domain) -> dict[str, object]:
    scores, difference = row.scores[column], row.differences.get(column)
    line = {key: getattr(row, key) for key in ("reading", "model", "method", "tuning", "rank", "ood_rank")}
    line |= {"run": row.name, "domain": column, "mean": scores.mean, "std": scores.std}
    line |= {"role": domain.role, "metric": domain.metric, "examples": domain.examples} if domain else {"role": "mean"}
    line |= {f"seed_{seed}": score for seed, score in zip(found.seeds, scores.by_seed, strict=True)}
    return line | (asdict(difference) if difference else {}) | asdict(row.cost)


_LATEX = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "−": "$-$",
    "–": "--",
    "<": "$<$",
    ">": "$>$",
}


def latex_escape(text: str) -> str:
    """Text that LaTeX prints as it stands."""
    return "".join(_LATEX.get(character, character) for character in text)


def as_latex(found: Comparison) -> str:
    """Tables for the package booktabs; what must be known goes into the first one's caption."""
    parts = ["% needs \\usepackage{booktabs}"]
    for number, grid in enumerate(grids(found, per_seed=False)):
        caption = f"{grid.title[0].upper()}{grid.title[1:]}."
        if number == 0:
            caption = " ".join([caption, *statements(found)])
        parts += [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{latex_escape(caption)}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(grid.head) - 1)}}}",
            r"\toprule",
            " & ".join(map(latex_escape, grid.head)) + r" \\",
            r"\midrule",
        ]
        for line, cells in enumerate(grid.body):
            shown = [latex_escape(cell) for cell in cells]
            shown = [rf"\textbf{{{c}}}" if (line, place) in grid.strong else c for place, c in enumerate(shown)]
            parts.append(" & ".join(shown) + r" \\")
        parts += [r"\bottomrule", r"\end{tabular}", r"\end{table}", ""]
    return "\n".join(parts)


def formats() -> dict[str, Callable[[Comparison], str]]:
    """``--format`` → how to write it."""
    from emoe.report.comparison_html import as_html

    return {"md": as_markdown, "csv": as_csv, "json": as_json, "html": as_html, "latex": as_latex}
