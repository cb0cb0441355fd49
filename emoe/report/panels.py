"""A comparison of runs as small drawings, one a domain: a row a run, points of score from left to right.

Each is as wide as a telephone, so that a page lays as many beside one another as it has room for.
"""

from __future__ import annotations

from html import escape
from typing import Any

from emoe.evaluation.compare import Comparison
from emoe.report.comparison import interval, mean_std, signed
from emoe.report.svg import Axis, mark, style_of

WIDTH, SIDE = 320, 10
ROW, FOOT = 26, 22
LONGEST = 17
"""Characters of a run's name beside its row."""


def groups(found: Comparison) -> list[dict[str, Any]]:
    """Differences from the baseline, then single seeds: title, note, and a drawing for each domain."""
    return [
        {
            "title": f"Differences from {found.baseline}",
            "note": f"Points over {found.baseline} with 95% intervals; filled: p Holm < 0.05.",
            "panels": {column: differences(found, column) for column in found.columns},
        },
        {
            "title": "Seeds",
            "note": "A dot a seed, in points; a stroke at the run's mean. Thin lines join the runs of one seed.",
            "panels": {column: seeds(found, column) for column in found.columns},
        },
    ]


def differences(found: Comparison, column: str) -> str:
    """Each run's difference from the baseline with its interval; filled if significant."""
    rows = [(row.name, row.differences[column]) for row in found.rows[1:]]
    axis = _axis(found, [0.0, *(value for _, d in rows for value in (d.low, d.difference, d.high))])
    zero, bottom = axis.place(0.0), ROW * len(rows)
    parts = [f'<line class="level" x1="{zero:.1f}" x2="{zero:.1f}" y1="0" y2="{bottom}"/>']
    told = []
    for number, (name, d) in enumerate(rows):
        style, y = style_of(number), _height(number)
        low, middle, high = (axis.place(value) for value in (d.low, d.difference, d.high))
        told.append(f"{name} {signed(d.difference)} {interval(d)}")
        parts += [
            _name(name, y),
            f'<line class="line {style}" x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}"/>',
            _dot(style if d.significant else f"{style} open", middle, y, 4.5, told[-1]),
        ]
    return _panel(axis, parts, bottom, f"{column}: points over {found.baseline} with 95% intervals. {'; '.join(told)}.")


def seeds(found: Comparison, column: str) -> str:
    """Every seed of every run as a dot, a stroke at the mean; a seed's dots joined."""
    rows = [(row.name, row.scores[column]) for row in found.rows]
    axis = _axis(found, [value for _, scores in rows for value in scores.by_seed])
    parts, told = [], []
    for of_seed in zip(*(scores.by_seed for _, scores in rows), strict=True):
        places = " ".join(f"{axis.place(value):.1f},{_height(number)}" for number, value in enumerate(of_seed))
        parts.append(f'<polyline class="thread" points="{places}"/>')
    for number, (name, scores) in enumerate(rows):
        style, y, x = style_of(number - 1) if number else "base", _height(number), axis.place(scores.mean)
        parts += [
            _name(name, y),
            f'<line class="line {style}" x1="{x:.1f}" x2="{x:.1f}" y1="{y - 8}" y2="{y + 8}"/>',
            *(
                _dot(style, axis.place(value), y, 3.5, f"{name}, seed {seed}: {value:.2f}")
                for seed, value in zip(found.seeds, scores.by_seed, strict=True)
            ),
        ]
        told.append(f"{name} {mean_std(scores)}")
    return _panel(axis, parts, ROW * len(rows), f"{column}: points of every seed. Mean: {'; '.join(told)}.")


def _axis(found: Comparison, values: list[float]) -> Axis:
    """From the right of the names to the panel's end."""
    start = 7.2 * min(LONGEST, max(len(row.name) for row in found.rows)) + SIDE
    return Axis(values, start, WIDTH - SIDE, False)


def _dot(style: str, x: float, y: int, radius: float, said: str) -> str:
    return f'<circle class="dot {style}" cx="{x:.1f}" cy="{y}" r="{radius}"><title>{escape(said)}</title></circle>'


def _height(place: int) -> int:
    return ROW * place + ROW // 2


def _name(name: str, y: int) -> str:
    """Beside what is drawn at height `y`; a long one without its middle, as runs often differ at the end."""
    half = LONGEST // 2
    shown = name if len(name) <= LONGEST else f"{name[:half]}…{name[-half:]}"
    return f'<text x="0" y="{y + 4}">{escape(shown)}</text>'


def _panel(axis: Axis, parts: list[str], bottom: int, said: str) -> str:
    grid = []
    for value in axis.marks():
        x = axis.place(value)
        grid.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{bottom}"/>')
        grid.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{mark(value)}</text>')
    return (
        f'<svg class="panel" viewBox="0 0 {WIDTH} {bottom + FOOT}" role="img" aria-label="{escape(said, quote=True)}">'
        f"{''.join(grid + parts)}</svg>"
    )
