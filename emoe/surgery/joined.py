"""Some modules' rows of a tensor as a parameter of their own, so that gradients and optimizer states are of their size.

Legend: M rows that train.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from emoe.checkpoint.stored import spellings
from emoe.surgery.modules import ModuleSet, Slot


class Part:
    """The rows of some modules of a set in a parameter."""

    def __init__(self, owner: nn.Module, name: str, slot: Slot, index_M: torch.Tensor) -> None:
        self.owner, self.name, self.axis, self.index_M = owner, name, slot.axis, index_M

    @property
    def parameter(self) -> nn.Parameter:
        """The whole of it."""
        return getattr(self.owner, self.name)

    def split(self) -> None:
        """From now on the rows are a parameter, ``parametrizations.NAME.0.rows``, and the rest is frozen."""
        self.parameter.requires_grad_(False)
        parametrize.register_parametrization(self.owner, self.name, _Joined(self.parameter, self.axis, self.index_M))

    def merge(self) -> None:
        """Undo `split`; the rows keep what they have learnt."""
        if parametrize.is_parametrized(self.owner, self.name):
            parametrize.remove_parametrizations(self.owner, self.name, leave_parametrized=True)


def parts_of(model: nn.Module, found: ModuleSet, modules: range) -> list[Part]:
    """Where these modules of a set are trained; buffers are left out."""
    parts = []
    for slot in found.slots:
        name = _name_of(model, slot.name)
        if name is not None:
            owner, _, attribute = name.rpartition(".")
            module_X = (torch.arange(found.count * slot.rows) // slot.rows).repeat(slot.parts)
            index_M = ((module_X >= modules.start) & (module_X < modules.stop)).nonzero()[:, 0]
            parts.append(Part(model.get_submodule(owner), attribute, slot, index_M))
    return parts


def _name_of(model: nn.Module, name: str) -> str | None:
    """The parameter of a checkpoint's tensor; a model with a head has a prefix that one without lacks."""
    known = dict(model.named_parameters(remove_duplicate=False))
    return next((n for n in spellings(model, name) if n in known), None)


class _Joined(nn.Module):
    """A parametrisation: the frozen tensor with ``rows`` in its places. Nothing but the rows is copied."""

    def __init__(self, whole: torch.Tensor, axis: int, index_M: torch.Tensor) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer("index_M", index_M.to(whole.device), persistent=False)
        self.rows = nn.Parameter(whole.detach().index_select(axis, self.index_M))

    def forward(self, whole: torch.Tensor) -> torch.Tensor:
        return _Join.apply(self.rows, whole, self.axis, self.index_M)


class _Join(torch.autograd.Function):
    """Writes the rows into the tensor, whose storage the result shares; gives their part of its gradient back."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, whole: torch.Tensor, axis: int, index_M: torch.Tensor) -> torch.Tensor:
        ctx.axis = axis
        ctx.save_for_backward(index_M)
        # In every call, for no counter tells of a fused optimizer's step; and past the tensor's own counter, which
        # would make backward refuse a tensor that was used twice, though the same rows were written.
        whole.data.index_copy_(axis, index_M, rows)
        return whole.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (index_M,) = ctx.saved_tensors
        return gradient.index_select(ctx.axis, index_M), None, None, None
