"""Gate rows that tell two texts apart, on made-up tokens of known overlap."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import norm

from emoe.gating.opening import Opening


def tokens(count: int, shift: float, seed: int, intercept: bool) -> torch.Tensor:
    """Normal tokens (count, 8), ``shift`` standard deviations along one direction; far from 0 in another."""
    x_NC = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    x_NC[:, 0] += shift
    x_NC[:, 1] = 5 + 0.1 * x_NC[:, 1]  # what nearly all tokens have in common stands in for an intercept
    return torch.cat([x_NC, torch.ones(count, 1)], 1) if intercept else x_NC


def fitted(share: float, intercept: bool, parts: int = 1) -> tuple[torch.Tensor, float, float]:
    opening = Opening()
    texts = {True: tokens(40000, 2.0, 0, intercept), False: tokens(60000, 0.0, 1, intercept)}
    for step in (opening.add, opening.score):
        for new, x_NC in texts.items():
            for part in x_NC.chunk(parts):
                step(part, new)
        if step == opening.add:
            opening.solve()
    return opening.row(share)


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.5])
def test_as_many_new_tokens_pass_as_can(share, intercept):
    """Normal distributions two standard deviations apart: at a share s of the old, Φ(2 - Φ⁻¹(1 - s)) of the new."""
    row_C, new, old = fitted(share, intercept)
    assert old <= share
    assert old == pytest.approx(share, abs=2e-3)
    assert new == pytest.approx(norm.cdf(2 - norm.ppf(1 - share)), abs=0.03)
    fresh = {shift: (tokens(4000, shift, 9, intercept) @ row_C > 0).float().mean().item() for shift in (2.0, 0.0)}
    assert fresh[2.0] == pytest.approx(new, abs=0.03)
    assert fresh[0.0] == pytest.approx(old, abs=0.03)


def test_parts_make_the_whole():
    torch.testing.assert_close(fitted(0.1, True, parts=7)[0], fitted(0.1, True)[0], rtol=1e-4, atol=1e-5)
