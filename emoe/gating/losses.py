"""Auxiliary losses on routers: what keeps experts in use, gathers load on few of them, or holds a router back.

Legend: N tokens, E experts, K experts chosen per token.

Padding is left out (``mask_N``). Means are taken over the tokens of all processes: a mean of the processes' entropies
is not the entropy of their mean. The sums travel through a differentiable all-reduce, so that gradients which are
averaged over processes afterwards, as DDP and FSDP do, are those of one process with the whole batch. Every process
must then call a loss equally often; ``across_processes=False`` keeps to the own tokens, as evaluation must.

This file imports only torch and the standard library, because it is copied verbatim beside ModuleFormer checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _SumOverProcesses(torch.autograd.Function):
    """Sum forward and, of the gradients, backward: every process's loss depends on every process's tokens."""

    @staticmethod
    def forward(ctx, own, group):
        ctx.group = group
        total = own.contiguous().clone()
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, dtotal):
        down = dtotal.contiguous().clone()
        torch.distributed.all_reduce(down, group=ctx.group)
        return down, None


def _total(own: Tensor, across_processes: bool, group) -> Tensor:
    """The sum of a vector over all processes; the vector itself where there is one process."""
    several = across_processes and torch.distributed.is_available() and torch.distributed.is_initialized()
    if not several or torch.distributed.get_world_size(group) == 1:
        return own
    return _SumOverProcesses.apply(own, group)


def _entropy_terms(p: Tensor) -> Tensor:
    """-p log p. The clamp keeps the derivative finite where a softmax has underflowed to 0."""
    return -p * p.clamp_min(torch.finfo(p.dtype).tiny).log()


def _mask(values: Tensor, mask_N: Tensor | None) -> Tensor:
    """The rows of tokens that count; the others become 0, whatever stood there."""
    if mask_N is None:
        return values
    keep_N = mask_N.to(torch.bool)
    return values.masked_fill(~keep_N.view(-1, *[1] * (values.dim() - 1)), 0.0)


def _count(values: Tensor, mask_N: Tensor | None) -> Tensor:
    """Number of tokens that count, as a vector of one element."""
    if mask_N is None:
        return values.new_full((1,), len(values), dtype=torch.float32)
    return mask_N.to(torch.bool).sum().to(torch.float32).view(1)


class Entropies(NamedTuple):
    """Of the expert m that a router assigns to tokens x; nats."""

    marginal: Tensor
    """H(m), of the mean probabilities: log E when experts are used equally."""
    conditional: Tensor
    """H(m|x), the mean over tokens: 0 when each token is certain of its expert."""


def entropies(
    probabilities_NE: Tensor, mask_N: Tensor | None = None, *, across_processes: bool = True, group=None
) -> Entropies:
    """H(m) and H(m|x) of a router.

    Args:
        probabilities_NE: (N, E) softmax over all experts; computed with in fp32.
        mask_N: (N,) True or 1 for tokens that count; None for all of them.
        across_processes: whether the tokens of all processes are meant.
        group: the processes that share a batch; None for all.

    Returns:
        Both 0 when no token counts.
    """
    p_NE = _mask(probabilities_NE.float(), mask_N)
    E = p_NE.shape[1]
    own = torch.cat([p_NE.sum(0), _entropy_terms(p_NE).sum().view(1), _count(p_NE, mask_N)])
    sums_E, entropy, count = _total(own, across_processes, group).split([E, 1, 1])
    count = count.detach().clamp_min(1.0)
    return Entropies(_entropy_terms(sums_E / count).sum(), (entropy / count).sum())


def mutual_information(
    probabilities_NE: Tensor,
    mask_N: Tensor | None = None,
    *,
    marginal_weight: float = 1.0,
    conditional_weight: float = 1.0,
    across_processes: bool = True,
    group=None,
) -> Tensor:
    """-I(m; x) = -H(m) + H(m|x): experts used equally by all tokens, each token certain of its own.

    Source: Shen et al., "ModuleFormer", arXiv 2306.04640, sec. 3.4. Differences: padding is left out, p(m) is the mean
    over all processes, and the two entropies may be weighted apart.

    Args:
        marginal_weight: factor of H(m), which wants balance.
        conditional_weight: factor of H(m|x), which wants certainty.
        probabilities_NE, mask_N, across_processes, group: as for `entropies`.
    """
    found = entropies(probabilities_NE, mask_N, across_processes=across_processes, group=group)
    return conditional_weight * found.conditional - marginal_weight * found.marginal


def load_concentration(
    probabilities_NE: Tensor, mask_N: Tensor | None = None, *, across_processes: bool = True, group=None
) -> Tensor:
    """H(m): minimised, the load gathers on few experts, and the others can be pruned.

    Source: ModuleFormer, sec. 3.5. Arguments as for `entropies`.
    """
    return entropies(probabilities_NE, mask_N, across_processes=across_processes, group=group).marginal


def switch(
    probabilities_NE: Tensor,
    experts_NK: Tensor,
    mask_N: Tensor | None = None,
    *,
    across_processes: bool = True,
    group=None,
) -> Tensor:
    """E * sum_e f_e p_e, with f the share of choices that fell on an expert and p its share of probability.

    1 when experts are used equally. No gradient goes through f. Source: Fedus, Zoph, Shazeer, "Switch Transformers",
    arXiv 2101.03961, sec. 2.2; with K > 1, f counts all K choices.

    Args:
        experts_NK: (N, K) chosen experts; -1 marks an unused slot.
        probabilities_NE, mask_N, across_processes, group: as for `entropies`.
    """
    p_NE = _mask(probabilities_NE.float(), mask_N)
    N, E = p_NE.shape
    slots_NK = experts_NK.long() + 1  # unused slots become column 0
    chosen_NE = p_NE.new_zeros(N, E + 1).scatter_(1, slots_NK, 1.0)[:, 1:]
    chosen_E = _mask(chosen_NE, mask_N).sum(0)
    p_E, f_E = _total(torch.cat([p_NE.sum(0), chosen_E]), across_processes, group).split([E, E])
    f_E = f_E.detach()
    smallest = torch.finfo(p_E.dtype).tiny
    return E * (f_E / f_E.sum().clamp_min(smallest) * (p_E / p_E.sum().clamp_min(smallest))).sum()


def z_loss(logits_NE: Tensor, mask_N: Tensor | None = None, *, across_processes: bool = True, group=None) -> Tensor:
    """Mean of logsumexp(logits)^2: keeps gate logits small.

    Source: Zoph et al., "ST-MoE", arXiv 2202.08906, eq. 5.

    Args:
        logits_NE: (N, E) raw gate logits; computed with in fp32.
        mask_N, across_processes, group: as for `entropies`.
    """
    squares_N = _mask(logits_NE.float(), mask_N).logsumexp(1).square()
    own = torch.cat([_mask(squares_N, mask_N).sum().view(1), _count(logits_NE, mask_N)])
    total, count = _total(own, across_processes, group)
    return total / count.detach().clamp_min(1.0)


def new_router_penalty(rows: Iterable[Tensor], anchors: Iterable[Tensor] | None = None) -> Tensor:
    """Sum of squares of router weights, or of their distance to where they were.

    For continual learning, ModuleFormer sec. 3.5: rows appended to a router for new experts are kept from taking over;
    with `anchors`, a router that is trained as a whole is kept near its old weights. Weights are the same in every
    process, so nothing is summed over processes.

    Args:
        rows: trainable tensors, such as the new rows of every layer's gate.
        anchors: as many fixed tensors of the same shapes; None stands for zeros.

    Raises:
        ValueError: there are no rows, or another number of anchors.
    """
    rows = list(rows)
    if not rows:
        raise ValueError("rows is empty: there is no router weight to penalise")
    distances = rows if anchors is None else [row - old.detach() for row, old in zip(rows, anchors, strict=True)]
    return torch.stack([distance.float().square().sum() for distance in distances]).sum()
