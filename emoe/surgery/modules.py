"""What surgery must know of a model: in each layer, sets of equal modules to be counted, watched, taken and added.

A set says where the rows of its modules lie in which tensors; taking modules out and adding some is then the same few
lines for every kind of model. A further kind is one new file with an `Anatomy` and one line in `anatomy_of`.

Legend: N tokens, D model width, F hidden width, E modules of a set, S rows of a module, K modules chosen.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import nn

from emoe.checkpoint.converted import read_converted
from emoe.checkpoint.moduleformer import read_moduleformer
from emoe.checkpoint.reader import read_json
from emoe.errors import UserError

GATE_SCALE = 0.1
"""New gate rows over old ones, in standard deviations: what they say at first hardly depends on the token."""


class Slot(NamedTuple):
    """The rows of a set's modules in one tensor."""

    name: str
    """Of the tensor in the checkpoint."""
    axis: int
    """Along which the modules lie one behind the other."""
    rows: int
    """Rows a module."""
    fresh: Literal["random", "gate", "zero", "one", "fan-in", "neuron"]
    """What a new module begins with: normal with the spread of the old rows, the same times `GATE_SCALE`, zeros, ones,
    uniform within 1 / fan-in, or the number of its first neuron."""
    parts: int = 1
    """Blocks that follow each other along the axis, each with rows of every module (2 in a fused matrix)."""


@dataclass(frozen=True)
class ModuleSet:
    """The equal modules of one layer among which a router chooses."""

    layer: int
    kind: Literal["ffn", "attention"]
    groups: tuple[int, ...]
    """Modules in the budget K, then those of each extension."""
    slots: tuple[Slot, ...]
    size: int
    """S: neurons (or head width) of a module."""
    pinned: int = 0
    """The first so many are always used and cannot go."""

    @property
    def name(self) -> str:
        """For reports."""
        return f"{self.layer}.{self.kind}"

    @property
    def count(self) -> int:
        """E."""
        return sum(self.groups)

    def groups_of(self, kept: list[int]) -> tuple[int, ...]:
        """What each group has left when ``kept`` modules stay."""
        ends = torch.tensor(self.groups).cumsum(0)
        sides = torch.bucketize(torch.tensor(kept, dtype=torch.int64), ends, right=True)
        return tuple(torch.bincount(sides, minlength=len(self.groups)).tolist())


class Seen(NamedTuple):
    """What the router of a set did with N tokens."""

    x_ND: torch.Tensor
    """Its input."""
    experts_NK: torch.Tensor
    """Chosen modules; -1 marks an unused slot."""
    logits_NE: torch.Tensor
    """fp32."""
    weights_NK: torch.Tensor
    """Of the choices: the softmax over the logits in the budget; of added modules, outside of it, sigmoid(logit)."""
    energy_NE: torch.Tensor | None
    """Squared length of what each module adds, or would add, to the residual stream; None unless asked for."""
    hidden_NF: torch.Tensor | None
    """Activations of all neurons in the modules' order; None unless asked for, and for modules without any."""

    def mask(self) -> torch.Tensor:
        """1 where a module was chosen, else 0: (N, E) fp32."""
        return self._spread(torch.ones_like(self.weights_NK))

    def weights(self) -> torch.Tensor:
        """`weights_NK` where a module was chosen, else 0: (N, E) fp32."""
        return self._spread(self.weights_NK)

    def _spread(self, value_NK: torch.Tensor) -> torch.Tensor:
        experts = self.logits_NE.shape[1]
        value_NE = self.logits_NE.new_zeros(len(self.logits_NE), experts + 1)
        return value_NE.scatter_(1, self.experts_NK % (experts + 1), value_NK)[:, :-1]


