"""What trains after surgery, and towards what: masks that keep everything old bit for bit, and losses on routers.

For any loop that calls `compute_loss` and an optimizer without weight decay, such as transformers' Trainer:

    frozen = train_only(model, anatomy, "new-modules")
    losses = RouterLosses(model, anatomy, {"concentration": 0.001}, "new-modules")
    …  loss = loss + losses.take()  …
    frozen.check(model)

Source: Shen et al., "ModuleFormer" (2023, arXiv 2306.04640), sec. 3.4 and 3.5: new modules with the old ones frozen, a
penalty on new rows of the router, fine-tuning that concentrates the load.

Legend: N tokens, D model width, E modules of a set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import nn

from emoe.errors import UserError
from emoe.gating.losses import load_concentration, mutual_information, new_router_penalty
from emoe.surgery.modules import Anatomy, ModuleSet, Slot

Train = Literal["all", "router", "new-modules", "new-experts"]

LOSSES = {
    "concentration": "H(m): the load gathers on few modules",
    "mi": "-I(m; x): modules are used equally, each token certain of its own",
    "router": "squares of new router rows, or of the router's distance to what it was",
}
"""Losses on routers beside the task's own."""


class Rows(NamedTuple):
    """Part of a parameter: the rows of some modules along an axis."""

    parameter: nn.Parameter
    slot: Slot
    mask: torch.Tensor
    """1 for their rows, 0 elsewhere; of the parameter's number of axes, so that it multiplies it."""


def _parameters(model: nn.Module, name: str) -> nn.Parameter | None:
    """The parameter of a checkpoint's tensor; a model with a head has a prefix that one without lacks."""
    known = dict(model.named_parameters(remove_duplicate=False))
    prefix = f"{model.base_model_prefix}."
    return next((known[n] for n in (name, prefix + name, name.removeprefix(prefix)) if n in known), None)


def rows_of(model: nn.Module, found: ModuleSet, modules: range) -> list[Rows]:
    """Where these modules of a set are trained; buffers are left out."""
    rows = []
    for slot in found.slots:
        parameter = _parameters(model, slot.name)
        if parameter is not None:
            index = torch.arange(found.count * slot.rows) // slot.rows
            mask = ((index >= modules.start) & (index < modules.stop)).repeat(slot.parts)
            shape = [1] * parameter.ndim
            shape[slot.axis] = -1
            rows.append(Rows(parameter, slot, mask.view(shape).to(parameter.device, parameter.dtype)))
    return rows


def newest(found: ModuleSet) -> range:
    """The modules that the last extension added."""
    return range(found.count - found.groups[-1], found.count) if len(found.groups) > 1 else range(0)


