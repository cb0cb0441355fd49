"""Made-up runs, compared."""

from __future__ import annotations

import pytest
from support.runs import compared, write_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A baseline, a better arm, an equal one; 8 seeds."""
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "vanilla", 0, seeds=range(8), readings=("as-trained", "emoe"))
    write_run(folder / "better", 1, effect=0.5, seeds=range(8), readings=("as-trained", "dense"))
    write_run(folder / "equal", 2, seeds=range(8))
    return folder


@pytest.fixture(scope="module")
def found(runs):
    return compared(runs / "vanilla", runs / "better", runs / "equal")
