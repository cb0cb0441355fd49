"""What calibration learns of a layer's neurons, batch by batch.

Legend: N tokens, F neurons, P feature width. The *magnitude* of a neuron on a token is |h|·‖w_down‖: how far it moves
the residual stream.
"""

from __future__ import annotations

import torch

TOP_FRACTION = 0.1
"""Share of a token's neurons that count as active: those of largest magnitude."""

FEATURE_WIDTH = 256
"""Columns of the random projection that keeps co-activation features at a fixed size."""


class NeuronStatistics:
    """Co-activation features, firing rates, mean activations and energies of F neurons.

    Two neurons are alike when they are active on the same tokens. The (tokens × F) table of who was active is never
    held: each batch's table B is folded into ``features_FP += Bᵀ R`` with R Gaussian, which keeps inner products
    between neurons' columns in expectation (Johnson–Lindenstrauss; error about 1/√P).

    Source: co-activation as in MoEfication (Zhang et al. 2022, arXiv 2110.01786, sec. 3.2); weighing by the output
    column and the projection are ours.
    """

    def __init__(self, num_neurons: int, *, seed: int, width: int = FEATURE_WIDTH, top_fraction: float = TOP_FRACTION):
        self.top = max(1, round(top_fraction * num_neurons))
        self.generator = torch.Generator().manual_seed(seed)
        self.features_FP = torch.zeros(num_neurons, width)
        self.active_F = torch.zeros(num_neurons, dtype=torch.float64)
        self.sum_F = torch.zeros(num_neurons, dtype=torch.float64)
        self.energy_F = torch.zeros(num_neurons, dtype=torch.float64)
        self.tokens = 0

    def update(self, h_NF: torch.Tensor, norm_F: torch.Tensor) -> None:
        """Add the hidden activations of N tokens; ``norm_F`` holds ‖w_down‖ of each neuron."""
        h_NF = h_NF.float()
        magnitude_NF = h_NF.abs() * norm_F
        threshold_N1 = magnitude_NF.topk(self.top, dim=1, sorted=False).values.amin(1, keepdim=True)
        active_NF = ((magnitude_NF >= threshold_N1) & (magnitude_NF > 0)).float()
        gaussian_NP = torch.randn(len(h_NF), self.features_FP.shape[1], generator=self.generator)
        self.features_FP += (active_NF.T @ gaussian_NP.to(active_NF.device)).cpu()
        # A batch sums in fp32 (six times faster than in fp64), batches add up in fp64.
        self.active_F += active_NF.sum(0).cpu()
        self.sum_F += h_NF.sum(0).cpu()
        self.energy_F += magnitude_NF.square_().sum(0).cpu()
        self.tokens += len(h_NF)

    def report(self) -> dict[str, float]:
        """For people: the share of neurons that were never active, and the top tenth's share of all energy."""
        summary = self.summary()
        energy_F = summary["energy"].sort(descending=True).values
        tenth = max(1, len(energy_F) // 10)
        return {
            "never_active": round((summary["firing_rate"] == 0).double().mean().item(), 4),
            "energy_of_top_tenth": round((energy_F[:tenth].sum() / energy_F.sum().clamp_min(1e-30)).item(), 4),
        }

    def summary(self) -> dict[str, torch.Tensor]:
        """Per neuron, (F,) fp64: share of tokens on which it was among the top ones, mean activation, mean energy."""
        n = max(1, self.tokens)
        return {"firing_rate": self.active_F / n, "mean": self.sum_F / n, "energy": self.energy_F / n}
