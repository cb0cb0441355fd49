"""The Triton implementation as dispatch sees it: what it computes, and whether it takes some tensors.

Imported only where it is asked for or a GPU is there: it imports Triton, which not every machine has.
"""

from __future__ import annotations

from torch import Tensor

from ..dispatch import gpu_too_old
from .triton_ffn import expert_ffn
from .triton_linear import expert_combine, expert_linear
from .triton_shared import DTYPES, plan_experts

__all__ = ["expert_combine", "expert_ffn", "expert_linear", "plan_experts", "supports"]


def supports(x_ND: Tensor, *weights: Tensor | None) -> str | None:
    """None if the kernels take these tensors, otherwise the reason."""
    if x_ND.dtype not in DTYPES:
        return f"the Triton kernels compute in float32, bfloat16 and float16, not {str(x_ND.dtype)[6:]}"
    return gpu_too_old(x_ND.device.index) if x_ND.device.type == "cuda" else None
