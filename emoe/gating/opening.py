"""A gate row from two texts: open on the tokens of one, shut on those of the other.

Legend: N tokens, C numbers that a gate row is multiplied with, L weights of the old text, X what is counted.
"""

from __future__ import annotations

import math

import torch

RIDGE = 1e-3
"""Ridge, in units of the mean square of the inputs. From 0.1 to 0.001 the share of new tokens that pass rises by a
quarter, and then stays (docs/log.md)."""

SHARPNESS = 3.0
"""Logits are about this far from 0 on tokens that are told apart: sigmoid(3) is 0.95."""

OLD_WEIGHTS = (1.0, 4.0, 16.0, 64.0)
"""How often the squares of old tokens count beside those of new ones, where a row has no intercept. With
these and an exact search gates of a small ModuleFormer open on 36% of German instead of 35% at a tenth of English, 11%
instead of 8% at a fiftieth (docs/log.md)."""

STEEPEST = 0.25
"""Least part of w in a row, of w and v together, by which the row is scaled up."""

NARROWEST = 1e-6
"""Least angle between the crossings that a row is put between: nearer ones may be of the same token, by rounding."""


class Opening:
    """Fisher's discriminant between tokens of new and of old text, with the threshold put where few old ones pass.

    With y = 1 for new tokens and -1 for old ones, both kinds weighing the same, ridge regression without an intercept
    gives w for y, and v for the constant 1. The row is along w cos θ + v sin θ. Inputs that end in a column of ones
    have an intercept, which is v; elsewhere v is only near to one, and can be below 0 on some tokens, so that no part
    of the circle is left out. Without an intercept the old text's squares also weigh more (`OLD_WEIGHTS`), each with a
    w and v of its own.

    Cf. Hastie, Tibshirani, Friedman, "The Elements of Statistical Learning", sec. 4.3. To use it for added experts is
    ours: Shen et al. 2023 (arXiv 2306.04640, sec. 3.4) train new rows from random ones, on the new text alone.
    """

    def __init__(self) -> None:
        self._squares: dict[bool, torch.Tensor] = {}
        self._sums: dict[bool, torch.Tensor] = {}
        self._counts = {True: 0, False: 0}
        self._intercept = True
        self._scores: dict[bool, list[torch.Tensor]] = {True: [], False: []}

    def add(self, c_NC: torch.Tensor, new: bool) -> None:
        """Inputs of the gate on tokens of the new text, or of the old one."""
        c_NC = c_NC.float().cpu()
        square_CC, sum_C = c_NC.T @ c_NC, c_NC.sum(0)
        self._squares[new] = self._squares[new] + square_CC if new in self._squares else square_CC
        self._sums[new] = self._sums[new] + sum_C if new in self._sums else sum_C
        self._counts[new] += len(c_NC)
        self._intercept &= bool((c_NC[:, -1] == 1).all())

    def solve(self) -> None:
        """After both texts: w and v for each weight of the old one."""
        squares = {new: self._squares.pop(new).double() / self._counts[new] for new in (True, False)}
        mean_C = {new: self._sums.pop(new).double() / self._counts[new] for new in (True, False)}
        targets_C2 = torch.stack([mean_C[True] - mean_C[False], mean_C[True] + mean_C[False]], 1) / 2
        rows = []
        for weight in OLD_WEIGHTS[: 1 if self._intercept else None]:
            square_CC = (squares[True] + weight * squares[False]) / (1 + weight)
            diagonal_C = square_CC.diagonal()
            diagonal_C += RIDGE * diagonal_C.mean().clamp_min(1e-12)
            rows.append(torch.linalg.solve(square_CC, targets_C2))
        self.rows_LC2 = torch.stack(rows)

    def score(self, c_NC: torch.Tensor, new: bool) -> None:
        """After `solve`, other tokens of both texts: what the threshold is put by, and judged by."""
        self._scores[new].append(c_NC.double().cpu() @ self.rows_LC2)

    def row(self, share: float) -> tuple[torch.Tensor, float, float]:
        """The row, (C,) fp32, and the shares of new and of old tokens that it opens on.

        Of all rows that keep to the share it is the one that opens on most new tokens. Where none does, which needs
        inputs without an intercept, it is the one that opens on most new tokens for each old one: a row that is nearer
        to the share could be as good as shut on both.

        Args:
            share: of the old tokens that may pass, at most.
        """
        new_LN2, old_LN2 = (torch.cat(self._scores[kind], 1) for kind in (True, False))
        found = [best_angle(*scores, share) for scores in zip(new_LN2, old_LN2, strict=True)]
        place = max(range(len(found)), key=lambda place: _worth(*found[place][1:], share))
        angle, new, old = found[place]
        part = math.cos(angle)
        direction_2 = self.rows_LC2.new_tensor([part, math.sin(angle)]) / max(abs(part), STEEPEST)
        return (SHARPNESS * self.rows_LC2[place] @ direction_2).float(), new, old


def best_angle(new_N2: torch.Tensor, old_N2: torch.Tensor, share: float) -> tuple[float, float, float]:
    """The angle θ at which a cos θ + b sin θ > 0 is best for scores (a, b), and the shares of new and old ones there.

    Exact: a token passes on half of the circle, and between two crossings nothing changes.
    """
    scores_N2 = torch.cat([new_N2, old_N2])
    is_new_N = torch.arange(len(scores_N2)) < len(new_N2)
    some_N = (scores_N2.abs() > 0).any(1)  # a token with scores of 0 passes nowhere
    if not some_N.any():
        return 0.0, 0.0, 0.0
    middle_N, is_new_N = torch.atan2(scores_N2[some_N, 1], scores_N2[some_N, 0]), is_new_N[some_N]
    opens_N, shuts_N = ((middle_N + turn) % math.tau for turn in (-math.pi / 2, math.pi / 2))
    angle_X, order_X = torch.cat([opens_N, shuts_N]).sort()
    step_X = torch.where(order_X < len(opens_N), 1, -1)
    open_at_zero_N = shuts_N < opens_N
    new_X, old_X = (
        ((step_X * kind_N.repeat(2)[order_X]).cumsum(0) + (open_at_zero_N & kind_N).sum()).double() / count
        for kind_N, count in ((is_new_N, len(new_N2)), (~is_new_N, len(old_N2)))
    )
    gap_X = torch.cat([angle_X[1:], angle_X[:1] + math.tau]) - angle_X
    wide_X = gap_X > NARROWEST
    angle_X, new_X, old_X = (angle_X + gap_X / 2)[wide_X], new_X[wide_X], old_X[wide_X]
    kept_X = old_X <= share
    worth_X = torch.where(kept_X, new_X, -1.0) if kept_X.any() else new_X / old_X
    best = int(worth_X.argmax())
    return angle_X[best].item(), new_X[best].item(), old_X[best].item()


def _worth(new: float, old: float, share: float) -> tuple[bool, float]:
    """What rows are compared by: do they keep to the share; then how many new tokens pass, or how many for each old."""
    return (True, new) if old <= share else (False, new / old)
