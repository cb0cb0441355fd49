"""How many parameters a model has, and how many of them a token uses."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from .experts import ExpertPool


class Parameters(NamedTuple):
    """Counts; what is tied counts once."""

    total: int
    active: int
    """All but the experts that a token does not use."""
    embedding: int
    """Those of embedding and head, which are in both."""


def count_parameters(model: nn.Module) -> Parameters:
    """Counts of a transformers model, on any device, "meta" too."""
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = 0
    for pool in model.modules():
        if isinstance(pool, ExpertPool):
            share = pool.top_k / pool.num_experts
            idle += round((1 - share) * (pool.experts.weight.numel() + pool.output_experts.weight.numel()))
    tables = {id(m.weight): m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m}
    return Parameters(total, total - idle, sum(weight.numel() for weight in tables.values()))


def parameters_of(config) -> Parameters:
    """Counts of the causal language model of a configuration; nothing is allocated."""
    import transformers

    with torch.device("meta"):
        return count_parameters(transformers.AutoModelForCausalLM.from_config(config))
