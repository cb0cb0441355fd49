"""A cache of their own for the quick tests; tests marked ``model`` use the real one, so that it is filled once."""

import pytest


@pytest.fixture(autouse=True)
def home(request, tmp_path, monkeypatch):
    if request.node.get_closest_marker("model"):
        return None
    monkeypatch.setenv("EMOE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"
