"""How differently domains use modules, and what a module says of the domain.

Legend: C domains, E modules of a set.
"""

from __future__ import annotations

import torch

SMOOTHING = 0.5
"""Choices added to every module's count, so that one never chosen in a domain has a finite divergence (Krichevsky and
Trofimov 1981)."""


def distributions(counts_CE: torch.Tensor) -> torch.Tensor:
    """Smoothed shares of choices, each row a distribution, (C, E) fp64."""
    smoothed_CE = counts_CE.double() + SMOOTHING
    return smoothed_CE / smoothed_CE.sum(1, keepdim=True)


def kullback_leibler(p_CE: torch.Tensor) -> torch.Tensor:
    """KL(row ‖ column) in nats, (C, C); at least 0, whatever rounding says."""
    log_CE = p_CE.clamp_min(1e-300).log()
    return ((p_CE * log_CE).sum(1)[:, None] - p_CE @ log_CE.T).clamp_min(0)


def jensen_shannon(p_CE: torch.Tensor) -> torch.Tensor:
    """Jensen–Shannon divergence in nats, (C, C); at most log 2."""
    mean_CCE = (p_CE[:, None] + p_CE[None]) / 2
    entropy = lambda p: -(p * p.clamp_min(1e-300).log()).sum(-1)  # noqa: E731
    return (entropy(mean_CCE) - (entropy(p_CE)[:, None] + entropy(p_CE)[None]) / 2).clamp_min(0)


def specialisation(p_CE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What each module says of the domain when all domains are equally likely.

    Returns:
        (E,) nats: KL(domains given the module ‖ all domains), 0 when it is used alike by all, log C when by one alone;
        and (E,): the module's share of the mutual information of module and domain, which is that times its use.
    """
    use_E = p_CE.mean(0)
    given_CE = p_CE / (len(p_CE) * use_E.clamp_min(1e-300))
    told_E = (given_CE * (given_CE * len(p_CE)).clamp_min(1e-300).log()).sum(0).clamp_min(0)
    return told_E, use_E * told_E
