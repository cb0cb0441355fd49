"""Sparse expert FFN on CPUs: the C++ kernels of csrc/ behind an autograd function.

Legend: N tokens, D model width, E experts, S neurons per expert, K experts chosen per token.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import extension
from .portable import ACTIVATIONS

if not extension.load():
    raise ImportError(extension.status().detail)

_ops = torch.ops.emoe_cpu
_ACTIVATIONS = {name: index for index, name in enumerate(ACTIVATIONS)}
"""Name → the value of `enum class Activation` in csrc/activations.h, which lists them in the same order."""


_CAN_MULTIPLY = {dtype: _ops.can_multiply(dtype) for dtype in (torch.float32, torch.bfloat16)}


def refuses_dtype(dtype: torch.dtype) -> str | None:
    """Why the C++ kernels cannot compute in it here, or None."""
    can = _CAN_MULTIPLY.get(dtype)
    if can:
        return None
    name = str(dtype).removeprefix("torch.")
    if can is None:
        return f"the C++ kernels compute in float32 and bfloat16, not {name}"
    return f"oneDNN has no {name} kernels for this processor (bfloat16 wants avx512_bf16 or AMX)"


def supports(x_ND: Tensor, up_ESD: Tensor, down_EDS: Tensor, gate_ESD: Tensor | None) -> str | None:
    """None if `expert_ffn` takes these tensors, otherwise the reason."""
    dtype = x_ND.dtype
    if reason := refuses_dtype(dtype):
        return reason
    S, D = up_ESD.shape[1:]
    if S == 0 or D == 0:
        return "there is nothing to compute: a width is 0"
    if dtype == torch.bfloat16 and (S % 2 or D % 2):
        return f"in bfloat16 the C++ kernels take pairs, and D={D} or S={S} is odd"
    return None


_MOST_TRANSPOSED_BYTES = 384 * 1024


def is_slow(x_ND: Tensor, up_ESD: Tensor, down_EDS: Tensor, gate_ESD: Tensor | None) -> bool:
    """Whether weights are stored transposed, in blocks so large that copying them costs more than torch's calls.

    Time over that of `portable`, forward, AMD Zen 3, fp32, 1 thread, other work beside, E 16 or 32, K 2, no gate; not
    measured with AVX-512, in bf16 or with many threads:

        D, S, KiB a block        N 1    N 4   N 16   N 64  N 256  N 1024
        128, 256     128        0.25   0.63   0.55   0.62   0.88    0.76
        576, 96      216        0.90   1.34   1.33   1.31   1.05    0.99
        768, 96      288        0.91   0.93
        384, 384     576        1.98   1.53   1.84   1.37   1.13    1.33
        1024, 1024  4096        2.23   3.98   3.09   2.06   1.56    1.55
    """
    _, S, D = up_ESD.shape
    transposed = up_ESD.stride(2) != 1 or down_EDS.stride(2) != 1
    return transposed and S * D * up_ESD.element_size() > _MOST_TRANSPOSED_BYTES


@torch.library.register_fake("emoe_cpu::forward")
def _(x, experts, up, down, gate, up_bias, gate_bias, down_bias, weights, activation):
    return x.new_empty(x.shape)


@torch.library.register_fake("emoe_cpu::forward_keep")
def _(x, experts, up, down, gate, up_bias, gate_bias, down_bias, weights, activation):
    pairs, S = experts.numel(), up.shape[1]
    return x.new_empty(x.shape), x.new_empty(pairs, S), x.new_empty(0 if gate is None else pairs, S)


@torch.library.register_fake("emoe_cpu::backward_into")
def _(*_arguments):
    return None


class _ExpertFFN(torch.autograd.Function):
    """Keeps x and the pre-activations (N * K rows of S values each), and recomputes the hidden values."""

    @staticmethod
    def forward(ctx, x, experts, up, down, gate, up_bias, gate_bias, down_bias, weights, activation):
        y, up_pre, gate_pre = _ops.forward_keep(
            x, experts, up, down, gate, up_bias, gate_bias, down_bias, weights, activation
        )
        ctx.save_for_backward(x, experts, up, down, gate, up_bias, gate_bias, weights, up_pre, gate_pre)
        ctx.activation = activation
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, experts, up, down, gate, up_bias, gate_bias, weights, up_pre, gate_pre = ctx.saved_tensors
        need_x, _, need_up, need_down, need_gate, need_bu, need_bg, need_bd, need_w, _ = ctx.needs_input_grad

        def empty(tensor: Tensor | None, needed: bool, memory_format=torch.preserve_format) -> Tensor | None:
            return torch.empty_like(tensor, memory_format=memory_format) if needed else None

        # The strides of the weights are kept, so that the way back from the stacked view to the dense layout is a view.
        dx = empty(x, need_x, torch.contiguous_format)
        dup, ddown, dgate = empty(up, need_up), empty(down, need_down), empty(gate, need_gate)
        dup_bias = empty(up_bias, need_bu, torch.contiguous_format)
        dgate_bias = empty(gate_bias, need_bg, torch.contiguous_format)
        dweights = x.new_zeros(experts.shape, dtype=torch.float32) if need_w else None
        _ops.backward_into(
            dy, x, experts, up, down, gate, weights, up_pre, gate_pre, ctx.activation,
            dx, dup, ddown, dgate, dup_bias, dgate_bias, dweights,
        )  # fmt: skip
        ddown_bias = dy.sum(0, dtype=torch.float32).to(dy.dtype) if need_bd else None
        if need_w:
            dweights = dweights.to(weights.dtype)
        return dx, None, dup, ddown, dgate, dup_bias, dgate_bias, ddown_bias, dweights, None


def expert_ffn(
    x_ND: Tensor,
    experts_NK: Tensor,
    up_ESD: Tensor,
    down_EDS: Tensor,
    *,
    gate_ESD: Tensor | None = None,
    up_bias_ES: Tensor | None = None,
    gate_bias_ES: Tensor | None = None,
    down_bias_D: Tensor | None = None,
    activation: str = "silu",
    weights_NK: Tensor | None = None,
) -> Tensor:
    """What `emoe_kernels.experts.expert_ffn` computes, for tensors that `supports` has passed.

    GEMMs and sums over experts accumulate in fp32; bf16 hidden values are rounded once, between the two GEMMs. Few
    tokens (8 or less a chosen expert, on average) take dot products instead of GEMMs, and what is added first depends
    on how many tokens share an expert: a token's last bits may differ with its batch. Equal calls give equal bits,
    with any number of threads. Has no forward-mode derivative and no second one.
    """
    code = _ACTIVATIONS[activation]  # op.py has checked the name
    tensors = (up_ESD, down_EDS, gate_ESD, up_bias_ES, gate_bias_ES, down_bias_D, weights_NK)
    if torch.is_grad_enabled() and (x_ND.requires_grad or any(t is not None and t.requires_grad for t in tensors)):
        return _ExpertFFN.apply(x_ND, experts_NK, *tensors, code)
    return _ops.forward(x_ND, experts_NK, *tensors, code)
