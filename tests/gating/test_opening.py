"""Gate rows that tell two texts apart, on made-up tokens of known overlap."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import norm

from emoe.gating.opening import Opening, best_angle


def tokens(count: int, shift: float, seed: int, intercept: bool) -> torch.Tensor:
    """Normal tokens (count, 8), ``shift`` standard deviations along one direction; far from 0 in another."""
    x_NC = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    x_NC[:, 0] += shift
    x_NC[:, 1] = 5 + 0.1 * x_NC[:, 1]  # what nearly all tokens have in common stands in for an intercept
    return torch.cat([x_NC, torch.ones(count, 1)], 1) if intercept else x_NC


def fitted(share: float, intercept: bool, parts: int = 1) -> tuple[torch.Tensor, float, float]:
    return fitted_on({True: tokens(40000, 2.0, 0, intercept), False: tokens(60000, 0.0, 1, intercept)}, share, parts)


def fitted_on(texts: dict[bool, torch.Tensor], share: float, parts: int = 1) -> tuple[torch.Tensor, float, float]:
    opening = Opening()
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


def centred(seed: int, *, shift: float = 1.5, spread: float = 1.0) -> torch.Tensor:
    """Tokens (4000, 8) without anything that they have in common: old ones have a mean of 0, in every direction."""
    x_NC = spread * torch.randn(4000, 8, generator=torch.Generator().manual_seed(seed))
    x_NC[:, 0] += shift
    return x_NC


@pytest.mark.parametrize("share", [0.02, 0.1])
def test_old_text_that_no_row_can_be_shut_on(share):
    """Every row through 0 is open on half of the old tokens: the best is open on most new tokens for each old one."""
    row_C, new, old = fitted_on({True: centred(0), False: centred(1, shift=0.0)}, share)
    assert old == pytest.approx(0.5, abs=0.03)
    assert new == pytest.approx(norm.cdf(1.5), abs=0.02)
    assert (centred(2) @ row_C > 0).float().mean() == pytest.approx(norm.cdf(1.5), abs=0.03)


@pytest.mark.parametrize("share", [0.02, 0.1])
def test_a_row_is_found_where_nothing_is_constant(share):
    """Old tokens lie below 0 along two directions, new ones above it along the first."""
    texts = {True: centred(0, shift=2.0), False: centred(1, shift=-1.5)}
    texts[False][:, 1] -= 2.0
    _, new, old = fitted_on(texts, share)
    assert old <= share
    assert new > 0.8


@pytest.mark.parametrize("intercept", [True, False])
def test_the_spread_of_old_tokens_weighs_more(intercept, monkeypatch):
    """New tokens are also scattered along a direction in which old ones are close together: some of them lie far out,
    which the spread of both texts together hides. Rows with an intercept are as they were."""
    texts = {True: tokens(4000, 1.0, 0, intercept), False: tokens(6000, 0.0, 1, intercept)}
    texts[True][:, 2] = 1 + 5 * texts[True][:, 2]
    row_C, new, old = fitted_on(texts, 0.02)
    monkeypatch.setattr("emoe.gating.opening.OLD_WEIGHTS", (1.0,))
    plain_C, plain, _ = fitted_on(texts, 0.02)
    assert old <= 0.02
    assert torch.equal(row_C, plain_C) if intercept else new > plain + 0.05


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.02, 0.2, 0.5])
def test_no_angle_is_better(share, seed):
    """Against 20,001 angles around the circle; scores of 0 and equal scores among them."""
    generator = torch.Generator().manual_seed(seed)
    new_N2 = torch.randn(300, 2, generator=generator, dtype=torch.float64) + torch.tensor([0.8, 2.0 * (seed % 2)])
    old_N2 = torch.randn(400, 2, generator=generator, dtype=torch.float64) - torch.tensor([0.0, 2.0 * (seed // 2)])
    new_N2[:5], old_N2[:5], old_N2[5:40] = 0, 0, old_N2[40]
    turns = torch.linspace(0, math.tau, 20001, dtype=torch.float64)
    passing = lambda scores_N2, at: (scores_N2 @ torch.stack([at.cos(), at.sin()]) > 0).double().mean(0)  # noqa: E731
    new_X, old_X = passing(new_N2, turns), passing(old_N2, turns)
    angle, new, old = best_angle(new_N2, old_N2, share)
    at = torch.tensor([angle], dtype=torch.float64)
    assert (passing(new_N2, at).item(), passing(old_N2, at).item()) == pytest.approx((new, old), abs=1e-9)
    if (old_X <= share).any():
        assert old <= share
        assert new >= new_X[old_X <= share].max() - 1e-9
    else:
        assert new / old >= (new_X / old_X).max() - 1e-9


def test_parts_make_the_whole():
    torch.testing.assert_close(fitted(0.1, True, parts=7)[0], fitted(0.1, True)[0], rtol=1e-4, atol=1e-5)
