"""The terminal that tables go to."""

from __future__ import annotations

import sys

from rich.console import Console

WIDE = 160
"""Columns where nobody looks: a table in a log need not be cut to 80."""


def terminal(**options: object) -> Console:
    """A console that takes names as they are: they come from files that others wrote."""
    width = None if sys.stdout.isatty() else WIDE
    return Console(**{"markup": False, "width": width, **options})
