"""What a model's modules do on one domain, summed up block by block; the sums can be put away and taken up again.

Legend: N tokens, T tokens of a block, F neurons, E modules of a set, M examples kept of each module.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from emoe.surgery.modules import ModuleSet, Seen
from emoe.surgery.usage import Use, check_finite


@dataclass
class Examples:
    """For each module the M tokens that activate it most."""

    score_EM: torch.Tensor
    place_EM: torch.Tensor
    """Number of the token in the domain's text; -1 where there is none yet."""

    @classmethod
    def of(cls, modules: int, most: int) -> Examples:
        """None yet."""
        return cls(torch.full((modules, most), -torch.inf), torch.full((modules, most), -1, dtype=torch.int64))

    def add(self, score_NE: torch.Tensor, first: int) -> None:
        """Scores of tokens number ``first`` and on; a token already there stays before an equal one."""
        most = self.score_EM.shape[1]
        place_N = torch.arange(first, first + len(score_NE))
        score_EX = torch.cat([self.score_EM, score_NE.float().cpu().T], 1)
        place_EX = torch.cat([self.place_EM, place_N.expand(score_NE.shape[1], -1)], 1)
        order_EM = score_EX.argsort(dim=1, descending=True, stable=True)[:, :most]
        self.score_EM, self.place_EM = score_EX.gather(1, order_EM), place_EX.gather(1, order_EM)


@dataclass
class DomainUse:
    """Sums over the blocks of one domain that were seen so far."""

    sets: list[ModuleSet]
    most_examples: int
    use: dict[str, Use] = field(init=False)
    examples: dict[str, Examples] = field(init=False)
    neurons: dict[str, torch.Tensor] = field(default_factory=dict)
    """Σ h² of each neuron, (F,) fp64, by set."""
    nats: float = 0.0
    """Sum of the next-token losses."""
    scored: int = 0
    """Tokens that the losses are of."""
    blocks: int = 0
    """Blocks seen."""

    def __post_init__(self) -> None:
        self.use = {found.name: Use(found.count) for found in self.sets}
        self.examples = {found.name: Examples.of(found.count, self.most_examples) for found in self.sets}

    def add(self, name: str, seen: Seen) -> None:
        """What a set did with a batch; batches come in the text's order. `UserError` for what is no number."""
        use = self.use[name]
        check_finite(name, seen.logits_NE, seen.energy_NE)
        if self.most_examples:
            score_NE = seen.weights()
            if seen.energy_NE is not None:
                score_NE = seen.mask() * seen.energy_NE / seen.energy_NE.sum(1, keepdim=True).clamp_min(1e-30)
            self.examples[name].add(score_NE, use.tokens)
        use.add(seen)
        if seen.hidden_NF is not None:
            total_F = seen.hidden_NF.square().sum(0).double().cpu()
            self.neurons[name] = self.neurons.get(name, 0) + total_F

    def tensors(self) -> dict[str, torch.Tensor]:
        """For a state file."""
        found = {"sums": torch.tensor([self.nats, self.scored, self.blocks], dtype=torch.float64)}
        for name, use in self.use.items():
            found[f"{name}/counts"] = torch.stack([use.hard_E, use.probability_E, use.energy_E])
            found[f"{name}/tokens"] = torch.tensor([use.tokens])
            found[f"{name}/score"], found[f"{name}/place"] = self.examples[name].score_EM, self.examples[name].place_EM
        return found | {f"{name}/neurons": total_F for name, total_F in self.neurons.items()}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """The inverse of `tensors`."""
        nats, scored, blocks = tensors["sums"].tolist()
        self.nats, self.scored, self.blocks = nats, int(scored), int(blocks)
        for name, use in self.use.items():
            use.hard_E, use.probability_E, use.energy_E = tensors[f"{name}/counts"].unbind()
            use.tokens = int(tensors[f"{name}/tokens"])
            self.examples[name] = Examples(tensors[f"{name}/score"], tensors[f"{name}/place"])
            if f"{name}/neurons" in tensors:
                self.neurons[name] = tensors[f"{name}/neurons"]
