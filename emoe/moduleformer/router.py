"""Gates that choose K of E experts for a token.

Source: Shen et al., "ModuleFormer", arXiv 2306.04640, sec. 3.1.

Legend: N tokens, D model width, E experts, K experts chosen per token, C width inside the gate.
"""

from typing import NamedTuple

import torch
from torch import nn


class Routing(NamedTuple):
    """The experts chosen for N tokens."""

    experts_NK: torch.Tensor
    """int64, distinct in a row; by falling probability, drawn ones last."""
    weights_NK: torch.Tensor
    """Probabilities of the chosen experts, fp32, not renormalised."""
    logits_NE: torch.Tensor
    """Raw gate logits, fp32."""

    def probabilities(self) -> torch.Tensor:
        """Softmax over all experts, (N, E), fp32."""
        return self.logits_NE.softmax(-1)


class Gate(nn.Module):
    """Chooses experts by a softmax over all of them, in fp32, whose probabilities are also the experts' weights.

    - mlp: W2 · dropout(gelu(W1 x + b1)), W2 without bias,
    - linear: W x,
    - gmm: cos(W x, c_e) · exp(τ), with a centroid c_e an expert and one τ, at first 0.

    With ``config.sample_topk`` = s, in training: the top K − s, then s drawn without replacement from the others by
    their probability.
    """

    def __init__(self, config, num_experts: int, top_k: int):
        super().__init__()
        self.kind, self.num_experts, self.top_k = config.gate_type, num_experts, top_k
        self.sampled = config.sample_topk
        D, C = config.n_embd, config.gating_size
        if self.kind == "mlp":
            self.w_gate = nn.Sequential(
                nn.Linear(D, C), nn.GELU(), nn.Dropout(config.moe_pdrop), nn.Linear(C, num_experts, bias=False)
            )
        elif self.kind == "linear":
            self.w_gate = nn.Sequential(nn.Linear(D, num_experts, bias=False))
        else:
            self.w_gate = nn.Linear(D, C, bias=False)
            self.expert_centroids = nn.Parameter(torch.empty(num_experts, C))
            self.temperature = nn.Parameter(torch.empty(1))

    def logits(self, x_ND: torch.Tensor) -> torch.Tensor:
        """Gate logits (N, E), fp32."""
        if self.kind != "gmm":
            return self.w_gate(x_ND).float()
        normalize = nn.functional.normalize
        cosines_NE = normalize(self.w_gate(x_ND).float(), dim=-1) @ normalize(self.expert_centroids.float(), dim=-1).T
        return cosines_NE.float() * self.temperature.float().exp()

    def forward(self, x_ND: torch.Tensor) -> Routing:
        """Tokens (N, D) → `Routing`."""
        logits_NE = self.logits(x_ND)
        p_NE = logits_NE.softmax(-1)
        if self.training and self.sampled:
            with torch.no_grad():
                top_NK = p_NE.topk(self.top_k - self.sampled, dim=-1).indices
                # A little for each, so that rows whose other probabilities underflowed can still be drawn from.
                others_NE = (p_NE + 1e-6).scatter(1, top_NK, 0.0)
                experts_NK = torch.cat([top_NK, torch.multinomial(others_NE, self.sampled)], 1)
            return Routing(experts_NK, p_NE.gather(1, experts_NK), logits_NE)
        weights_NK, experts_NK = p_NE.topk(self.top_k, dim=-1)
        return Routing(experts_NK, weights_NK, logits_NE)
