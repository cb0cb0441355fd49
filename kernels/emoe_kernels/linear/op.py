"""Linear layers whose weights belong to experts: checks of the arguments, then an implementation.

Legend: N tokens, D model width, E experts, S width of an expert, F = E * S, K experts chosen per token.

`expert_linear` takes a token into each of its experts, `expert_combine` takes the experts' results back and adds them
up. With an elementwise function between them they are the expert FFN, which `emoe_kernels.experts.expert_ffn` computes
with less memory: the (N, K, S) tensors between the two are what these are for. ModuleFormer's attention experts
(Shen et al., arXiv 2306.04640, sec. 3.2) project queries with the one and heads' outputs with the other.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..experts.op import check_experts, check_rank, check_tensors, choose
from ..experts.portable import stack_columns, stack_rows
from . import portable, reference

__all__ = ["expert_combine", "expert_linear"]


def _any(*tensors: Tensor) -> str | None:
    return None


_Implementations = dict[str, tuple[Callable[..., Tensor], Callable[..., str | None]]]
_LINEAR: _Implementations = {
    "reference": (reference.expert_linear, _any),
    "portable": (portable.expert_linear, _any),
    "cpu": (portable.expert_linear, _any),
}
_COMBINE: _Implementations = {
    "reference": (reference.expert_combine, _any),
    "portable": (portable.expert_combine, _any),
    "cpu": (portable.expert_combine, _any),
}
"""As in `emoe_kernels.experts.op`, with stacked weights. The C++ extension has no kernels of its own for these: a GEMM
an expert, or one batched GEMM for a few tokens, is all there is to them, and that is what `portable` does."""


def _load(name: str) -> None:
    from ..experts import triton_op

    _LINEAR[name] = (triton_op.expert_linear, triton_op.supports)
    _COMBINE[name] = (triton_op.expert_combine, triton_op.supports)


def expert_linear(
    x_ND: Tensor,
    experts_NK: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    num_experts: int | None = None,
) -> Tensor:
    """out_nk = x_n W_e^T + b_e with e = experts_nk: every token through each of its experts.

    Args:
        x_ND: (N, D) tokens.
        experts_NK: (N, K) integer ids in 0 .. E - 1, distinct within a row (not checked); -1 marks an unused slot.
        weight: (E, S, D), or dense (F, D), of which expert e is rows e * S : (e + 1) * S. Any strides.
        bias: (E, S) or (F,), like the weight; or None.
        num_experts: E; needed with a dense weight.

    Returns:
        (N, K, S) in the dtype of x; zeros in unused slots. Autocast does not act inside. Under `torch.no_grad` few
        tokens take another path on CPUs, which may differ in the last bits.

    Raises:
        ValueError: an argument does not fit (the message names it), or an id is outside -1 .. E - 1.
    """
    check_rank("x_ND", x_ND, 2)
    check_rank("experts_NK", experts_NK, 2)
    E, S = check_experts("weight", weight, 0, num_experts, experts_NK.shape[1])
    N, D = x_ND.shape
    stacked = weight.dim() == 3
    check_tensors(
        "x_ND",
        x_ND,
        {
            "experts_NK": (experts_NK, (N, experts_NK.shape[1])),
            "weight": (weight, (E, S, D) if stacked else (E * S, D)),
            "bias": (bias, (E, S) if stacked else (E * S,)),
        },
        f"x_ND {(N, D)}, E={E}, S={S}",
    )
    if not stacked:
        weight, bias = stack_rows(weight, E), stack_rows(bias, E)
    return choose(_LINEAR, _load, x_ND, weight)(x_ND, experts_NK, weight, bias)


def expert_combine(
    h_NKS: Tensor,
    experts_NK: Tensor,
    weight: Tensor,
    bias_D: Tensor | None = None,
    *,
    weights_NK: Tensor | None = None,
    num_experts: int | None = None,
) -> Tensor:
    """y_n = sum_k weights_nk * W_e h_nk + bias with e = experts_nk: what a token's experts made of it, added up.

    Args:
        h_NKS: (N, K, S). What stands in unused slots is not read.
        experts_NK: (N, K) integer ids in 0 .. E - 1, distinct within a row (not checked); -1 marks an unused slot.
        weight: (E, D, S), or dense (D, F), of which expert e is columns e * S : (e + 1) * S. Any strides.
        bias_D: (D,), of no expert, added once; or None.
        weights_NK: (N, K) routing weights of any floating dtype; None stands for 1.
        num_experts: E; needed with a dense weight.

    Returns:
        (N, D) in the dtype of h; sums over experts are taken in fp32 if that is bf16 or fp16. Autocast does not act
        inside. Under `torch.no_grad` few tokens take another path on CPUs, which may differ in the last bits.

    Raises:
        ValueError: an argument does not fit (the message names it), or an id is outside -1 .. E - 1.
    """
    check_rank("h_NKS", h_NKS, 3)
    check_rank("experts_NK", experts_NK, 2)
    N, K, S = h_NKS.shape
    E, width = check_experts("weight", weight, 1, num_experts, K)
    if width != S:
        raise ValueError(f"h_NKS has shape {(N, K, S)}; the experts of weight {tuple(weight.shape)} are {width} wide")
    stacked = weight.dim() == 3
    D = weight.shape[1] if stacked else weight.shape[0]
    check_tensors(
        "h_NKS",
        h_NKS,
        {
            "experts_NK": (experts_NK, (N, K)),
            "weight": (weight, (E, D, S) if stacked else (D, E * S)),
            "bias_D": (bias_D, (D,)),
            "weights_NK": (weights_NK, (N, K)),
        },
        f"h_NKS {(N, K, S)}, E={E}, D={D}",
    )
    if not stacked:
        weight = stack_columns(weight, E)
    return choose(_COMBINE, _load, h_NKS, weight)(h_NKS, experts_NK, weight, bias_D, weights_NK)
