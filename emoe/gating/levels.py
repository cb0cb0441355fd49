"""How many experts a token gets: tables from a budget to a layer's share, bounds and threshold.

A *budget* of K experts is an average over tokens and layers. Legend: N tokens, E experts, L layers.
"""

from __future__ import annotations

import torch

LEAST, MOST = 0.7, 2.0
"""Bounds on what one token gets, in units of the layer's average. Without a lower bound a gate that misjudges a token
starves it: perplexity over dense 9.1 with a threshold alone, 2.03 with 0.7, 2.49 with a fixed number (SmolLM2, 32 of
64 experts); 0.5 and 0.7 measured alike."""

SAMPLE = 1 << 17
"""Gate logits that a threshold is read from: their noise is then far below that of the held-out text."""

QUANTILES = 513
"""Points of a layer's distribution of energies that are kept for sharing out the budget."""

LEAST_SHARE = 0.1
"""Least share of its experts that a layer gets when the budget is shared by sensitivity (half the budget, if less)."""


def sample_tokens(batch_tokens: int, num_tokens: int, num_experts: int, number: int) -> torch.Tensor:
    """Indices of tokens of batch `number`, drawn so that the (N, E) table over all batches has about `SAMPLE` entries.

    Drawn, not every n-th: a step in tune with the length of the sequences would pick their first tokens.
    """
    wanted = -(-batch_tokens * SAMPLE // max(1, num_tokens * num_experts))
    generator = torch.Generator().manual_seed(number)
    return torch.randperm(batch_tokens, generator=generator)[: min(wanted, batch_tokens)].sort().values


def quantiles(score_NE: torch.Tensor) -> torch.Tensor:
    """`QUANTILES` evenly spaced quantiles of all scores, ascending, fp32."""
    ordered = score_NE.flatten().sort().values
    return ordered[torch.linspace(0, len(ordered) - 1, QUANTILES).round().long()].float()


def share_budget(quantiles_LQ: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Share of its experts that each layer gets under each budget K = 1 … E, (E, L) fp64; rows average to K / E.

    One threshold for all layers: an expert's output is worth computing when its energy, relative to the residual
    stream's, exceeds it, wherever the expert is. ``quantiles_LQ`` are of log(energy / squared length of the residual
    stream) over the tokens and experts of each layer.
    """
    rank_Q = torch.linspace(1, 0, quantiles_LQ.shape[1], dtype=torch.float64)  # share of scores above each quantile
    lowest, highest = quantiles_LQ.min().item(), quantiles_LQ.max().item()
    shares_EL = []
    for k in range(1, num_experts + 1):
        budget = k / num_experts
        least = min(LEAST_SHARE, budget / 2)
        low, high = lowest - 1.0, highest + 1.0
        for _ in range(50):
            threshold = (low + high) / 2
            above_L = torch.searchsorted(quantiles_LQ, torch.full_like(quantiles_LQ[:, :1], threshold))[:, 0]
            share_L = torch.where(above_L < len(rank_Q), rank_Q[above_L.clamp_max(len(rank_Q) - 1)], 0.0)
            share_L = share_L.clamp_min(least)
            low, high = (threshold, high) if share_L.mean() > budget else (low, threshold)
        shares_EL.append(share_L * (budget / share_L.mean()) if k < num_experts else torch.ones_like(share_L))
    return torch.stack(shares_EL).clamp_max(1.0)


def fit_levels(logits_NE: torch.Tensor, share_E: torch.Tensor, rule: str, shared: int) -> dict[str, torch.Tensor]:
    """The router's ``bounds`` (E, 2) int64 and ``threshold`` (E,) fp32 under the budgets K = 1 … E.

    Args:
        logits_NE: gate logits on calibration text.
        share_E: this layer's share of its experts under each budget.
        rule: "top-k", "threshold" or "energy-share" (`routing_emoe.Router`).
        shared: the first so many experts are always chosen.
    """
    num_tokens, num_experts = logits_NE.shape
    key_NE = None
    if rule == "threshold":
        key_NE = -logits_NE.index_fill(1, torch.arange(shared), torch.inf).sort(dim=1, descending=True).values
    elif rule == "energy-share":
        share_NE = logits_NE[:, shared:].softmax(1).sort(dim=1, descending=True).values
        key_NE = torch.nn.functional.pad(share_NE.cumsum(1) - share_NE, (shared, 0))
    bounds_E2 = torch.empty(num_experts, 2, dtype=torch.int64)
    threshold_E = torch.zeros(num_experts)
    for row, share in enumerate(share_E.tolist()):
        average = max(1.0, shared, share * num_experts)
        if rule == "top-k":
            bounds_E2[row] = min(num_experts, round(average))
            continue
        least = min(num_experts, max(1, shared, int(LEAST * average + 1e-6)))
        most = min(num_experts, max(least, -int(-MOST * average // 1)))
        bounds_E2[row] = torch.tensor([least, most])
        optional = key_NE[:, least:most].flatten()
        wanted = round((average - least) * num_tokens)
        # Between the first key that is not wanted and the last that is: no key lies on the threshold, where rounding
        # would decide.
        limit = optional.kthvalue(wanted + 1).values if wanted < len(optional) else torch.tensor(torch.inf)
        below = optional[optional < limit]
        if len(below) and limit < torch.inf:
            limit = (limit + below.max()) / 2
        threshold_E[row] = -limit if rule == "threshold" else limit
    return {"bounds": bounds_E2, "threshold": threshold_E}
