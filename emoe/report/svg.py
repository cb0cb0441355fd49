"""Small charts as inline SVG whose colours are the page's own, so that they follow its light or dark scheme.

Everything that comes from a file is escaped here: names of methods, of domains, of models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 366
LEFT, RIGHT, TOP, BOTTOM = 70, 14, 42, 54


@dataclass
class Line:
    """A named row of points."""

    name: str
    points: list[tuple[float, float]]


def chart(lines: list[Line], x_title: str, y_title: str, *, log: bool = False, level: float | None = None) -> str:
    """Lines over a common x, with a dashed one at `level`, and a legend below; "" where there is no point.

    Points that cannot be placed are left out, and so is such a level.
    """
    usable = lambda x, y: _is_measured(x) and _is_measured(y) and not (log and y <= 0)  # noqa: E731
    lines = [Line(line.name, sorted(p for p in line.points if usable(*p))) for line in lines]
    lines = [line for line in lines if line.points]
    level = level if level is not None and usable(0.0, level) else None
    if not lines:
        return ""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points] + ([level] if level is not None else [])
    x_axis, y_axis = Axis(xs, LEFT, WIDTH - RIGHT, False), Axis(ys, HEIGHT - BOTTOM, TOP, log)
    parts = [_grid(x_axis, y_axis)]
    if level is not None:
        y = y_axis.place(level)
        parts.append(f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    for number, line in enumerate(lines):
        places = [(x_axis.place(x), y_axis.place(y), x, y) for x, y in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in places)
        parts.append(f'<polyline class="line {style_of(number)}" points="{path}"/>')
        for x, y, x_value, y_value in places:
            label = f"{escape(line.name)}: {y_value:.4g} at {x_value:.4g}"
            place = f'cx="{x:.1f}" cy="{y:.1f}" r="4"'
            parts.append(f'<circle class="dot {style_of(number)}" {place}><title>{label}</title></circle>')
    parts.append(f'<text x="{(LEFT + WIDTH) / 2:.0f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_title)}</text>')
    parts.append(f'<text x="2" y="20">{escape(y_title)}</text>')  # lying flat, however long it is
    names = [f'<li><i class="key {style_of(n)}"></i>{escape(line.name)}</li>' for n, line in enumerate(lines)]
    legend = f'<ul class="legend">{"".join(names)}</ul>' if len(lines) > 1 else ""
    said = escape(_said(lines, x_title, y_title, level), quote=True)
    head = f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{said}">'
    return f"{head}{''.join(parts)}</svg>{legend}"


def _said(lines: list[Line], x_title: str, y_title: str, level: float | None) -> str:
    """The drawing in words: what over what, where each line begins, ends and has its extremes."""
    told = []
    for line in lines:
        (x_first, first), (x_last, last) = line.points[0], line.points[-1]
        text = f"{line.name}: {first:.4g} at {x_first:.4g}"
        if len(line.points) > 1:
            text += f" to {last:.4g} at {x_last:.4g}"
        if len(line.points) > 2:
            values = [y for _, y in line.points]
            text += f", between {min(values):.4g} and {max(values):.4g}"
        told.append(text)
    dashed = [] if level is None else [f"dashed: {level:.4g}"]
    return f"Chart of {y_title} over {x_title}. {'; '.join([*told, *dashed])}."


def style_of(number: int) -> str:
    """Classes of line `number`: eight colours, then the same again, dashed."""
    return f"c{number % 8}" + (" again" if number >= 8 else "")


def mark(value: float) -> str:
    """A round number on an axis, short enough to stand beside it: ``0.95``, ``−2``, ``50k``."""
    text = f"{value / 1000:g}k" if 10_000 <= abs(value) < 1e9 else f"{value:g}"
    return text.replace("-", "−")


def _is_measured(value: float) -> bool:
    """Nothing that is measured is as large or as near to 0, and distances between such numbers overflow."""
    return value == 0 or 1e-100 < abs(value) < 1e100


class Axis:
    """Values to places on the page, with round numbers to mark."""

    def __init__(self, values: list[float], start: float, end: float, log: bool) -> None:
        self.log, self.start, self.end = log, start, end
        low, high = (self._scaled(v) for v in (min(values), max(values)))
        room = 0.06 * (high - low) or 0.5 * abs(high) or 0.5
        self.low, self.high = low - room, high + room

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def place(self, value: float) -> float:
        """Where a value lies, in units of the drawing."""
        return self.start + (self._scaled(value) - self.low) / (self.high - self.low) * (self.end - self.start)

    def marks(self) -> list[float]:
        """Round values between the ends."""
        if self.log:
            exponents = range(math.floor(self.low), math.ceil(self.high) + 1)
            for steps in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):  # the coarsest that marks enough
                found = [step * 10.0**e for e in exponents for step in steps]
                found = [value for value in found if self.low <= math.log10(value) <= self.high]
                if len(found) >= 3:
                    return found
        low, high = (10**self.low, 10**self.high) if self.log else (self.low, self.high)
        rough = (high - low) / 7
        unit = 10 ** math.floor(math.log10(rough))
        step = next(unit * f for f in (1, 2, 5, 10) if unit * f >= rough)
        first = math.ceil(low / step)
        return [step * i for i in range(first, math.floor(high / step) + 1)]


def _grid(x_axis: Axis, y_axis: Axis) -> str:
    parts = []
    for value in y_axis.marks():
        y = y_axis.place(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{mark(value)}</text>')
    for value in x_axis.marks():
        x = x_axis.place(value)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{mark(value)}</text>')
    return "".join(parts)
