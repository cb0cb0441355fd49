"""What a split method receives and offers, and the arithmetic of equal sizes.

F neurons, D model width, P features per neuron, E experts, S = F / E neurons per expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from emoe.errors import UserError

_ROWS_AT_A_TIME = 1024
"""Of a large array, so that no second one of its size is made on the way."""

Needs = Literal["features", "keys", "nothing"]


@dataclass(frozen=True)
class SplitInputs:
    """What is known of one FFN layer. A method reads only what its `needs` names; the rest may be ``None``."""

    num_neurons: int
    """F, the hidden width of the FFN."""
    keys_FD: np.ndarray | None = None
    """Raw rows of the FFN's input matrix, one a neuron (Llama: gate_proj; BERT, GPT: the up projection)."""
    features_FP: np.ndarray | None = None
    """Co-activation features, one row a neuron, of any length (norm); a neuron that never fires is all zero."""


class SplitMethod(Protocol):
    """One way to cut F neurons into E experts of S neurons."""

    @property
    def name(self) -> str: ...

    @property
    def summary(self) -> str: ...

    @property
    def reference(self) -> str: ...

    @property
    def needs(self) -> Needs: ...

    def split(
        self, inputs: SplitInputs, num_experts: int, *, seed: int, assignment: str = "fast", rough: bool = False
    ) -> np.ndarray:
        """Expert of every neuron, int32 ``(F,)``; each of the E labels occurs exactly S times. A `rough` one is quick
        to make and a start for refinement.

        Raises `UserError` when E does not divide F or when what the method needs is missing or malformed.
        """
        ...


def nearest_divisors(total: int, parts: int) -> str:
    """``"8 or 12"``: the divisors of ``total`` just below and just above ``parts``."""
    divisors = [d for d in range(1, total + 1) if total % d == 0]
    below = [d for d in divisors if d < parts][-1:]
    above = [d for d in divisors if d > parts][:1]
    return " or ".join(str(d) for d in below + above)


def equal_size(total: int, parts: int, *, total_name: str = "num_neurons", parts_name: str = "num_experts") -> int:
    """Size of each of ``parts`` equal parts; a `UserError` that names the nearest divisors when there is none."""
    if total < 1:
        raise UserError(f"{total_name}={total} must be at least 1")
    if parts >= 1 and total % parts == 0:
        return total // parts
    raise UserError(
        f"{total_name}={total} is not divisible by {parts_name}={parts}; try {nearest_divisors(total, parts)}"
    )


def required_rows(rows: np.ndarray | None, num_neurons: int, *, method: str, what: str) -> np.ndarray:
    """``rows`` as a 2-d array with one row a neuron, or a `UserError` that says which input the method lacks."""
    if rows is None:
        raise UserError(f"--split {method} needs {what}, which were not given")
    rows = np.asarray(rows)
    if rows.ndim != 2 or rows.shape[0] != num_neurons:
        raise UserError(f"--split {method}: {what} have shape {rows.shape}, expected ({num_neurons}, width)")
    return rows


def unit_rows(rows_FD: np.ndarray) -> np.ndarray:
    """Rows scaled to Euclidean length 1, ``(F, D)``; an all-zero row has no direction and stays zero.

    float32 stays float32, all else becomes float64. The largest entry is divided out first: squares of entries near
    1e-200 would vanish, those near 1e200 overflow.
    """
    unit_FD = np.array(rows_FD, dtype=np.float32 if np.asarray(rows_FD).dtype == np.float32 else np.float64)
    for start in range(0, len(unit_FD), _ROWS_AT_A_TIME):
        block_BD = unit_FD[start : start + _ROWS_AT_A_TIME]
        largest_B1 = np.abs(block_BD).max(axis=1, keepdims=True, initial=0.0)
        block_BD /= np.where(largest_B1 > 0, largest_B1, 1)
        length_B1 = np.sqrt(np.square(block_BD).sum(axis=1, keepdims=True))
        block_BD /= np.where(length_B1 > 0, length_B1, 1)
    return unit_FD
