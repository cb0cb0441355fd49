"""LoRA (Hu et al. 2021, arXiv 2106.09685) on all linear layers: by peft, or by our own matrices where experts lie in
stacks, which are no layers that peft knows and which kernels read without calling them.

Legend: I width in, O width out, R rank; a stack has an axis of experts before them.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from emoe.moduleformer.experts import StackedLinear

SCALE = 2.0
"""Factor of the product: lora_alpha / r."""


class LowRank(nn.Module):
    """W + s A B, with A (…, I, R) random as peft's and B (…, R, O) of zeros; W is (…, I, O), or (O, I) of a linear."""

    def __init__(self, weight: torch.Tensor, rank: int, transposed: bool) -> None:
        super().__init__()
        *stack, width_in, width_out = weight.mT.shape if transposed else weight.shape
        bound = 1 / math.sqrt(width_in)
        self.transposed = transposed
        self.into = nn.Parameter(weight.new_empty(*stack, width_in, rank).uniform_(-bound, bound))
        self.back = nn.Parameter(weight.new_zeros(*stack, rank, width_out))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        change = SCALE * (self.into @ self.back)
        return weight + (change.mT if self.transposed else change)


def targets(model: nn.Module) -> list[nn.Module]:
    """All linear layers but the head, and all stacks of experts."""
    head = model.get_output_embeddings()
    return [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D | StackedLinear) and m is not head]


def entries_of_rank_one(model: nn.Module) -> int:
    """Entries of the matrices that `with_lora` adds, of rank 1; R times as many are of rank R."""
    shapes = [module.weight.shape for module in targets(model)]
    return sum(math.prod(stack) * (one + other) for *stack, one, other in shapes)


def with_lora(model: nn.Module, rank: int) -> nn.Module:
    """The model with LoRA's matrices, which alone train."""
    if not any(isinstance(module, StackedLinear) for module in targets(model)):
        from peft import LoraConfig, get_peft_model

        return get_peft_model(model, LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules="all-linear"))
    model.requires_grad_(False)
    for module in targets(model):
        matrices = LowRank(module.weight.detach(), rank, transposed=isinstance(module, nn.Linear))
        parametrize.register_parametrization(module, "weight", matrices)
    return model


def merged(model: nn.Module) -> nn.Module:
    """The model that `with_lora` was given, the products added to its weights."""
    if hasattr(model, "merge_and_unload"):
        return model.merge_and_unload()
    for module in targets(model):
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    return model
