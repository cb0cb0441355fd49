"""A gate row from two texts: open on the tokens of one, shut on those of the other.

Legend: N tokens, C numbers that a gate row is multiplied with, X what is counted.
"""

from __future__ import annotations

import torch

RIDGE = 1e-3
"""Ridge, in units of the mean square of the inputs. From 0.1 to 0.001 the share of new tokens that pass rises by a
quarter, and then stays (docs/log.md)."""

SHARPNESS = 3.0
"""Logits are about this far from 0 on tokens that are told apart: sigmoid(3) is 0.95."""


class Opening:
    """Fisher's discriminant between tokens of new and of old text, with the threshold put where few old ones pass.

    With y = 1 for new tokens and -1 for old ones, both kinds weighing the same, ridge regression without an intercept
    gives w for y, and v for the constant 1. The row is w - q·v, its logit 0 at y = q; q is the least at which no more
    than the wanted share of old tokens has a logit above 0. Inputs that end in a column of ones have an intercept.

    Cf. Hastie, Tibshirani, Friedman, "The Elements of Statistical Learning", sec. 4.3. To use it for added experts is
    ours: Shen et al. 2023 (arXiv 2306.04640, sec. 3.4) train new rows from random ones, on the new text alone.
    """

    def __init__(self) -> None:
        self._squares: dict[bool, torch.Tensor] = {}
        self._sums: dict[bool, torch.Tensor] = {}
        self._counts = {True: 0, False: 0}
        self._scores: dict[bool, list[torch.Tensor]] = {True: [], False: []}

    def add(self, c_NC: torch.Tensor, new: bool) -> None:
        """Inputs of the gate on tokens of the new text, or of the old one."""
        c_NC = c_NC.float().cpu()
        square_CC, sum_C = c_NC.T @ c_NC, c_NC.sum(0)
        self._squares[new] = self._squares[new] + square_CC if new in self._squares else square_CC
        self._sums[new] = self._sums[new] + sum_C if new in self._sums else sum_C
        self._counts[new] += len(c_NC)

    def solve(self) -> None:
        """After both texts: w and v."""
        share = {new: 0.5 / self._counts[new] for new in (True, False)}
        square_CC = sum(share[new] * self._squares.pop(new).double() for new in (True, False))
        diagonal_C = square_CC.diagonal()
        diagonal_C += RIDGE * diagonal_C.mean().clamp_min(1e-12)
        mean_C = {new: share[new] * self._sums.pop(new).double() for new in (True, False)}
        targets_C2 = torch.stack([mean_C[True] - mean_C[False], mean_C[True] + mean_C[False]], 1)
        self.rows_C2 = torch.linalg.solve(square_CC, targets_C2)

    def score(self, c_NC: torch.Tensor, new: bool) -> None:
        """After `solve`, other tokens of both texts: what the threshold is put by, and judged by."""
        self._scores[new].append(c_NC.double().cpu() @ self.rows_C2)

    def row(self, share: float) -> tuple[torch.Tensor, float, float]:
        """The row, (C,) fp32, and the shares of new and of old tokens that it opens on.

        Args:
            share: of the old tokens that may pass, at most.
        """
        new_N2, old_N2 = (torch.cat(self._scores[kind]) for kind in (True, False))
        opens = lambda scores_N2, q: ((scores_N2[:, 0] - q * scores_N2[:, 1]) > 0).double().mean().item()  # noqa: E731
        low, high = -2.0, 4.0
        for _ in range(40):
            q = (low + high) / 2
            low, high = (q, high) if opens(old_N2, q) > share else (low, q)
        row_C = SHARPNESS * (self.rows_C2[:, 0] - high * self.rows_C2[:, 1])
        return row_C.float(), opens(new_N2, high), opens(old_N2, high)
