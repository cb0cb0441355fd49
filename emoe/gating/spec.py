"""What a gate is made of. Legend: N tokens, D model width, F neurons, E experts, K experts chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch


class GateFit(Protocol):
    """Sees calibration tokens with their activations, then gives the gate's buffers."""

    def update(self, x_ND: torch.Tensor, h_NF: torch.Tensor, energy_NE: torch.Tensor, scale_N: torch.Tensor) -> None:
        """Add N tokens: FFN inputs, hidden activations in expert order, energies of the experts, and the squared length
        of the residual stream that these energies compare with."""

    def reduce(self, total: Callable[..., None]) -> None:
        """Add up over processes; `total` sums tensors in place."""

    def finish(self) -> dict[str, torch.Tensor]:
        """Buffers of the router by name."""


@dataclass(frozen=True)
class GateMethod:
    """A way to build a gate without training it."""

    name: str
    reference: str
    summary: str
    fit: Callable[[int, int, int, int], GateFit] | None = None
    """(E, K, D, F) → a fit; None when the gate is derived from the weights alone."""
    tables: tuple[str, ...] = ()
    """Names of what a fit gives, tables of the router with a row for each expert."""

    @property
    def needs_calibration(self) -> bool:
        """Whether building it takes text."""
        return self.fit is not None
