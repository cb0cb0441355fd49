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

        Each has ``layer``, ``part`` ("attention" or "ffn"), ``load`` (E shares of all choices), ``probability`` (E
        means), ``marginal`` and ``conditional`` (H(m) and H(m|x), nats).

        Args:
            total: adds a tensor up over all processes, in place; one that has seen no token takes part.
        """
        rows = []
        for name, gate in self.gates.items():
            E = gate.num_experts
            sums = self._sums.get(name)
            if sums is None:
                sums = torch.zeros(2 * E + 2, dtype=torch.float64, device=next(gate.parameters()).device)
            if total is not None:
                total(sums)
            p_E, chosen_E, entropy, tokens = sums.split([E, E, 1, 1])
            if not tokens:
                continue
            p_E = p_E / tokens
            rows.append(
                {
                    "layer": int(name.split("h.")[1].split(".")[0]),
                    "part": "attention" if ".attn." in name else "ffn",
                    "load": (chosen_E / chosen_E.sum()).tolist(),
                    "probability": p_E.tolist(),
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


def domain_divergence(
    gates: dict[str, list[dict[str, Any]]], what: str = "load", smallest: float = 1e-4
) -> torch.Tensor:
    """KL divergence of expert use between domains, nats, mean over gates: entry (a, b) is KL(a || b).

    Source: Shen et al., "ModuleFormer", arXiv 2306.04640, sec. 4.3, which has the divergence of loads. Those of a gate
    that is near to uniform are choices among near ties; mean probabilities show that it is.

    Args:
        gates: domain → what `GateUsage.take` gave for its text.
        what: "load" or "probability".
        smallest: share below which one counts as that much, so that an expert unused in one domain costs a finite
            amount.
    """
    shares = {
        name: [torch.tensor(gate[what], dtype=torch.float64).clamp_min(smallest) for gate in found]
        for name, found in gates.items()
    }
    shares = {name: [share / share.sum() for share in found] for name, found in shares.items()}
    kl = lambda a, b: torch.stack([(p * (p / q).log()).sum() for p, q in zip(a, b, strict=True)]).mean()  # noqa: E731
    return torch.stack([torch.stack([kl(a, b) for b in shares.values()]) for a in shares.values()])
