"""Fixtures of several files of kernel tests."""

import pytest
import torch
from support.expert_ffn import FAST


@pytest.fixture(params=FAST)
def fast(request):
    """The name of an implementation that computes the chosen experts only."""
    return request.param


@pytest.fixture
def unwritten_memory_is_nan():
    """torch.empty gives NaN, so that a row which no expert or program wrote shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def own_file(tmp_path, monkeypatch):
    """The file of the user's own Triton configurations, which is not there yet."""
    configs = pytest.importorskip("emoe_kernels.experts.triton_configs")
    monkeypatch.setenv(configs.CACHE_VARIABLE, str(tmp_path / "triton.json"))
    configs.user_configs.cache_clear()
    yield tmp_path / "triton.json"
    configs.user_configs.cache_clear()
