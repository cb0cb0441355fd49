"""What the gates of a ModuleFormer do with text: expert load, H(m), H(m|x).

Legend: N tokens, E experts, K experts chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .router import Gate, Routing


class GateUsage:
    """Sums over the tokens that pass the gates of a model between two `take`s; nothing waits for a GPU meanwhile.

    Counts every token that it sees: give it text without padding. Layers that checkpointing computes twice count
    twice, which changes no share.

    Args:
        model: any model; one without gates gives nothing.
        training: whether what passes in training mode counts, or what passes in evaluation.
    """

    def __init__(self, model: nn.Module, *, training: bool = False) -> None:
        self.training = training
        self.gates = {name: module for name, module in model.named_modules() if isinstance(module, Gate)}
        self._sums: dict[str, torch.Tensor] = {}
        self._hooks = [
            gate.register_forward_hook(lambda gate, _inputs, routing, name=name: self._add(gate, name, routing))
            for name, gate in self.gates.items()
        ]

    @torch.no_grad()
    def _add(self, gate: Gate, name: str, routing: Routing) -> None:
        if gate.training is not self.training:
            return
        p_NE = routing.probabilities()
        E = p_NE.shape[1]
        chosen_NE = p_NE.new_zeros(len(p_NE), E + 1).scatter_(1, routing.experts_NK % (E + 1), 1.0)[:, :-1]
        entropy = -torch.xlogy(p_NE, p_NE).sum()
        sums = torch.cat([p_NE.sum(0), chosen_NE.sum(0), entropy.view(1), entropy.new_full((1,), len(p_NE))]).double()
        self._sums[name] = self._sums[name] + sums if name in self._sums else sums

    def take(self, total: Callable[[torch.Tensor], None] | None = None) -> list[dict[str, Any]]:
        """What has been seen, a dict a gate, and start anew; empty if there are no gates or no tokens.

        Each has ``layer``, ``part`` ("attention" or "ffn"), ``load`` (E shares of all choices), ``marginal`` and
        ``conditional`` (H(m) and H(m|x), nats).

        Args:
            total: adds a tensor up over all processes, in place.
        """
        rows = []
        for name, sums in self._sums.items():
            if total is not None:
                total(sums)
            E = (len(sums) - 2) // 2
            p_E, chosen_E, entropy, tokens = sums.split([E, E, 1, 1])
            p_E = p_E / tokens
            rows.append(
                {
                    "layer": int(name.split("h.")[1].split(".")[0]),
                    "part": "attention" if ".attn." in name else "ffn",
                    "load": (chosen_E / chosen_E.sum()).tolist(),
                    "marginal": -torch.xlogy(p_E, p_E).sum().item(),
                    "conditional": (entropy / tokens).item(),
                }
            )
        self._sums = {}
        return rows

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()


def domain_divergence(gates: dict[str, list[dict[str, Any]]], smallest: float = 1e-4) -> torch.Tensor:
    """KL divergence of expert loads between domains, nats, mean over gates: entry (a, b) is KL(a || b).

    Source: Shen et al., "ModuleFormer", arXiv 2306.04640, sec. 4.3.

    Args:
        gates: domain → what `GateUsage.take` gave for its text.
        smallest: share below which a load counts as that much, so that an expert unused in one domain costs a finite
            amount.
    """
    loads = {
        name: [torch.tensor(gate["load"], dtype=torch.float64).clamp_min(smallest) for gate in found]
        for name, found in gates.items()
    }
    loads = {name: [load / load.sum() for load in found] for name, found in loads.items()}
    kl = lambda a, b: torch.stack([(p * (p / q).log()).sum() for p, q in zip(a, b, strict=True)]).mean()  # noqa: E731
    return torch.stack([torch.stack([kl(a, b) for b in loads.values()]) for a in loads.values()])
