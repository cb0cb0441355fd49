"""Expert linear layers, the equations: compute every expert, then pick what was chosen.

Legend: N tokens, D model width, E experts, S width of an expert, K experts chosen per token.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _chosen(experts_NK: Tensor, num_experts: int) -> Tensor:
    """(N, K, E): whether slot k of token n holds expert e. -1 equals no expert, so an unused slot is all False."""
    return experts_NK.unsqueeze(-1) == torch.arange(num_experts, device=experts_NK.device)


def expert_linear(x_ND: Tensor, experts_NK: Tensor, weight_ESD: Tensor, bias_ES: Tensor | None = None) -> Tensor:
    """What `emoe_kernels.linear.expert_linear` computes, dense and differentiated by torch."""
    with torch.autocast(x_ND.device.type, enabled=False):
        out_NES = torch.einsum("nd,esd->nes", x_ND, weight_ESD)
        if bias_ES is not None:
            out_NES = out_NES + bias_ES
        index_NKS = experts_NK.long().clamp(min=0).unsqueeze(-1).expand(-1, -1, out_NES.shape[2])
        used_NK1 = _chosen(experts_NK, weight_ESD.shape[0]).any(2, keepdim=True)
        return out_NES.gather(1, index_NKS).masked_fill(~used_NK1, 0.0)


def expert_combine(
    h_NKS: Tensor,
    experts_NK: Tensor,
    weight_EDS: Tensor,
    bias_D: Tensor | None = None,
    weights_NK: Tensor | None = None,
) -> Tensor:
    """What `emoe_kernels.linear.expert_combine` computes, dense and differentiated by torch."""
    with torch.autocast(h_NKS.device.type, enabled=False):
        chosen_NKE = _chosen(experts_NK, weight_EDS.shape[0])
        if weights_NK is not None:
            h_NKS = (h_NKS * weights_NK.unsqueeze(-1)).to(h_NKS.dtype)
        h_NKS = h_NKS.masked_fill(~chosen_NKE.any(2, keepdim=True), 0.0)  # an unused slot may hold anything
        h_NES = torch.einsum("nke,nks->nes", chosen_NKE.to(h_NKS.dtype), h_NKS)
        y_ND = torch.einsum("nes,eds->nd", h_NES, weight_EDS)
        return y_ND if bias_D is None else y_ND + bias_D
