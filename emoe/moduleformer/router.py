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
    """int64, distinct in a row; by falling probability, drawn ones last, then added ones; -1 marks an unused slot."""
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

    Experts that were added later (groups behind the first) have no part in that softmax, so that the others are chosen
    and weighted as if they were not there: each is used besides the K by the tokens whose logit for it is above 0, with
    the weight sigmoid(logit). After pruning a layer may have fewer than K experts, and uses them all.
    """

    def __init__(self, config, groups: list[int], top_k: int):
        super().__init__()
        num_experts = sum(groups)
        self.kind, self.num_experts, self.under_softmax = config.gate_type, num_experts, groups[0]
        self.top_k = min(top_k, groups[0])
        self.sampled = min(config.sample_topk, self.top_k)
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

    def inputs(self, x_ND: torch.Tensor) -> torch.Tensor:
        """What an expert's row is multiplied with, (N, C); for gmm of length 1."""
        if self.kind == "gmm":
            return nn.functional.normalize(self.w_gate(x_ND).float(), dim=-1)
        return self.w_gate[:-1](x_ND)

    def logits(self, x_ND: torch.Tensor) -> torch.Tensor:
        """Gate logits (N, E), fp32."""
        if self.kind != "gmm":
            return self.w_gate(x_ND).float()
        cosines_NE = self.inputs(x_ND) @ nn.functional.normalize(self.expert_centroids.float(), dim=-1).T
        return cosines_NE.float() * self.temperature.float().exp()

    def forward(self, x_ND: torch.Tensor) -> Routing:
        """Tokens (N, D) → `Routing`."""
        return self.route(self.logits(x_ND))

    def route(self, logits_NE: torch.Tensor) -> Routing:
        """What follows from gate logits (N, E)."""
        if self.under_softmax == self.num_experts:
            return Routing(*self._choose(logits_NE), logits_NE)
        experts_NK, weights_NK = self._choose(logits_NE[:, : self.under_softmax])
        added_NA = logits_NE[:, self.under_softmax :]
        places_A = torch.arange(self.under_softmax, self.num_experts, device=logits_NE.device)
        experts_NK = torch.cat([experts_NK, torch.where(added_NA > 0, places_A, -1)], 1)
        return Routing(experts_NK, torch.cat([weights_NK, added_NA.sigmoid()], 1), logits_NE)

    def _choose(self, logits_NE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K experts of each token and their weights, both (N, K)."""
        p_NE = logits_NE.softmax(-1)
        if self.training and self.sampled:
            with torch.no_grad():
                top_NK = logits_NE.topk(self.top_k - self.sampled, dim=-1).indices
                # The s largest of logits plus Gumbel noise are s draws without replacement; nothing underflows.
                noise_NE = -torch.empty_like(logits_NE).exponential_().log()
                drawn_NK = (logits_NE + noise_NE).scatter(1, top_NK, -torch.inf).topk(self.sampled, dim=-1).indices
                experts_NK = torch.cat([top_NK, drawn_NK], 1)
            return experts_NK, p_NE.gather(1, experts_NK)
        weights_NK, experts_NK = p_NE.topk(self.top_k, dim=-1)
        return experts_NK, weights_NK
