"""Sparse expert FFN, the equation: compute every expert, then multiply what was not chosen by zero.

Legend: N tokens, D model width, F hidden width, E experts, S = F // E neurons per expert, K experts chosen per token.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from .portable import get_activation


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
    """What `emoe_kernels.experts.expert_ffn` computes, dense and differentiated by torch.

    One difference: 0 * NaN is NaN, so a non-finite weight of an expert that nobody chose shows here, and does not
    in the sparse implementations.
    """
    act = get_activation(activation).forward
    with torch.autocast(x_ND.device.type, enabled=False):
        up_NF = linear(x_ND, up_FD, up_bias_F)
        h_NF = act(up_NF) if gate_FD is None else act(linear(x_ND, gate_FD, gate_bias_F)) * up_NF

        # -1 equals no expert, so an unused slot adds nothing
        chosen_NKE = experts_NK.unsqueeze(-1) == torch.arange(num_experts, device=x_ND.device)
        weights_NK1 = 1.0 if weights_NK is None else weights_NK.unsqueeze(-1)
        mask_NE = (chosen_NKE * weights_NK1).sum(1)
        mask_NF = mask_NE.repeat_interleave(up_FD.shape[0] // num_experts, dim=1)

        return linear((h_NF * mask_NF).to(x_ND.dtype), down_DF, down_bias_D)
