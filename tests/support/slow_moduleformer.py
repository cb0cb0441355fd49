"""ModuleFormer's equations in loops, float64: a token, an expert, a key at a time. Shares no code with the package."""

from __future__ import annotations

import math

import torch

ACTIVATIONS = {
    "gelu_new": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "mish": lambda x: x * torch.tanh(torch.log1p(torch.exp(x))),
}


class SlowModuleFormer:
    """A causal language model from a configuration and a state dict, whose tensors get gradients."""

    def __init__(self, config, state: dict[str, torch.Tensor]) -> None:
        self.c = config
        self.w = {name: value.detach().double().requires_grad_() for name, value in state.items()}

    def norm(self, x, name):
        x = x - x.mean()
        x = x / torch.sqrt((x * x).mean() + self.c.layer_norm_epsilon)
        return x * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def gate(self, x, name):
        """Logits of one token."""
        w = lambda suffix: self.w[f"{name}.gate.{suffix}"]  # noqa: E731
        if self.c.gate_type == "linear":
            return w("w_gate.0.weight") @ x
        if self.c.gate_type == "mlp":
            hidden = w("w_gate.0.weight") @ x + w("w_gate.0.bias")
            return w("w_gate.3.weight") @ (hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))))
        z = w("w_gate.weight") @ x
        cosines = [z @ c / (z.norm() * c.norm()) for c in w("expert_centroids")]
        return torch.stack(cosines) * w("temperature")[0].exp()

    def choose(self, logits, k):
        """[(expert, weight)] of one token."""
        p = logits.exp() / logits.exp().sum()
        return [(e, p[e]) for e in sorted(range(len(p)), key=lambda e: -p[e].item())[:k]]

    def attend(self, q, keys, values):
        """One query of one head over the keys up to its own, which is the last: shares of a stick."""
        left, y = 1.0, torch.zeros_like(values[0])
        for key, value in zip(reversed(keys), reversed(values), strict=True):
            share = 1 / (1 + torch.exp(-(q @ key) / math.sqrt(len(q))))
            y = y + left * share * value
            left = left * (1 - share)
        return y

    def logits(self, ids: list[int]):
        """(T, V) logits of one sequence, and the gates' logits: per gate a list over tokens."""
        c, w = self.c, self.w
        h = [w["transformer.wte.weight"][i] for i in ids]
        gates = []
        for layer in range(c.n_layer):
            at = f"transformer.h.{layer}"
            x = [self.norm(t, f"{at}.ln_1") for t in h]
            if c.att_hidden == c.n_embd and c.n_head == 1:
                keys = values = x
            else:
                keys, values = (
                    [w[f"{at}.attn.{n}.weight"] @ t + w[f"{at}.attn.{n}.bias"] for t in x] for n in ("k_proj", "v_proj")
                )
            gates.append([self.gate(t, f"{at}.attn.q_proj") for t in x])
            new = []
            for i, t in enumerate(x):
                y = 0
                for e, weight in self.choose(gates[-1][i], c.k_att):
                    q = t @ w[f"{at}.attn.q_proj.experts.weight"][e]
                    width = c.att_hidden // c.n_head
                    cut = [slice(g * width, (g + 1) * width) for g in range(c.n_head)]
                    out = [
                        self.attend(q[s], [k[s] for k in keys[: i + 1]], [v[s] for v in values[: i + 1]]) for s in cut
                    ]
                    y = y + weight * (torch.cat(out) @ w[f"{at}.attn.q_proj.output_experts.weight"][e])
                new.append(h[i] + y)
            x = [self.norm(t, f"{at}.ln_2") for t in new]
            gates.append([self.gate(t, f"{at}.mlpf") for t in x])
            h = []
            for i, t in enumerate(x):
                y = new[i]
                for e, weight in self.choose(gates[-1][i], c.k_mlp):
                    hidden = ACTIVATIONS[c.activation_function](t @ w[f"{at}.mlpf.experts.weight"][e])
                    y = y + weight * (hidden @ w[f"{at}.mlpf.output_experts.weight"][e])
                h.append(y)
        return torch.stack([w["lm_head.weight"] @ self.norm(t, "transformer.ln_f") for t in h]), gates

    def loss(self, sequences: list[list[int]]):
        """(loss, auxiliary loss) of several sequences whose every token is a label."""
        nats, gates = [], None
        for ids in sequences:
            logits, found = self.logits(ids)
            nats += [logits[i].logsumexp(0) - logits[i][ids[i + 1]] for i in range(len(ids) - 1)]
            gates = found if gates is None else [a + b for a, b in zip(gates, found, strict=True)]
        ks = [self.c.k_att, self.c.k_mlp] * self.c.n_layer
        aux = sum(self.balance(torch.stack(g), k) for g, k in zip(gates, ks, strict=True))
        return torch.stack(nats).mean() + self.c.aux_loss_weight * aux, aux

    def balance(self, logits_NE, k):
        p_NE = torch.stack([row.exp() / row.exp().sum() for row in logits_NE])
        mean_E = p_NE.mean(0)
        if self.c.aux_loss_type == "mi":
            return (mean_E * mean_E.log()).sum() - (p_NE * p_NE.log()).sum() / len(p_NE)
        counts = torch.zeros_like(mean_E)
        for row in logits_NE:
            for e, _ in self.choose(row, k):
                counts[e] += 1
        switch = len(mean_E) * (counts / counts.sum() * mean_E).sum()
        return switch + 0.1 * torch.stack([row.logsumexp(0) ** 2 for row in logits_NE]).mean()
