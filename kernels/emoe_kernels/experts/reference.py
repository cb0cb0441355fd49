"""Sparse expert FFN, the equation: compute every expert, then multiply what was not chosen by zero.

Legend: N tokens, D model width, E experts, S neurons per expert, F = E * S hidden width, K experts chosen per token.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from .portable import get_activation


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
    """What `emoe_kernels.experts.expert_ffn` computes, dense and differentiated by torch.

    One difference: 0 * NaN is NaN, so a non-finite weight of an expert that nobody chose shows here, and does not
    in the sparse implementations.
    """
    act = get_activation(activation).forward
    E, S, _ = up_ESD.shape
    with torch.autocast(x_ND.device.type, enabled=False):

        def project(weight_ESD, bias_ES):
            return linear(x_ND, weight_ESD.flatten(0, 1), None if bias_ES is None else bias_ES.flatten())

        up_NF = project(up_ESD, up_bias_ES)
        h_NF = act(up_NF) if gate_ESD is None else act(project(gate_ESD, gate_bias_ES)) * up_NF

        # -1 equals no expert, so an unused slot adds nothing
        chosen_NKE = experts_NK.unsqueeze(-1) == torch.arange(E, device=x_ND.device)
        weights_NK1 = 1.0 if weights_NK is None else weights_NK.unsqueeze(-1)
        mask_NE = (chosen_NKE * weights_NK1).sum(1)
        mask_NF = mask_NE.repeat_interleave(S, dim=1)

        down_DF = down_EDS.transpose(0, 1).flatten(1)
        return linear((h_NF * mask_NF).to(x_ND.dtype), down_DF, down_bias_D)