class Anatomy(Protocol):
    """One kind of model, on disk and at work."""

    folder: Path
    config: dict[str, Any]
    """config.json."""

    def sets(self) -> list[ModuleSet]:
        """All its sets, layer by layer."""

    def rebuilt(self, groups: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        """config.json when there are these sets, in their order, with these groups; the budget is clipped to what is
        left."""

    def layers(self) -> tuple[str, int]:
        """What stands before a layer's number in the names of its tensors, and the number of layers."""

    def with_layers(self, kept: list[int]) -> dict[str, Any]:
        """config.json when only these layers stay, numbered anew."""

    def write_companions(self, target: Path, kept: dict[str, list[int]]) -> None:
        """Further files of the checkpoint that speak of modules, after all but ``kept`` are gone."""

    def watch(self, model: nn.Module, see: Callable[[str, Seen], None], *, energies: bool) -> AbstractContextManager:
        """Call ``see(name of the set, what it did)`` at each forward of the loaded model."""

    def without(self, model: nn.Module, name: str, module: int) -> AbstractContextManager:
        """The loaded model as if one module were pruned."""

    def learn(self, model: nn.Module) -> None:
        """Make the gates of the loaded model trainable where they are tables."""

    def gate_parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """What trains when only gates do, after `learn`."""

    def check_gate_rows(self) -> None:
        """Raise `UserError` for a gate that has no rows of its own, so that none can be fitted."""

    def watch_gate_inputs(self, model: nn.Module, see: Callable[[str, torch.Tensor], None]) -> AbstractContextManager:
        """Call ``see(name of the set, c (N, C))`` at each forward: what the rows of its gate are multiplied with."""

    def gate_row(self, found: ModuleSet, row_C: torch.Tensor) -> dict[str, torch.Tensor]:
        """Tensor of the checkpoint → what one module's row of it is, for a gate row in the terms of
        `watch_gate_inputs`."""

    def watch_logits(self, model: nn.Module, see: Callable[[str, torch.Tensor], None]) -> Callable[[], None]:
        """While the model trains, call ``see(name of the set, gate logits (N, E))`` with a graph behind the logits;
        returns what ends it."""

    def budgets(self) -> dict[str, str]:
        """Field of config.json that holds a budget K → the kind of module that it is of."""

    def budget_tables(self) -> set[str]:
        """Tensors with a row for each budget K rather than for each module."""

    @property
    def history(self) -> list[dict[str, Any]]:
        """What happened to the checkpoint since it was made."""

    def with_history(self, config: dict[str, Any], history: list[dict[str, Any]]) -> dict[str, Any]:
        """config.json with this provenance."""


def has_modules(folder: Path, flag: str = "--model") -> bool:
    """Whether config.json, sound or damaged, speaks of experts that a gate chooses among."""
    config = read_json(folder / "config.json", flag)
    if config.get("model_type") == "moduleformer":
        return config.get("gate_type") != "all"
    return str(config.get("model_type")).startswith("emoe_") and not config.get("emoe_copies")


def anatomy_of(folder: Path, flag: str = "--model") -> Anatomy:
    """The anatomy of a checkpoint.

    Raises:
        UserError: a model without modules.
    """
    model_type = str(read_json(folder / "config.json", flag).get("model_type"))
    if model_type.startswith("emoe_"):
        from emoe.surgery.converted import Converted

        return Converted(folder, read_converted(folder, flag))
    if model_type == "moduleformer":
        from emoe.surgery.moduleformer import ModuleFormer

        return ModuleFormer(folder, read_moduleformer(folder, flag))
    raise UserError(f"{flag}: {folder} has no experts (model_type '{model_type}'); convert it first")


def take(tensor: torch.Tensor, slot: Slot, kept: list[int], count: int, size: int) -> torch.Tensor:
    """The tensor with the rows of the ``kept`` ones (ascending) of ``count`` modules of ``size`` neurons only."""
    starts = torch.arange(slot.parts)[:, None, None] * (count * slot.rows)
    index = starts + torch.tensor(kept, dtype=torch.int64)[None, :, None] * slot.rows + torch.arange(slot.rows)
    taken = tensor.index_select(slot.axis, index.flatten())
    if slot.fresh == "neuron":  # numbers of neurons, which move up
        taken = taken - (torch.tensor(kept) - torch.arange(len(kept))) * size
    return taken


def append(tensor: torch.Tensor, slot: Slot, new: int, count: int, size: int, seed: int) -> torch.Tensor:
    """The tensor with the rows of ``new`` modules behind those of the ``count`` that it has.

    Args:
        size: neurons of a module.
        seed: of what is random; the tensor's name is mixed in.
    """
    generator = torch.Generator().manual_seed(_mixed(slot.name, seed))
    blocks = []
    for part in tensor.chunk(slot.parts, dim=slot.axis):
        shape = list(part.shape)
        shape[slot.axis] = new * slot.rows
        blocks += [part, _fresh(part, slot, shape, count, size, generator)]
    return torch.cat(blocks, dim=slot.axis)


def _fresh(part, slot: Slot, shape: list[int], count: int, size: int, generator: torch.Generator) -> torch.Tensor:
    if slot.fresh == "neuron":
        return (torch.arange(shape[0]) + count) * size
    if slot.fresh in ("zero", "one"):
        return torch.full(shape, float(slot.fresh == "one"), dtype=part.dtype)
    if slot.fresh == "fan-in":
        made = (torch.rand(shape, generator=generator) * 2 - 1) / shape[-2]
    else:
        scale = part.float().std().item() * (GATE_SCALE if slot.fresh == "gate" else 1.0)
        made = torch.randn(shape, generator=generator) * scale
    return made.to(part.dtype)


def _mixed(name: str, seed: int) -> int:
    return (seed * 0x9E3779B1 + zlib.crc32(name.encode())) % (1 << 62)