def _digest(parameter: nn.Parameter, mask: torch.Tensor | None) -> str:
    """Hex sha256 of a parameter; where the mask is not 0, of zeros instead."""
    kept = parameter.detach() if mask is None else parameter.detach().masked_fill(mask.to(parameter.device) != 0, 0)
    return hashlib.sha256(kept.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()


@dataclass
class Frozen:
    """What must not change, as it was."""

    digests: dict[str, str]
    """sha256 of each parameter, or of its part that does not train, by name."""
    masks: dict[str, torch.Tensor]
    """Of partly trained parameters, by name: 1 where they train."""

    def check(self, model: nn.Module) -> None:
        """Raise `RuntimeError` when anything frozen has changed by a bit."""
        for name, parameter in model.named_parameters():
            if name in self.digests and _digest(parameter, self.masks.get(name)) != self.digests[name]:
                raise RuntimeError(f"{name} was to stay as it is and has changed: is there weight decay?")


def check_choice(model: nn.Module, flag: str) -> None:
    """Raise `UserError` for a converted model with all experts on: nobody asks its routers, so nothing trains them."""
    ffns = model.sparse_ffns().values() if hasattr(model, "sparse_ffns") else ()
    if ffns and all(ffn.router.all_on for ffn in ffns):
        raise UserError(f"{flag}: every token uses every expert of this model, its gates choose nothing; give --top-k")


def train_only(model: nn.Module, anatomy: Anatomy, what: Train, *, also: Iterable[nn.Parameter] = ()) -> Frozen:
    """Set what trains: everything, the gates, or the modules that the last extension added, with their gate rows
    ("new-modules") or without ("new-experts": gates that were fitted stay where they are).

    Old rows of a tensor that has new ones get no gradient: hooks on the parameter zero it. Adam without weight decay
    then leaves them as they are, bit for bit, which `Frozen.check` verifies.

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
        gates = set(anatomy.gate_parameters(model)) if what == "new-experts" else set()
        trained = [rows for found in sets for rows in rows_of(model, found, newest(found)) if newest(found)]
        trained = [rows for rows in trained if rows.parameter not in gates]
        if not trained:
            raise UserError("--train: this model has no new modules; add some with `emoe extend` first")
    else:
        for parameter in anatomy.gate_parameters(model):
            parameter.requires_grad_(True)
    masks = {id(rows.parameter): rows.mask for rows in trained}
    for rows in trained:
        rows.parameter.requires_grad_(True)
        rows.parameter.register_hook(lambda gradient, mask=rows.mask: gradient * mask.to(gradient.device))
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError("--train: the gate of this model follows the weights and cannot be trained by itself")
    for parameter in also:
        parameter.requires_grad_(True)
    named = {n: (p, masks.get(id(p))) for n, p in model.named_parameters() if not p.requires_grad or id(p) in masks}
    digests = {name: _digest(parameter, mask) for name, (parameter, mask) in named.items()}
    return Frozen(digests, {name: mask for name, (_, mask) in named.items() if mask is not None})


def trained_entries(model: nn.Module, frozen: Frozen) -> int:
    """Number of weights that train; of partly trained parameters the new rows only."""
    count = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            mask = frozen.masks.get(name)
            count += parameter.numel() if mask is None else int(mask.sum()) * (parameter.numel() // mask.numel())
    return count


class RouterLosses:
    """Gathers losses on all routers while the model runs in training; `take` gives their weighted sum.

    Args:
        factors: by name, of `LOSSES`.
        what: as for `train_only`, or "lora": with new modules the penalty is on their rows, else on the distance of all
            rows.

    Raises:
        UserError: every token uses every expert, or the penalty has no rows to act on.
    """

    def __init__(
        self, model: nn.Module, anatomy: Anatomy, factors: dict[str, float], what: Train | Literal["lora"]
    ) -> None:
        check_choice(model, "--loss")
        self.factors = factors
        self._terms: list[torch.Tensor] = []
        self.mask_N: torch.Tensor | None = None
        """1 for tokens that count; None for all."""
        if what in ("new-experts", "lora") and "router" in factors:
            raise UserError(
                f"--loss: router acts on the gates' own rows, which get no gradient with --train {what}; drop one"
            )
        self._penalty = self._router_penalty(model, anatomy, what) if "router" in factors else None
        self._remove = anatomy.watch_logits(model, self._see) if set(factors) - {"router"} else lambda: None

    def _see(self, name: str, logits_NE: torch.Tensor) -> None:
        p_NE = logits_NE.softmax(-1)
        if "concentration" in self.factors:
            self._terms.append(self.factors["concentration"] * load_concentration(p_NE, self.mask_N))
        if "mi" in self.factors:
            self._terms.append(self.factors["mi"] * mutual_information(p_NE, self.mask_N))

    def _router_penalty(self, model: nn.Module, anatomy: Anatomy, what: Train) -> Callable[[], torch.Tensor]:
        rows, anchors = [], []
        for found in anatomy.sets():
            modules = newest(found) if what == "new-modules" else range(found.count)
            for part in rows_of(model, found, modules):
                if part.parameter in set(anatomy.gate_parameters(model)):
                    rows.append(part)
                    old = torch.zeros(()) if what == "new-modules" else part.parameter
                    anchors.append((old * part.mask).detach().clone())
        if not rows:
            raise UserError("--loss: router needs gates that can be trained; this model's follow the weights")
        return lambda: new_router_penalty([part.parameter * part.mask for part in rows], anchors)

    def take(self) -> torch.Tensor | float:
        """The weighted sum since the last call."""
        terms, self._terms = self._terms, []
        if self._penalty:
            terms.append(self.factors["router"] * self._penalty())
        return torch.stack(terms).sum() if terms else 0.0

    def close(self) -> None:
        """Stop watching."""
        self._remove()
