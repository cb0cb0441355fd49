"""Split by weights: neurons that look for similar inputs share an expert."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from emoe.clustering.balanced import balanced_kmeans
from emoe.clustering.spec import Needs, SplitInputs, required_rows, unit_rows

_LARGE = 1 << 24
"""Entries up to which rows are clustered in float64: 128 MiB of them."""


@dataclass(frozen=True)
class Weights:
    """Balanced k-means on the L2-normalised rows of the FFN's input matrix.

    Normalised for the clustering only: the caller's keys stay as they are. The papers run the package
    k-means-constrained; ours differs in the solver and goes further than Lloyd's iteration (balanced.py).
    """

    name: str = "weights"
    summary: str = "balanced k-means on the L2-normalised rows of the FFN's input matrix"
    reference: str = (
        "EMoE: Qiu, Huang, Fu, NAACL 2024, arXiv 2310.10908, sec. 3.1; "
        "balanced k-means on weights: MoEfication, Zhang et al., ACL Findings 2022, arXiv 2110.01786"
    )
    needs: Needs = "keys"

    def split(
        self, inputs: SplitInputs, num_experts: int, *, seed: int, assignment: str = "fast", rough: bool = False
    ) -> np.ndarray:
        """Expert of every neuron, int32 ``(F,)``. Raises `UserError` without keys or when E does not divide F."""
        keys_FD = required_rows(inputs.keys_FD, inputs.num_neurons, method=self.name, what="input-matrix rows (keys)")
        # float64 as in coactivation.py, but not where copies of the rows would take a gigabyte
        exact = keys_FD.size <= _LARGE
        unit_FD = unit_rows(keys_FD.astype(np.float64) if exact else keys_FD)
        return balanced_kmeans(unit_FD, num_experts, seed=seed, assignment=assignment, rough=rough).labels_F
