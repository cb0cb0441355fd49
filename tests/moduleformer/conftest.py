"""A tiny ModuleFormer of any options."""

from __future__ import annotations

import pytest
import torch

import emoe

SIZES = {
    "vocab_size": 29,
    "n_embd": 12,
    "n_layer": 2,
    "n_head": 2,
    "att_hidden": 8,
    "ffd_hidden": 10,
    "gating_size": 6,
    "n_att_experts": 4,
    "k_att": 2,
    "n_mlp_experts": 5,
    "k_mlp": 2,
    "block_size": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "aux_loss_weight": 0.1,
    "initializer_range": 0.4,
}


@pytest.fixture
def tiny():
    """``tiny(seed=0, **options)``: a causal language model whose gates tell tokens apart."""

    def make(seed: int = 0, kind=None, **options):
        torch.manual_seed(seed)
        model = (kind or emoe.ModuleFormerForCausalLM)(emoe.ModuleFormerConfig(**(SIZES | options))).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "experts.weight" in name:  # as drawn they are so small that attention hardly looks
                    parameter.mul_(4)
                elif name.endswith("bias") or "ln_" in name:
                    parameter.add_(torch.randn(parameter.shape) * 0.2)
                elif name.endswith("temperature"):
                    parameter.fill_(1.5)
        return model

    return make


@pytest.fixture
def ids():
    """(2, 7) tokens, none of them special."""
    return torch.randint(3, 29, (2, 7), generator=torch.Generator().manual_seed(5))
