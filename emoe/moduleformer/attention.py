"""Mixture of attention experts over shared keys and values.

Source: Shen et al., "ModuleFormer", arXiv 2306.04640, sec. 3.2; the mixture is that of Zhang et al., "Mixture of
Attention Heads", arXiv 2210.05144.

Legend: B batch, T queries, L keys, N = B * T tokens, D model width, A width of an expert, K experts chosen, G heads of
an expert, a = A // G width of a head.
"""

import torch
from torch import nn
from transformers.cache_utils import DynamicLayer

from .experts import ExpertPool, kernel_input
from .ops import stick_breaking
from .rotary import positions, rotate, softmax_attention
from .router import Routing


class ExpertAttention(nn.Module):
    """y = Σ_e g_e · W_oᵉ Att(W_qᵉ x, k, v) over the chosen experts e; keys and values are the same for all."""

    def __init__(self, config, layer_index: int):
        super().__init__()
        self.layer_index, self.heads = layer_index, config.n_head
        self.rotary, self.theta = config.attention_type == "rotary", config.rope_theta
        self.q_proj = ExpertPool(config, config.experts_of("att", layer_index), config.k_att, config.att_hidden)
        self.identity = config.shares_keys_and_values
        if not self.identity:
            self.k_proj = nn.Linear(config.n_embd, config.att_hidden)
            self.v_proj = nn.Linear(config.n_embd, config.att_hidden)

    def forward(
        self, x_BTD: torch.Tensor, key_mask_BL: torch.Tensor | None, cache, output_weights: bool
    ) -> tuple[torch.Tensor, Routing | None, torch.Tensor | None]:
        """Normalised hidden states (B, T, D) → (B, T, D), who was chosen, and the weights (B, K, G, T, L) or None.

        Args:
            key_mask_BL: bool, False for padding; L counts what is in the cache, too.
            cache: a transformers `Cache` to which keys and values are appended, or None.
        """
        B, T, _ = x_BTD.shape
        x_ND = x_BTD.flatten(0, 1)
        routing = self.q_proj.route(x_ND)
        x_ND = kernel_input(x_ND)
        q_NKA = self.q_proj.into(x_ND, routing)
        K = q_NKA.shape[1]
        q_BHTa = q_NKA.view(B, T, K, self.heads, -1).permute(0, 2, 3, 1, 4).flatten(1, 2)
        k_BGTa = self._heads(x_BTD if self.identity else self.k_proj(x_BTD), q_NKA.dtype)
        v_BGTa = k_BGTa if self.identity else self._heads(self.v_proj(x_BTD), q_NKA.dtype)
        past = 0 if cache is None else int(cache.get_seq_length(self.layer_index))
        L = past + T
        if self.rotary:
            position_BT = positions(key_mask_BL, T, L, x_BTD.device)
            q_BHTa, k_BGTa = rotate(q_BHTa, position_BT, self.theta), rotate(k_BGTa, position_BT, self.theta)
        k_BGLa, v_BGLa = self._remember(k_BGTa, v_BGTa, cache, L)
        attend = softmax_attention if self.rotary else stick_breaking
        y_BHTa, weights_BHTL = attend(q_BHTa, k_BGLa, v_BGLa, key_mask_BL, output_weights)
        y_NKA = y_BHTa.unflatten(1, (K, self.heads)).permute(0, 3, 1, 2, 4).reshape(q_NKA.shape)
        y_ND = self.q_proj.back(y_NKA, routing)
        weights = None if weights_BHTL is None else weights_BHTL.unflatten(1, (K, self.heads))
        return y_ND.view(x_BTD.shape), routing, weights

    def _heads(self, x_BTA: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """(B, T, A) → (B, G, T, a)."""
        return x_BTA.to(dtype).unflatten(2, (self.heads, -1)).transpose(1, 2)

    def _remember(self, k_BGTa: torch.Tensor, v_BGTa: torch.Tensor, cache, L: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all L positions, once the new ones are in the cache."""
        if cache is None:
            return k_BGTa, v_BGTa
        k_BGLa, v_BGLa = cache.update(k_BGTa, v_BGTa, self.layer_index)
        layer = cache.layers[self.layer_index]
        if self.identity and not self.rotary and type(layer) is DynamicLayer:
            layer.values = v_BGLa = k_BGLa  # one tensor is both: half of the memory
        return k_BGLa[:, :, :L], v_BGLa[:, :, :L]  # a static cache is longer than what it holds
