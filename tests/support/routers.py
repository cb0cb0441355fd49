"""A sparse FFN outside of any model.

Legend: D model width, F hidden width.
"""

from __future__ import annotations

import torch

from emoe.modeling.auto import emoe_config_class
from emoe.modeling.ffn_emoe import make_sparse

D, F = 16, 24


def sparse_mlp(gate: str, experts: int, top_k: int, seed: int = 0, routing: str = "top-k", shared: int = 0):
    """A random Llama FFN with a router of this kind, buffers filled at random."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    layout = {"layers": "layers", "ffn": "", "host": "module", "gate": "gate_proj", "up": "up_proj"}
    layout |= {"down": "down_proj", "fused": False, "dropout": None, "activation_key": "hidden_act"}
    config = emoe_config_class("llama")(
        hidden_size=D,
        intermediate_size=F,
        num_attention_heads=2,
        num_experts=experts,
        num_experts_per_tok=top_k,
        emoe_gate=gate,
        emoe_routing=routing,
        emoe_shared_experts=shared,
        emoe_ffn=layout,
    )
    torch.manual_seed(seed)
    ffn = make_sparse(LlamaMLP(config).eval(), config)
    for name, buffer in ffn.router.named_buffers():
        if name == "neuron":
            buffer.copy_(torch.arange(experts) * (F // experts))
        elif name == "bounds":
            pass
        else:
            buffer.copy_(torch.randn(buffer.shape) if name == "weight" else torch.rand(buffer.shape) + 0.5)
    return ffn
