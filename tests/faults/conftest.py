"""One process to fork runs from, and the models that they are tried on."""

from __future__ import annotations

import pytest
from support.bench import make_inputs
from support.nursery import Nursery


@pytest.fixture(scope="session")
def nursery(tmp_path_factory):
    with Nursery(tmp_path_factory.mktemp("runs")) as process:
        yield process


@pytest.fixture(scope="session")
def inputs(nursery, tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("faults") / "inputs", nursery)
