"""What trains after surgery, and towards what: masks that keep everything old bit for bit, and losses on routers.

For any loop that calls `compute_loss` and an optimizer without weight decay, such as transformers' Trainer:

    frozen = train_only(model, anatomy, "new-modules")
    losses = RouterLosses(model, anatomy, {"concentration": 0.001}, "new-modules")
    …  loss = loss + losses.take()  …
    frozen.check(model)
    frozen.merge()  # before the model is saved

Source: Shen et al., "ModuleFormer" (2023, arXiv 2306.04640), sec. 3.4 and 3.5: new modules with the old ones frozen, a
penalty on new rows of the router, fine-tuning that concentrates the load.

Legend: N tokens, D model width, E modules of a set.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from emoe.errors import UserError
from emoe.gating.losses import load_concentration, mutual_information, new_router_penalty
from emoe.surgery.joined import Part, parts_of
from emoe.surgery.modules import Anatomy, ModuleSet

Train = Literal["all", "router", "new-modules", "new-experts"]

LOSSES = {
    "concentration": "H(m): the load gathers on few modules",
    "mi": "-I(m; x): modules are used equally, each token certain of its own",
    "router": "squares of new router rows, or of the router's distance to what it was",
}
"""Losses on routers beside the task's own."""

SPLIT = re.compile(r"parametrizations\.(\w+)\.original$")
"""How torch calls a parameter that parts were split from."""


def newest(found: ModuleSet) -> range:
    """The modules that the last extension added."""
    return range(found.count - found.groups[-1], found.count) if len(found.groups) > 1 else range(0)


