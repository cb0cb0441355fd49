"""Random split: the control that shows what a clustering is worth. (`random.py` would hide the standard module.)"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from emoe.clustering.balanced import canonical_labels
from emoe.clustering.spec import Needs, SplitInputs, equal_size


@dataclass(frozen=True)
class Random:
    """A uniformly drawn equal-size partition. `assignment` has no meaning here."""

    name: str = "random"
    summary: str = "equal-size partition drawn from the seed (control)"
    reference: str = "random-split baseline of MoEfication: Zhang et al., ACL Findings 2022, arXiv 2110.01786"
    needs: Needs = "nothing"

    def split(
        self, inputs: SplitInputs, num_experts: int, *, seed: int, assignment: str = "fast", rough: bool = False
    ) -> np.ndarray:
        """Expert of every neuron, int32 ``(F,)``. Raises `UserError` when E does not divide F."""
        size = equal_size(inputs.num_neurons, num_experts)
        labels_F = np.repeat(np.arange(num_experts), size)
        return canonical_labels(np.random.default_rng(seed).permutation(labels_F))
