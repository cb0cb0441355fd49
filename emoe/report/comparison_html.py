"""A comparison as one HTML file: drawings and tables inside it, nothing fetched, every name escaped."""

from __future__ import annotations

from typing import Any

from emoe.evaluation.compare import Comparison
from emoe.report.comparison import grids, statements
from emoe.report.panels import groups
from emoe.report.templates import render


def as_html(found: Comparison) -> str:
    """The page of `emoe compare`."""
    return render("comparison.html.jinja", found=parts(found))


def parts(found: Comparison) -> dict[str, Any]:
    """What a template needs to show a comparison."""
    return {
        "task": found.task,
        "baseline": found.baseline,
        "heading": f"{found.task}: {len(found.rows)} runs, baseline {found.baseline}",
        "statements": statements(found),
        "panels": groups(found),
        "grids": grids(found),
    }
