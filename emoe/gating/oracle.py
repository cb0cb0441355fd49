"""Expert energies, and the oracle gate that reads them: for measurement only, it looks at what a gate must predict.

Legend: N tokens, F neurons in expert order, E experts, K experts chosen.
"""

from __future__ import annotations

import torch


def expert_energies(h_NF: torch.Tensor, norm_F: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Σ (h·‖w_down‖)² over the neurons of each expert, (N, E) fp32."""
    return (h_NF.float() * norm_F).square().unflatten(1, (num_experts, -1)).sum(-1)


def oracle_experts(h_NF: torch.Tensor, norm_F: torch.Tensor, num_experts: int, top_k: int) -> torch.Tensor:
    """The K experts of largest energy of each token, (N, K) int64: the bound for any gate on this split."""
    return expert_energies(h_NF, norm_F, num_experts).topk(top_k, dim=1, sorted=False).indices
