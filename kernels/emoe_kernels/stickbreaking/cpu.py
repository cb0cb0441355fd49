"""Stick-breaking attention on CPUs: the C++ kernels of csrc/ behind an autograd function.

Legend: B batch, H query heads, G key heads, T queries, L keys, A width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..experts.cpu import refuses_dtype

_ops = torch.ops.emoe_cpu


def supports(q_BHTA: Tensor, k_BGLA: Tensor, v_BGLA: Tensor) -> str | None:
    """None if `stick_breaking_attention` takes these tensors, otherwise the reason."""
    if reason := refuses_dtype(q_BHTA.dtype):
        return reason
    A = q_BHTA.shape[3]
    if q_BHTA.dtype == torch.bfloat16 and A % 2:
        return f"in bfloat16 the C++ kernels take pairs, and A={A} is odd"
    return None


@torch.library.register_fake("emoe_cpu::stick_breaking")
def _(q, k, v, key_mask, attend_current, scale):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3])


@torch.library.register_fake("emoe_cpu::stick_breaking_backward")
def _(dy, d_remainder, q, k, v, key_mask, attend_current, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


class _StickBreaking(torch.autograd.Function):
    """Keeps its arguments; logits and weights are computed again."""

    @staticmethod
    def forward(ctx, q, k, v, key_mask, attend_current, scale):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, key_mask)
        ctx.options = attend_current, scale
        return _ops.stick_breaking(q, k, v, key_mask, attend_current, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dremainder):
        q, k, v, key_mask = ctx.saved_tensors
        if dy is None:
            dy = torch.zeros_like(q)
        return *_ops.stick_breaking_backward(dy, dremainder, q, k, v, key_mask, *ctx.options), None, None, None


def stick_breaking_attention(
    q_BHTA: Tensor,
    k_BGLA: Tensor,
    v_BGLA: Tensor,
    key_mask_BL: Tensor | None,
    attend_current: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(y_BHTA, remainder_BHT) of `emoe_kernels.stickbreaking`, for tensors that `supports` has passed.

    Accumulates in fp32; in bf16 weights and gradients of logits are rounded once, as operands of a GEMM. A tile of
    queries ends where all of its sticks are shorter than the least normal float. Equal calls give equal bits, with any
    number of threads. Has no forward-mode derivative and no second one.
    """
    arguments = q_BHTA, k_BGLA, v_BGLA, key_mask_BL, attend_current, scale
    if torch.is_grad_enabled() and (q_BHTA.requires_grad or k_BGLA.requires_grad or v_BGLA.requires_grad):
        return _StickBreaking.apply(*arguments)
    return _ops.stick_breaking(*arguments)
