"""One layer of a ModuleFormer. Legend: B batch, T tokens, D model width, L keys."""

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import ExpertAttention
from .experts import ExpertFFN


class ModuleFormerBlock(GradientCheckpointingLayer):
    """h ← h + drop(Att(LN₁ h)), then h ← h + drop(FFN(LN₂ h)); both are mixtures of experts."""

    def __init__(self, config, layer_index: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = ExpertAttention(config, layer_index)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlpf = ExpertFFN(config, layer_index)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self, h_BTD: torch.Tensor, key_mask_BL: torch.Tensor | None, cache, output_weights: bool
    ) -> tuple[torch.Tensor | None, ...]:
        """(B, T, D) → (B, T, D), the attention weights or None, and the fields of two `Routing`, attention's first.

        One flat tuple: reentrant checkpointing brings gradients to tensors at its top level alone.
        """
        y_BTD, attention_routing, weights = self.attn(self.ln_1(h_BTD), key_mask_BL, cache, output_weights)
        h_BTD = h_BTD + self.dropout(y_BTD)
        y_ND, ffn_routing = self.mlpf(self.ln_2(h_BTD).flatten(0, 1))
        h_BTD = h_BTD + self.dropout(y_ND.view(h_BTD.shape))
        return h_BTD, weights, *(attention_routing or ()), *(ffn_routing or ())
