"""Tiny models with modules of both kinds."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.modules import moduleformer


@pytest.fixture(scope="session")
def tiny_moduleformer(tmp_path_factory) -> Path:
    """A ModuleFormer with linear gates."""
    return moduleformer(tmp_path_factory.mktemp("moduleformer") / "model", "linear")


@pytest.fixture
def text(text_file) -> tuple:
    """Flags that count on a little text."""
    return ("--text", text_file, "--tokens", 2048, "--sequence-length", 64)


@pytest.fixture
def run(tmp_path):
    """``run("prune", model, "name", *flags)`` → the folder that was written."""
    from emoe.cli.main import main

    def call(verb: str, model, name: str, *flags) -> Path:
        output = tmp_path / name
        assert main([verb, "--model", str(model), "--output", str(output), "--quiet", *map(str, flags)]) == 0
        return output

    return call
