"""Fixtures of several files of kernel tests."""

import pytest


@pytest.fixture
def own_file(tmp_path, monkeypatch):
    """The file of the user's own Triton configurations, which is not there yet."""
    configs = pytest.importorskip("emoe_kernels.experts.triton_configs")
    monkeypatch.setenv(configs.CACHE_VARIABLE, str(tmp_path / "triton.json"))
    configs.user_configs.cache_clear()
    yield tmp_path / "triton.json"
    configs.user_configs.cache_clear()
