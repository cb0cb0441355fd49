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

    Two neurons are alike when they are active on the same tokens. The (tokens × F) table A of who was active is never
    held: each batch's rows are folded into ``features_FP += Aᵀ R`` with R Gaussian, which keeps inner products
    between neurons' columns in expectation (Johnson–Lindenstrauss; error about 1/√P). What A holds, by `kind`:

    - binary: 1 for the top tenth of the token's neurons by magnitude, else 0,
    - graded: the magnitude, over the token's root of summed squares,
    - tf-idf: the same for a neuron's own top tenth of tokens, times log(F / neurons so active on that token): tokens
      on which few neurons fire say more about what belongs together,
    - residual: log magnitude less the neuron's mean and the token's mean, so that what all do alike does not count.

    Source: co-activation as in MoEfication (Zhang et al. 2022, arXiv 2110.01786, sec. 3.2); weighing by the output
    column, the kinds and the projection are ours. Neither of the last three beat binary on SmolLM2 (docs/log.md).
    """

    def __init__(
        self,
        num_neurons: int,
        *,
        seed: int,
        kind: str = "binary",
        width: int = FEATURE_WIDTH,
        top_fraction: float = TOP_FRACTION,
    ):
        self.top = max(1, round(top_fraction * num_neurons))
        self.seed, self.kind, self.top_fraction = seed, kind, top_fraction
        # fp64, so that the order in which batches are added up hardly matters: rounding would lead to other partitions
        self.features_FP = torch.zeros(num_neurons, width, dtype=torch.float64)
        self.active_F = torch.zeros(num_neurons, dtype=torch.float64)
        self.sum_F = torch.zeros(num_neurons, dtype=torch.float64)
        self.energy_F = torch.zeros(num_neurons, dtype=torch.float64)
        self.count_1 = torch.zeros(1, dtype=torch.float64)

    @property
    def tokens(self) -> int:
        """Tokens seen so far."""
        return int(self.count_1.item())

    def update(self, h_NF: torch.Tensor, norm_F: torch.Tensor, number: int) -> None:
        """Add the hidden activations of N tokens; ``norm_F`` holds ‖w_down‖ of each neuron.

        ``number`` is that of the batch in the whole text: it seeds the batch's part of the projection, so that text may
        be shared among processes.
        """
        h_NF = h_NF.float()
        magnitude_NF = h_NF.abs() * norm_F
        threshold_N1 = magnitude_NF.topk(self.top, dim=1, sorted=False).values.amin(1, keepdim=True)
        active_NF = ((magnitude_NF >= threshold_N1) & (magnitude_NF > 0)).float()
        # A batch sums in fp32 (six times faster than in fp64), batches add up in fp64.
        self.active_F += active_NF.sum(0).cpu()
        self.sum_F += h_NF.sum(0).cpu()
        self.energy_F += magnitude_NF.square().sum(0).cpu()
        self.count_1 += len(h_NF)
        feature_NF = active_NF if self.kind == "binary" else self._features(magnitude_NF)
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + number) % (1 << 63))
        gaussian_NP = torch.randn(len(h_NF), self.features_FP.shape[1], generator=generator)
        self.features_FP += (feature_NF.T @ gaussian_NP.to(feature_NF.device)).cpu()

    def _features(self, magnitude_NF: torch.Tensor) -> torch.Tensor:
        """What the batch adds to the table A, (N, F)."""
        if self.kind == "residual":
            log_NF = (magnitude_NF.square() + 0.01 * magnitude_NF.square().mean(1, keepdim=True)).clamp_min(1e-30).log()
            return log_NF - log_NF.mean(0) - log_NF.mean(1, keepdim=True) + log_NF.mean()
        graded_NF = magnitude_NF / magnitude_NF.square().sum(1, keepdim=True).sqrt().clamp_min(1e-30)
        if self.kind == "graded":
            return graded_NF
        own = max(1, round(self.top_fraction * len(graded_NF)))
        chosen_NF = graded_NF >= graded_NF.topk(own, dim=0, sorted=False).values.amin(0)
        rarity_N1 = (graded_NF.shape[1] / chosen_NF.sum(1, keepdim=True).clamp_min(1)).log()
        return graded_NF * chosen_NF * rarity_N1

    def reduce(self, total) -> None:
        """Add up over processes; `total` sums tensors in place."""
        total(self.features_FP, self.active_F, self.sum_F, self.energy_F, self.count_1)

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
