"""Which dtypes the C++ kernels take on this processor."""

from __future__ import annotations

import pytest
import torch

from emoe_kernels import extension


def refusal(implementation: str, dtype: torch.dtype) -> str | None:
    """Why this implementation does not compute in it here: bfloat16 wants AVX-512 bf16 or AMX. None if it does."""
    if implementation != "cpu" or not extension.load():
        return None
    from emoe_kernels.experts.cpu import refuses_dtype

    return refuses_dtype(dtype)


def skip_without(implementation: str, dtype: torch.dtype) -> None:
    """Skip the test where `implementation` does not compute in `dtype`."""
    if reason := refusal(implementation, dtype):
        pytest.skip(reason)