def _digest(parameter: torch.Tensor, part: Part | None) -> str:
    """Hex sha256 of a parameter; where the part lies, of zeros instead."""
    kept = parameter.detach()
    if part is not None:
        kept = kept.index_fill(part.axis, part.index_M.to(kept.device), 0)
    return hashlib.sha256(kept.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()


@dataclass
class Frozen:
    """What must not change, as it was; and what trains of partly frozen parameters, until `merge`."""

    digests: dict[str, str]
    """sha256 of each parameter, or of its part that does not train, by name."""
    parts: dict[str, Part]
    """Of partly trained parameters, by name."""

    def check(self, model: nn.Module) -> None:
        """Raise `RuntimeError` when anything frozen has changed by a bit."""
        for own_name, parameter in model.named_parameters():
            name = SPLIT.sub(r"\1", own_name)
            if name in self.digests and _digest(parameter, self.parts.get(name)) != self.digests[name]:
                raise RuntimeError(f"{name} was to stay as it is and has changed: is there weight decay?")

    def merge(self) -> None:
        """Put what has trained back into the parameters that it is a part of: the model has its own names again."""
        for part in self.parts.values():
            part.merge()


def check_choice(model: nn.Module, flag: str) -> None:
    """Raise `UserError` for a converted model with all experts on: nobody asks its routers, so nothing trains them."""
    ffns = model.sparse_ffns().values() if hasattr(model, "sparse_ffns") else ()
    if ffns and all(ffn.router.all_on for ffn in ffns):
        raise UserError(f"{flag}: every token uses every expert of this model, its gates choose nothing; give --top-k")


def check_new_modules(anatomy: Anatomy) -> None:
    """Raise `UserError` for a model to which nothing was added."""
    if not any(newest(found) for found in anatomy.sets()):
        raise UserError("--train: this model has no new modules; add some with `emoe extend` first")


def check_losses(factors: dict[str, float], what: Train | Literal["lora"]) -> None:
    """Raise `UserError` for a loss on routers that has nothing to act on with this ``--train``."""
    if what in ("new-experts", "lora") and "router" in factors:
        raise UserError(
            f"--loss: router acts on the gates' own rows, which get no gradient with --train {what}; drop one"
        )


def train_only(model: nn.Module, anatomy: Anatomy, what: Train, *, also: Iterable[nn.Parameter] = ()) -> Frozen:
    """Set what trains: everything, the gates, or the modules that the last extension added, with their gate rows
    ("new-modules") or without ("new-experts": gates that were fitted stay where they are).

    New rows of a tensor that has old ones are parameters of their own until `Frozen.merge`, so that gradients and
    optimizer states are no larger than what trains. `Frozen.check` verifies that all else stays, bit for bit.

    Args:
        also: parameters that train besides, such as a task's new head.

    Raises:
        UserError: there are no new modules, no gates to train, or no choice for them to make.
    """
    if what == "router":
        check_choice(model, "--train")
    if what != "new-experts":
        anatomy.learn(model)
    if what == "all":
        return Frozen({}, {})
    sets, trained = anatomy.sets(), []
    model.requires_grad_(False)
    if what in ("new-modules", "new-experts"):
        check_new_modules(anatomy)
        gates = set(anatomy.gate_parameters(model)) if what == "new-experts" else set()
        trained = [part for found in sets for part in parts_of(model, found, newest(found)) if newest(found)]
        trained = [part for part in trained if part.parameter not in gates]
    elif not anatomy.gate_parameters(model):
        raise UserError("--train: the gate of this model follows the weights and cannot be trained by itself")
    else:
        for parameter in anatomy.gate_parameters(model):
            parameter.requires_grad_(True)
    names = {parameter: name for name, parameter in model.named_parameters()}
    parts = {names[part.parameter]: part for part in trained}
    for parameter in also:
        parameter.requires_grad_(True)
    digests = {name: _digest(p, parts.get(name)) for p, name in names.items() if not p.requires_grad}
    for part in trained:
        part.split()
    return Frozen(digests, parts)


def module_shares(logits_NE: torch.Tensor, budgeted: int) -> torch.Tensor:
    """What a token gives of itself to each module, (N, E), each row a distribution: its weights over their sum.

    Those are, as in `Seen.weights_NK`, the softmax over the modules in the budget and sigmoid(logit) of added ones. One
    softmax over all would change when the logits in the budget are raised by one number, which the model does not.

    Args:
        logits_NE: gate logits.
        budgeted: modules in the budget K, the first ones.
    """
    p_NE = logits_NE[:, :budgeted].softmax(-1)
    if budgeted == logits_NE.shape[1]:
        return p_NE
    weights_NE = torch.cat([p_NE, logits_NE[:, budgeted:].sigmoid()], 1)
    return weights_NE / weights_NE.sum(1, keepdim=True)


class RouterLosses:
    """Gathers losses on all routers while the model runs in training; `take` gives their weighted sum.

    Concentration and mutual information are those of `module_shares`, old modules among them whether they train or not:
    with new modules alone in training, the gradient is that of the new ones' part in the whole layer's load.

    Args:
        factors: by name, of `LOSSES`.
        what: as for `train_only`, or "lora": with new modules the penalty is on their rows, else on the distance of all
            rows.

    Raises:
        UserError: every token uses every expert, or the gates have no rows for the penalty to act on.
    """

    def __init__(
        self, model: nn.Module, anatomy: Anatomy, factors: dict[str, float], what: Train | Literal["lora"]
    ) -> None:
        check_choice(model, "--loss")
        self.factors = factors
        self._budgeted = {found.name: found.groups[0] for found in anatomy.sets()}
        self._terms: list[torch.Tensor] = []
        self.mask_N: torch.Tensor | None = None
        """1 for tokens that count; None for all."""
        self._penalty = self._router_penalty(model, anatomy, what) if "router" in factors else None
        self._remove = anatomy.watch_logits(model, self._see) if set(factors) - {"router"} else lambda: None

    def _see(self, name: str, logits_NE: torch.Tensor) -> None:
        p_NE = module_shares(logits_NE, self._budgeted[name])
        if "concentration" in self.factors:
            self._terms.append(self.factors["concentration"] * load_concentration(p_NE, self.mask_N))
        if "mi" in self.factors:
            self._terms.append(self.factors["mi"] * mutual_information(p_NE, self.mask_N))

    def _router_penalty(self, model: nn.Module, anatomy: Anatomy, what: Train) -> Callable[[], torch.Tensor]:
        gates = anatomy.gate_parameters(model)
        if what == "new-modules":
            rows = [parameter for parameter in gates if parameter.requires_grad]
        else:
            whole = (part.parameter for found in anatomy.sets() for part in parts_of(model, found, range(found.count)))
            rows = [parameter for parameter in whole if parameter in set(gates)]
        if not rows:
            raise UserError("--loss: router needs gates that can be trained; this model's follow the weights")
        anchors = None if what == "new-modules" else [row.detach().clone() for row in rows]
        return lambda: new_router_penalty(rows, anchors)

    def take(self) -> torch.Tensor | float:
        """The weighted sum since the last call."""
        terms, self._terms = self._terms, []
        if self._penalty:
            terms.append(self.factors["router"] * self._penalty())
        return torch.stack(terms).sum() if terms else 0.0

    def close(self) -> None:
        """Stop watching."""
        self._remove()
