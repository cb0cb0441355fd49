"""Split by co-activation: neurons that fire on the same tokens share an expert."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from emoe.clustering.balanced import balanced_kmeans
from emoe.clustering.spec import Needs, SplitInputs, required_rows, unit_rows


@dataclass(frozen=True)
class CoActivation:
    """Balanced k-means on the L2-normalised co-activation features.

    In the spirit of MoEfication's co-activation graph, not the same: that paper weighs an edge by how often two
    neurons are active together and cuts the graph into equal parts; here the angle between two feature rows plays the
    edge's part, which needs no F x F graph. A neuron that never fires has an all-zero row. It stays at the origin, at
    distance 1 from all that do fire, so that silent neurons gather in experts that need not run.
    """

    name: str = "coactivation"
    summary: str = "balanced k-means on which tokens the neurons fire"
    reference: str = "after MoEfication's co-activation graph: Zhang et al., ACL Findings 2022, arXiv 2110.01786"
    needs: Needs = "features"

    def split(
        self, inputs: SplitInputs, num_experts: int, *, seed: int, assignment: str = "fast", rough: bool = False
    ) -> np.ndarray:
        """Expert of every neuron, int32 ``(F,)``. Raises `UserError` without features or when E does not divide F."""
        features_FP = required_rows(
            inputs.features_FP, inputs.num_neurons, method=self.name, what="co-activation features"
        )
        # float64: rounding leads the descent to other partitions, and the published figures are of these
        unit_FP = unit_rows(features_FP.astype(np.float64))
        return balanced_kmeans(unit_FP, num_experts, seed=seed, assignment=assignment, rough=rough).labels_F
