"""Contiguous split: neurons in their original order, cut into blocks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from emoe.clustering.spec import Needs, SplitInputs, equal_size


@dataclass(frozen=True)
class Contiguous:
    """Expert e takes the neurons from e S up to (e + 1) S. `seed` and `assignment` have no meaning here.

    Neurons have no natural order, so this is a second control: it moves no weight, and any gain over it is the
    clustering's.
    """

    name: str = "contiguous"
    summary: str = "blocks of neurons in their original order (control)"
    reference: str = "none: a control"
    needs: Needs = "nothing"

    def split(
        self, inputs: SplitInputs, num_experts: int, *, seed: int, assignment: str = "fast", rough: bool = False
    ) -> np.ndarray:
        """Expert of every neuron, int32 ``(F,)``. Raises `UserError` when E does not divide F."""
        size = equal_size(inputs.num_neurons, num_experts)
        return np.repeat(np.arange(num_experts, dtype=np.int32), size)
