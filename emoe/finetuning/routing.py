"""What routers did: collected in a forward pass, for losses on gates and for the log.

Legend: N tokens, E experts, K experts chosen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from emoe.checkpoint.writer import save_tensors
from emoe.gating import losses
from emoe.modeling.routing_emoe import Router, Routing
from emoe.surgery.training import module_shares

PROBE = "probe.safetensors"


@contextlib.contextmanager
def watched(model: nn.Module) -> Iterator[list[tuple[Router, Routing]]]:
    """Yields a list that fills with the router of each converted layer and its routing, in order."""
    found: list[tuple[Router, Routing]] = []
    routers = [module for module in model.modules() if isinstance(module, Router)]
    hooks = [
        router.register_forward_hook(lambda router, _, routing: found.append((router, routing))) for router in routers
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def auxiliary_loss(
    weights: dict[str, float], routings: list[tuple[Router, Routing]], mask_BT: torch.Tensor
) -> torch.Tensor:
    """Weighted sum of losses on gates, mean over layers; padding is left out, several processes count as one batch."""
    mask_N = mask_BT.flatten().bool()
    terms = [weight * _loss(name, *found, mask_N) for found in routings for name, weight in weights.items()]
    return torch.stack(terms).sum() / len(routings)


def _loss(name: str, router: Router, routing: Routing, mask_N: torch.Tensor) -> torch.Tensor:
    if name == "z":
        return losses.z_loss(routing.logits_NE, mask_N)
    p_NE = module_shares(routing.logits_NE, router.budgeted)
    if name == "switch":
        return losses.switch(p_NE, routing.experts_NK, mask_N)
    return {"mi": losses.mutual_information, "concentration": losses.load_concentration}[name](p_NE, mask_N)


class Probe:
    """The same few texts seen by the routers at every logged step, in evaluation mode: what changes is the routing."""

    def __init__(self, batch: dict[str, torch.Tensor]) -> None:
        self.batch = batch
        self.before: list[torch.Tensor] = []

    @torch.no_grad()
    def __call__(self, model: nn.Module, layers: list[int]) -> dict[str, dict[str, Any]]:
        """By layer: entropy of the load as a share of its maximum, the largest expert's share of the load, each
        expert's frequency, and the share of a token's experts that it had at the last logged step too (None at first).
        """
        training = model.training
        model.eval()
        device = next(model.parameters()).device
        inputs = {name: value.to(device) for name, value in self.batch.items() if name != "labels"}
        with watched(model) as routings:
            model(**inputs)
        model.train(training)
        real_N = inputs["attention_mask"].flatten().bool()
        chosen = [_chosen(routing)[real_N] for _, routing in routings]
        found = {}
        for number, (layer, chosen_NE) in enumerate(zip(layers, chosen, strict=False)):
            load_E = chosen_NE.float().mean(0)
            share_E = load_E / load_E.sum()
            entropy = -(share_E * share_E.clamp_min(1e-30).log()).sum() / torch.tensor(float(len(share_E))).log()
            overlap = None
            if self.before:
                both_N = (chosen_NE & self.before[number]).sum(1)
                overlap = round((both_N / chosen_NE.sum(1)).mean().item(), 4)
            found[str(layer)] = {
                "entropy": round(entropy.item(), 4),
                "max_share": round(share_E.max().item(), 5),
                "overlap": overlap,
                "frequencies": [round(f, 4) for f in load_E.tolist()],
            }
        self.before = chosen
        return found

    def save(self, folder: Path) -> None:
        """Keep what was chosen at the last logged step with the state that a run may go on from."""
        save_tensors(folder / PROBE, {str(number): chosen_NE for number, chosen_NE in enumerate(self.before)})

    def load(self, folder: Path) -> None:
        """Go on from there."""
        if (folder / PROBE).is_file():
            found = load_file(folder / PROBE)
            self.before = [found[str(number)] for number in range(len(found))]


def _chosen(routing: Routing) -> torch.Tensor:
    """(N, E) bool from the experts' numbers, of which -1 marks an unused slot."""
    num_tokens, num_experts = routing.logits_NE.shape
    slots_NK = routing.experts_NK + 1
    return torch.zeros(num_tokens, num_experts + 1, dtype=torch.bool).scatter(1, slots_NK.cpu(), True)[:, 1:]
