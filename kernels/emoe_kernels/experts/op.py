"""The public sparse expert FFN: checks its arguments and hands them to an implementation.

Legend: N tokens, D model width, F hidden width, E experts, S = F // E neurons per expert, K experts chosen per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import resolve
from . import portable, reference
from .portable import ACTIVATIONS, get_activation

__all__ = ["ACTIVATIONS", "expert_ffn"]

_IMPLEMENTATIONS = {"reference": reference.expert_ffn, "portable": portable.expert_ffn}


def expert_ffn(
    x_ND: Tensor,
    experts_NK: Tensor,
    up_FD: Tensor,
    down_DF: Tensor,
    *,
    num_experts: int,
    gate_FD: Tensor | None = None,
    up_bias_F: Tensor | None = None,
    gate_bias_F: Tensor | None = None,
    down_bias_D: Tensor | None = None,
    activation: str = "silu",
    weights_NK: Tensor | None = None,
) -> Tensor:
    """The feed-forward layer, restricted per token to the chosen experts.

    With h = act(x Wg^T + bg) * (x Wu^T + bu), or h = act(x Wu^T + bu) without a gate, and h_e the S entries of h that
    belong to expert e:

        y_n = sum_k weights_nk * h_e Wd_e^T + bd      with e = experts_nk

    Expert e is the contiguous block of rows e * S : (e + 1) * S of up and gate, and of the same columns of down, so
    that all experts together, with weight 1, are the dense layer.

    Source: Qiu et al., "Unlocking Emergent Modularity in Large Language Models", arXiv 2310.10908, sec. 2-3, on the
    split of Zhang et al., "MoEfication", arXiv 2110.01786. Differences: routing weights other than 0 and 1 are
    allowed, and so are biases; the output bias belongs to no expert and is added once.

    Args:
        x_ND: (N, D) tokens.
        experts_NK: (N, K) integer ids in 0 .. E - 1, distinct within a row; -1 marks an unused slot, so that the
            number of experts may vary from token to token. Distinctness is not checked.
        up_FD, down_DF, gate_FD: dense weights (F, D), (D, F), (F, D) in the convention of `torch.nn.functional.linear`
            and the dtype of x. Any strides, such as the transpose of a GPT-2 Conv1D weight; none is copied whole.
        num_experts: E, a divisor of F.
        up_bias_F, gate_bias_F, down_bias_D: biases (F,), (F,), (D,), or None.
        activation: one of `ACTIVATIONS`.
        weights_NK: (N, K) routing weights of any floating dtype; None stands for 1.

    Returns:
        (N, D) in the dtype of x. Autocast does not act inside: arguments are used in the dtype they come in.

    Raises:
        ValueError: an argument's shape or dtype does not fit (the message names it), an id is outside -1 .. E - 1,
            or the activation is unknown.
    """
    get_activation(activation)
    _check(x_ND, experts_NK, up_FD, down_DF, num_experts, gate_FD, up_bias_F, gate_bias_F, down_bias_D, weights_NK)
    return _IMPLEMENTATIONS[resolve()](
        x_ND,
        experts_NK,
        up_FD,
        down_DF,
        num_experts=num_experts,
        gate_FD=gate_FD,
        up_bias_F=up_bias_F,
        gate_bias_F=gate_bias_F,
        down_bias_D=down_bias_D,
        activation=activation,
        weights_NK=weights_NK,
    )


def _check(x, experts, up, down, num_experts, gate, up_bias, gate_bias, down_bias, weights) -> None:
    """Shapes and dtypes alone: reading values would cost more than some calls take."""
    for name, tensor in (("x_ND", x), ("experts_NK", experts), ("up_FD", up)):
        if tensor.dim() != 2:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected two dimensions")
    (N, D), F, K = x.shape, up.shape[0], experts.shape[1]
    if num_experts < 1 or F % num_experts:
        near = [e for e in range(1, F + 1) if F % e == 0]
        near = sorted(sorted(near, key=lambda e: abs(e - num_experts))[:2])
        raise ValueError(f"num_experts={num_experts} does not divide F={F}; try {' or '.join(map(str, near))}")
    if experts.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"experts_NK has dtype {experts.dtype}; expected torch.int64")
    if num_experts < K:
        raise ValueError(f"experts_NK chooses K={K} experts per token, but num_experts={num_experts}")
    if gate is None and gate_bias is not None:
        raise ValueError("gate_bias_F is given without gate_FD")
    expected = {
        "experts_NK": (experts, (N, K)),
        "up_FD": (up, (F, D)),
        "down_DF": (down, (D, F)),
        "gate_FD": (gate, (F, D)),
        "up_bias_F": (up_bias, (F,)),
        "gate_bias_F": (gate_bias, (F,)),
        "down_bias_D": (down_bias, (D,)),
        "weights_NK": (weights, (N, K)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape} (x_ND {(N, D)}, F={F})")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x_ND on {x.device}")
        if name not in ("experts_NK", "weights_NK") and tensor.dtype != x.dtype:
            raise ValueError(f"{name} has dtype {tensor.dtype}, x_ND has {x.dtype}; cast one of them")
    if weights is not None and not weights.is_floating_point():
        raise ValueError(f"weights_NK has dtype {weights.dtype}; expected a floating dtype")
