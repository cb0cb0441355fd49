"""Split by the co-activation graph: cut it into equal parts so that little weight is cut."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from emoe.clustering.balanced import balanced_kmeans
from emoe.clustering.spec import Needs, SplitInputs, required_rows


@dataclass(frozen=True)
class Graph:
    """Equal parts of the graph whose edge i-j weighs how often neurons i and j are active together.

    With A the (tokens x F) table of who was active, that weight is (AᵀA)_ij, and features f = AᵀR keep it as the inner
    product f_i . f_j. For parts of equal size S the weight inside all parts is Σ_e |Σ_{j in e} f_j|², and
    Σ_j |f_j|² - (1/S) of that is the inertia of the rows f: the least cut *is* balanced k-means on features that are
    not normalised (Dhillon, Guan, Kulis, "Kernel k-means, spectral clustering and normalized cuts", KDD 2004, sec. 3).
    So no F x F graph is made. MoEfication cuts its graph with METIS, which finds another local optimum.
    """

    name: str = "graph"
    summary: str = "equal parts of the co-activation graph with the least weight cut"
    reference: str = "MoEfication: Zhang et al., ACL Findings 2022, arXiv 2110.01786, sec. 3.2"
    needs: Needs = "features"

    def split(
        self, inputs: SplitInputs, num_experts: int, *, seed: int, assignment: str = "fast", rough: bool = False
    ) -> np.ndarray:
        """Expert of every neuron, int32 ``(F,)``. Raises `UserError` without features or when E does not divide F."""
        features_FP = required_rows(
            inputs.features_FP, inputs.num_neurons, method=self.name, what="co-activation features"
        )
        return balanced_kmeans(
            features_FP.astype(np.float64), num_experts, seed=seed, assignment=assignment, rough=rough
        ).labels_F
