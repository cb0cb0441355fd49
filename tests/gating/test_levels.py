"""From a budget to what layers and tokens get."""

from __future__ import annotations

import pytest
import torch
from support.routers import sparse_mlp

from emoe.gating.levels import LEAST, MOST, fit_levels, quantiles, share_budget
from emoe.modeling.routing_emoe import Level

N, E = 3000, 12


def logits(seed: int = 0, spread: float = 1.0) -> torch.Tensor:
    """Some tokens want much, some little."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, E, generator=generator) + spread * torch.randn(N, 1, generator=generator)


def router(rule: str, logits_NE: torch.Tensor, shared: int = 0, share_E: torch.Tensor | None = None):
    """A router with the levels of these logits."""
    ffn = sparse_mlp("discriminant", E, E, routing=rule, shared=shared)
    share_E = torch.arange(1, E + 1) / E if share_E is None else share_E
    for name, value in fit_levels(logits_NE, share_E, rule, shared).items():
        ffn.router._buffers[name] = value
    return ffn.router


@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("rule", ["threshold", "energy-share"])
def test_the_average_is_the_budget(rule, shared):
    """On the text that the levels were fitted to, and within bounds for every token; with all of them, all."""
    logits_NE = logits()
    found = router(rule, logits_NE, shared)
    found.top_k = E
    assert (found.choose(logits_NE).sort(1).values == torch.arange(E)).all()
    for k in range(shared + 1, E):
        found.top_k = k
        level, experts_NK = found.level(), found.choose(logits_NE)
        count_N = (experts_NK >= 0).sum(1)
        assert level.least <= count_N.min() and count_N.max() <= level.most
        assert level.least == max(1, shared, int(LEAST * k + 1e-6))
        assert level.most <= max(level.least, MOST * k + 1)
        assert count_N.float().mean() == pytest.approx(k, abs=0.05)
        if shared + 1 < k < E - 1:
            assert count_N.min() < count_N.max()  # else the rule would do nothing
        chosen = [set(row) - {-1} for row in experts_NK.tolist()]
        assert all(len(row) == n for row, n in zip(chosen, count_N.tolist(), strict=True))  # distinct
        assert all(set(range(shared)) <= row for row in chosen)


@pytest.mark.parametrize("rule", ["top-k", "threshold", "energy-share"])
def test_a_token_s_experts_do_not_depend_on_its_batch(rule):
    logits_NE = logits(1)
    found = router(rule, logits_NE)
    found.top_k = 4
    together = [set(row) - {-1} for row in found.choose(logits_NE[:40]).tolist()]
    alone = [set(found.choose(logits_NE[i : i + 1])[0].tolist()) - {-1} for i in range(40)]
    assert together == alone


def test_energy_share_takes_the_fewest_that_reach_the_share():
    logits_NE = logits(2)
    found = router("energy-share", logits_NE)
    found.top_k = 5
    level = found.level()
    p_NE = logits_NE.softmax(1).sort(1, descending=True).values
    needed_N = (p_NE.cumsum(1) < level.threshold).sum(1) + 1
    count_N = (found.choose(logits_NE) >= 0).sum(1)
    assert (count_N == needed_N.clamp(level.least, level.most)).all()


def test_tables_are_read_once_and_noticed_when_they_change():
    found = router("threshold", logits())
    found.top_k = 3
    first = found.level()
    assert found.level() is first
    found.bounds[2, 1] = 12
    assert found.level() == Level(first.least, 12, first.threshold)


def test_one_threshold_shares_the_budget():
    """Layers alike get alike; a layer whose experts move the stream more gets more; the average is the budget."""
    generator = torch.Generator().manual_seed(0)
    score_NE = torch.randn(4000, 8, generator=generator)
    table_LQ = torch.stack([quantiles(score_NE), quantiles(score_NE), quantiles(score_NE + 1)])
    share_EL = share_budget(table_LQ, 8)
    assert share_EL.shape == (8, 3)
    torch.testing.assert_close(share_EL.mean(1), torch.arange(1, 9, dtype=torch.float64) / 8, rtol=0, atol=0.01)
    torch.testing.assert_close(share_EL[:, 0], share_EL[:, 1])
    assert (share_EL[:7, 2] > share_EL[:7, 0]).all()
    assert (share_EL[7] == 1).all()
    assert (share_EL[1:] >= share_EL[:-1] - 1e-9).all()


def test_no_layer_is_left_without():
    """However little a layer does, it keeps a tenth, or half the budget if that is less."""
    score_NE = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
    share_EL = share_budget(torch.stack([quantiles(score_NE), quantiles(score_NE - 50)]), 8)
    assert share_EL[3, 1].item() == pytest.approx(0.1, rel=0.05)
    assert share_EL[0, 1].item() == pytest.approx(0.5 / 8, rel=0.05)
