"""Energies of experts: how far each moves the residual stream on each token. What gates predict and splits preserve.

Legend: N tokens, D model width, F neurons in expert order, E experts, S neurons per expert, K experts chosen.
"""

from __future__ import annotations

import torch

FLOOR = 0.01
"""Added to energies before the logarithm, in units of the token's mean: a ReLU expert may have none at all."""


class ExpertEnergies:
    """‖Σ_j h_j w_j‖² over the neurons j of each expert: the squared length of what it adds to the residual stream.

    Args:
        down_DF: output matrix, neurons in expert order.
        num_experts: E.

    The cross terms between neurons count: without them, Σ_j (h_j ‖w_j‖)², the same gate cost 2.49 instead of 2.43
    times the dense perplexity (SmolLM2-135M, 32 of 64, converted prefix).
    """

    def __init__(self, down_DF: torch.Tensor, num_experts: int) -> None:
        self.num_experts = num_experts
        parts = (part_DS.detach().float() for part_DS in down_DF.chunk(num_experts, dim=1))  # one fp32 copy at a time
        self.gram_ESS = torch.stack([part_DS.T @ part_DS for part_DS in parts])

    def __call__(self, h_NF: torch.Tensor) -> torch.Tensor:
        """Energies (N, E), fp32, of hidden activations (N, F)."""
        h_ENS = h_NF.float().unflatten(1, (self.num_experts, -1)).transpose(0, 1)
        return ((h_ENS @ self.gram_ESS) * h_ENS).sum(-1).clamp_min_(0).T


def log_energies(energy_NE: torch.Tensor) -> torch.Tensor:
    """Logarithms of energies (N, E), finite even where an expert has none."""
    return (energy_NE + FLOOR * energy_NE.mean(1, keepdim=True)).clamp_min(1e-30).log()
