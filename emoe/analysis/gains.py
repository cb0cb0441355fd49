"""Gain over the baseline as a function of what a sweep crosses: N and k, layers, training data, how experts are chosen.

Source: Qiu, Huang, Fu (NAACL 2024, arXiv 2310.10908) sec. 5: which factors the gain depends on. They report means;
here each point is a paired comparison with its own interval and p, and points are not adjusted for one another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emoe.errors import UserError
from emoe.evaluation.compare import Difference, compare
from emoe.evaluation.runs import read_run, read_sweep_record
from emoe.evaluation.sweep_config import ARM, SweepConfig, Variant, require_crossed, variants


@dataclass(frozen=True)
class Gain:
    """One variant against the baseline arm at the same shared values."""

    name: str
    point: dict[str, Any]
    """Crossed settings, and the arm."""
    seeds: int
    differences: dict[str, Difference]
    """By domain, and their mean; in points."""


@dataclass(frozen=True)
class Gains:
    """A curve, or one for each value of ``lines``."""

    x: str
    lines: str
    points: list[Gain]
    missing: list[str]
    """Variants without a finished seed."""


def gains(
    output: Path,
    config: SweepConfig,
    x: str,
    lines: str | None,
    resamples: int,
    progress: Callable[[str, int, int], None],
) -> Gains:
    """Gains of a finished sweep.

    Args:
        output: the sweep's folder.
        x: the setting whose influence is asked, or "arm".
        lines: a second one, or None for the arm.

    Raises:
        UserError: ``x`` or ``lines`` is not crossed in the sweep, or nothing has finished.
    """
    rows = variants(config)
    chosen = read_sweep_record(output).chosen
    require_crossed(rows, x, lines)
    pairs = [(row, _baseline(rows, row)) for row in rows if row.arm != rows[0].arm]
    present = [pair for pair in pairs if all(row.name in chosen for row in pair)]
    if not present:
        raise UserError(f"analysis: {output} has no arm that finished along with its baseline")
    points = []
    for number, (row, baseline) in enumerate(present):
        progress(row.name, number, len(present))
        runs = [read_run(output / chosen[r.name], name=r.name) for r in (baseline, row)]
        found = compare(runs, resamples=resamples)
        points.append(Gain(row.name, {ARM: row.arm, **row.point}, len(found.seeds), found.rows[1].differences))
    missing = [row.name for row, baseline in pairs if (row, baseline) not in present]
    return Gains(x, lines or ARM, points, missing)


def _baseline(rows: list[Variant], row: Variant) -> Variant:
    """The baseline arm where the settings that are crossed with all arms are the same."""
    return next(other for other in rows if other.arm == rows[0].arm and other.shared_point == row.shared_point)
