"""Representative-neuron gate: one neuron of each expert speaks for it."""

from __future__ import annotations

import torch

from emoe.gating.spec import GateMethod


class RepresentativeFit:
    """Finds in each expert the neuron whose |activation| correlates best with the root of the expert's energy.

    Difference from CMoE, which takes the neuron nearest to the cluster's centroid: we ask directly which one tells the
    energy, and scale it to that energy by least squares through the origin, so that experts compare on one scale.
    """

    def __init__(self, num_experts: int, top_k: int, width: int, num_neurons: int) -> None:
        self.shape = (num_experts, num_neurons // num_experts)
        zeros = lambda *shape: torch.zeros(*shape, dtype=torch.float64)  # noqa: E731
        self.h_ES, self.hh_ES, self.hr_ES = zeros(self.shape), zeros(self.shape), zeros(self.shape)
        self.r_E, self.count_1 = zeros(num_experts), zeros(1)

    def update(self, x_ND, h_NF, energy_NE, scale_N) -> None:
        h_NES = h_NF.float().abs().unflatten(1, self.shape)
        root_NE = energy_NE.sqrt()
        self.h_ES += h_NES.sum(0).cpu()
        self.hh_ES += h_NES.square().sum(0).cpu()
        self.hr_ES += (h_NES * root_NE[..., None]).sum(0).cpu()
        self.r_E += root_NE.sum(0).cpu()
        self.count_1 += len(h_NF)

    def reduce(self, total) -> None:
        total(self.h_ES, self.hh_ES, self.hr_ES, self.r_E, self.count_1)

    def finish(self) -> dict[str, torch.Tensor]:
        n = max(1.0, self.count_1.item())
        covariance_ES = self.hr_ES / n - self.h_ES / n * (self.r_E / n)[:, None]
        spread_ES = (self.hh_ES / n - (self.h_ES / n).square()).clamp_min(1e-30).sqrt()
        best_E = (covariance_ES / spread_ES).argmax(1)
        pick_E = lambda t_ES: t_ES.gather(1, best_E[:, None])[:, 0]  # noqa: E731
        scale_E = pick_E(self.hr_ES) / pick_E(self.hh_ES).clamp_min(1e-30)
        return {
            "neuron": best_E + torch.arange(self.shape[0]) * self.shape[1],
            "scale": scale_E.float(),
        }


METHOD = GateMethod(
    name="representative",
    reference="after CMoE: Pei et al. 2025, arXiv 2502.04416, sec. 4.2",
    summary="activation of the one neuron that best tells the expert's energy",
    fit=RepresentativeFit,
    tables=("neuron", "scale"),
)
