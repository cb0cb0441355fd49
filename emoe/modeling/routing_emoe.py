"""Which experts a token gets: gates, and the rules that choose by their logits.

Legend: N tokens, D model width, F hidden width, E experts, S = F // E neurons per expert, K experts chosen.

Copied beside each converted checkpoint, as `modeling_emoe` says; needs nothing but torch.
"""

from typing import NamedTuple

import torch
from torch import nn


class Routing(NamedTuple):
    """The experts chosen for N tokens."""

    experts_NK: torch.Tensor
    """int64, distinct in a row; -1 marks an unused slot."""
    logits_NE: torch.Tensor
    """Raw gate logits in fp32."""
    weights_NK: torch.Tensor | None = None
    """Weights of the chosen experts; None means 1 for each, so that all experts together are the dense FFN."""


WEIGHING = ("cosine", "softmax")
"""Gates that are trained and weigh the experts that they choose; the others give each the weight 1."""

RULES = ("top-k", "threshold", "energy-share", "bottom-k", "random")
"""Values of ``config.emoe_routing``."""


class Level(NamedTuple):
    """What a budget of K experts a token means in one layer."""

    least: int
    """Experts that every token gets; exactly these under the rule "top-k"."""
    most: int
    """Experts that no token exceeds."""
    threshold: float
    """Rule "threshold": a gate logit beyond it brings a further expert. Rule "energy-share": the share wanted."""


class CosineGate(nn.Module):
    """logit_e = cos(P x, c_e) / temperature, with P (A, D) and c_e (A,) trained.

    Source: Qiu et al. 2024, sec. 3.3 (EMoE-learn) and Li et al., "Sparse Mixture-of-Experts are Domain Generalizable
    Learners" (ICLR 2023, arXiv 2206.04046), eq. 6 (GMoE): A = 256, temperature 0.5, which is not trained here.
    """

    width, temperature = 256, 0.5

    def __init__(self, width: int, num_experts: int):
        super().__init__()
        self.projection = nn.Linear(width, self.width, bias=False)
        self.centroids = nn.Linear(self.width, num_experts, bias=False)

    def inputs(self, x_ND: torch.Tensor) -> torch.Tensor:
        """What centroids are compared with, (N, A), of length 1."""
        return nn.functional.normalize(self.projection(x_ND.to(self.projection.weight.dtype)).float(), dim=-1)

    def forward(self, x_ND: torch.Tensor) -> torch.Tensor:
        return self.inputs(x_ND) @ nn.functional.normalize(self.centroids.weight.float(), dim=-1).T / self.temperature


class Router(nn.Module):
    """Chooses experts by their gate logits. The cosine gate is trained, others if `learn` is called; fp32.

    Gates, with key_j the row of neuron j in the FFN's input matrix:

    - average-key (EMoE, sec. 3.2): logit_e = x · mean of the keys of expert e, without input bias. From the weights,
    - representative (after CMoE, arXiv 2502.04416): logit_e = scale_e · |activation of one neuron of e|, the one that
      told the expert's energy best in calibration. Buffers: ``neuron`` (E,), ``scale`` (E,).
    - discriminant: logit_e = x · weight_e + bias_e, a closed-form linear discriminant. Buffers: ``weight`` (E, D),
      ``bias`` (E,).
    - cosine: a trained `CosineGate`, module ``cosine``. The chosen experts are weighted by the softmax of their logits,
      times K, so that the weights are 1 on average and the FFN keeps its scale; copies of a whole FFN without that
      factor. The paper's code has no factor: K experts of S neurons then start as one K-th of the FFN.
    - softmax: logit_e = x · weight_e, trained by recovery, and the same weights: the router of Mixtral (arXiv
      2401.04088, sec. 2.1) but for the factor K. Buffer: ``weight`` (E, D).

    Rules (``config.emoe_routing``), with K the budget (``top_k``):

    - top-k: the K experts of largest logit,
    - threshold: the `Level.least` experts of largest logit and, up to `Level.most`, all with a logit past a threshold,
    - bottom-k, random: the K of least logit, or K that a hash of the token's logits picks. Ablations of the paper,
      sec. 5.2; random draws nothing from any generator, so that a run differs from its control in nothing else,
    - energy-share (after D2DMoE, arXiv 2310.04361, sec. 3.3): as many as reach a share of the energy that the gate
      predicts, softmax(logits) when the logits are logarithms of energies.

    What a token gets depends on that token alone, never on its batch. The last two rules, and budgets that differ by
    layer, read the buffers ``bounds`` (E, 2) and ``threshold`` (E,): row K - 1 holds this layer's `Level` when a token
    may use K experts on average over tokens and layers. ``config.emoe_shared_experts`` first experts are always chosen.

    After surgery (``config.emoe_groups``) a layer may have fewer experts than the budget's scale E goes to: it then
    uses what it has. Experts that were added come on top of the budget: each is used by the tokens whose logit for it
    is above 0, so that those there before are chosen as if nothing had been added.
    """

    def __init__(self, config, width: int, group: list[int] | None = None):
        super().__init__()
        self.gate, self.most, self.top_k = config.emoe_gate, config.num_experts, config.num_experts_per_tok
        self.rule, self.shared, self.width = config.emoe_routing, config.emoe_shared_experts, width
        group = group or [config.num_experts]
        self.budgeted, self.num_experts = group[0], sum(group)
        self._derived: tuple | None = None
        self._level: tuple | None = None
        self.copies = config.emoe_copies
        if self.rule not in RULES:
            raise ValueError(f"unknown emoe_routing {self.rule!r}; known: {', '.join(RULES)}")
        if self.gate == "representative":
            self.register_buffer("neuron", torch.zeros(self.num_experts, dtype=torch.int64))
            self.register_buffer("scale", torch.zeros(self.num_experts, dtype=torch.float32))
        elif self.gate in ("discriminant", "softmax"):
            self.register_buffer("weight", torch.zeros(self.num_experts, width, dtype=torch.float32))
            if self.gate == "discriminant":
                self.register_buffer("bias", torch.zeros(self.num_experts, dtype=torch.float32))
        elif self.gate == "cosine":
            self.cosine = CosineGate(width, self.num_experts)
        elif self.gate != "average-key":
            raise ValueError(
                f"unknown emoe_gate {self.gate!r}; known: average-key, representative, discriminant, cosine, softmax"
            )
        if self.rule in ("threshold", "energy-share") or config.emoe_allocation != "uniform":
            every_E2 = torch.arange(1, self.most + 1)[:, None].repeat(1, 2)
            self.register_buffer("bounds", every_E2)
            self.register_buffer("threshold", torch.zeros(self.most, dtype=torch.float32))

    def _apply(self, fn, recurse=True):
        # model.bfloat16() and the like must not touch the gate: routing in bf16 picks other experts.
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer.is_floating_point()}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = self._buffers[name]
            if after.dtype != torch.float32:
                self._buffers[name] = before.to(device=after.device, dtype=torch.float32)
        return self

    @property
    def weighs(self) -> bool:
        """The chosen experts have weights of their own."""
        return self.gate in WEIGHING

    @property
    def all_on(self) -> bool:
        """Every token gets every expert of the FFN: nothing to choose. Copies of an FFN never make one."""
        return self.top_k == self.most and self.budgeted == self.num_experts and not self.copies

    def _from_weights(self, ffn) -> tuple[torch.Tensor, ...]:
        """Rows that the gate takes from the FFN's weights, fp32; kept in evaluation until a weight changes."""
        tables = ffn.weight_views()
        state = tuple(_fingerprint(t) for t in (tables.keys_FD, tables.up_FD))
        if self.training or self._derived is None or self._derived[0] != state:
            if self.gate == "average-key":
                keys_ESD = tables.keys_FD.detach().unflatten(0, (self.num_experts, -1))
                rows = (keys_ESD.mean(1, dtype=torch.float32),)
            else:
                pick = lambda t: None if t is None else t.detach()[self.neuron.long()].float()  # noqa: E731
                rows = (pick(tables.keys_FD), pick(tables.key_bias_F), pick(tables.up_FD), pick(tables.up_bias_F))
            self._derived = (state, rows)
        return self._derived[1]

    def logits(self, x_ND: torch.Tensor, ffn) -> torch.Tensor:
        """Gate logits (N, E), fp32."""
        if self.gate == "cosine":
            return self.cosine(x_ND)
        if self.gate in ("discriminant", "softmax"):
            bias_E = self.bias if self.gate == "discriminant" else None
            return torch.nn.functional.linear(x_ND.float(), self.weight, bias_E)
        if not ffn.plain:  # an adapter or quantiser holds the weights: ask the modules, which compute in their own type
            return self._logits_from_modules(x_ND, ffn)
        x_ND = x_ND.float()
        if self.gate == "average-key":
            return x_ND @ self._from_weights(ffn)[0].T
        keys_ED, key_bias_E, up_ED, up_bias_E = self._from_weights(ffn)
        h_NE = ffn.act(torch.nn.functional.linear(x_ND, keys_ED, key_bias_E))
        if ffn.gated:
            h_NE = h_NE * torch.nn.functional.linear(x_ND, up_ED, up_bias_E)
        return h_NE.abs() * self.scale

    def _logits_from_modules(self, x_ND: torch.Tensor, ffn) -> torch.Tensor:
        if self.gate == "average-key":
            zero_1D = x_ND.new_zeros(1, x_ND.shape[1])  # its pre-activation is the bias, which the gate leaves out
            keyed_NF = ffn.pre_activation(torch.cat([x_ND, zero_1D])).float()
            return (keyed_NF[:-1] - keyed_NF[-1:]).unflatten(1, (self.num_experts, -1)).mean(-1)
        h_NF = ffn.hidden(x_ND).float()
        return h_NF[:, self.neuron.long()].abs() * self.scale

    def level(self) -> Level:
        """What the present budget means here; read from the tables once, since reading waits for a GPU."""
        if "bounds" not in self._buffers or self.top_k == self.most:
            return Level(*[min(self.budgeted, max(self.top_k, self.shared))] * 2, 0.0)
        tables = (self.bounds, self.threshold)
        state = (self.top_k, *(t.data_ptr() for t in tables), *(0 if t.is_inference() else t._version for t in tables))
        if self._level is None or self._level[0] != state:
            row = self.top_k - 1
            least, most = self.bounds[row].tolist()  # a model loaded in another type may have made floats of them
            least, most = min(int(least), self.budgeted), min(int(most), self.budgeted)
            self._level = (state, Level(least, most, self.threshold[row].item()))
        return self._level[1]

    def choose(self, logits_NE: torch.Tensor) -> torch.Tensor:
        """Experts (N, K) of each token from gate logits (N, E); -1 fills the rows of tokens that get fewer."""
        if self.budgeted == self.num_experts:
            return self._choose_in_budget(logits_NE)
        added_A = torch.arange(self.budgeted, self.num_experts, device=logits_NE.device)
        added_NA = torch.where(logits_NE[:, self.budgeted :] > 0, added_A, -1)
        return torch.cat([self._choose_in_budget(logits_NE[:, : self.budgeted]), added_NA], 1)

    def _choose_in_budget(self, logits_NE: torch.Tensor) -> torch.Tensor:
        level = self.level()
        if self.rule == "bottom-k":
            logits_NE = -logits_NE
        elif self.rule == "random":
            logits_NE = _scrambled(logits_NE)
        if self.shared:
            logits_NE = torch.cat(
                [torch.full_like(logits_NE[:, : self.shared], torch.inf), logits_NE[:, self.shared :]], 1
            )
        if self.rule in ("top-k", "bottom-k", "random"):
            return logits_NE.topk(level.least, dim=-1, sorted=False).indices
        best_NK, experts_NK = logits_NE.topk(level.most, dim=-1)
        if self.rule == "threshold":
            wanted_NK = best_NK > level.threshold
        else:
            share_NE = logits_NE[:, self.shared :].softmax(-1)
            share_NK = nn.functional.pad(share_NE, (self.shared, 0)).gather(1, experts_NK)
            wanted_NK = share_NK.cumsum(-1) - share_NK < level.threshold
        wanted_NK[:, : level.least] = True
        experts_NK = torch.where(wanted_NK, experts_NK, -1)
        if experts_NK.device.type == "cpu" and not torch.compiler.is_compiling():  # a GPU would have to be waited for
            experts_NK = experts_NK[:, : int(wanted_NK.sum(-1).amax()) if len(wanted_NK) else 1]
        return experts_NK

    def learn(self, wanted: bool = True) -> None:
        """Make the gate's table trainable, or a buffer again; its name in checkpoints stays the same.

        Raises:
            ValueError: the gate is derived from the weights and has no table.
        """
        tables = [name for name in ("weight", "bias", "scale") if name in {**self._buffers, **self._parameters}]
        if wanted and not tables:
            raise ValueError(f"the {self.gate} gate has no table to learn; it follows the weights")
        for name in tables:
            if wanted and name in self._buffers:
                self.register_parameter(name, nn.Parameter(self._buffers.pop(name)))
            elif not wanted and name in self._parameters:
                self.register_buffer(name, self._parameters.pop(name).detach())

    def weights_of(self, logits_NE: torch.Tensor, experts_NK: torch.Tensor) -> torch.Tensor:
        """Weights (N, K) of gates that weigh: the softmax over experts in the budget; sigmoid(logit) of added ones."""
        chosen_NK = logits_NE.gather(1, experts_NK.clamp_min(0)).masked_fill(experts_NK < 0, -torch.inf)
        added = self.num_experts - self.budgeted
        in_budget_NK = chosen_NK[:, : chosen_NK.shape[1] - added]
        weights_NK = in_budget_NK.softmax(-1)
        if not self.copies:
            weights_NK = weights_NK * in_budget_NK.isfinite().sum(-1, keepdim=True)
        return torch.cat([weights_NK, chosen_NK[:, -added:].sigmoid()], 1) if added else weights_NK

    def forward(self, x_ND: torch.Tensor, ffn) -> Routing:
        """Tokens (N, D) → `Routing`. Chosen by raw logits: a softmax underflows into ties."""
        learning = torch.is_grad_enabled() and (self.weighs or any(p.requires_grad for p in self.parameters()))
        with torch.autocast(x_ND.device.type, enabled=False), torch.set_grad_enabled(learning):
            logits_NE = self.logits(x_ND, ffn)
            with torch.no_grad():
                experts_NK = self.choose(logits_NE)
            if self.weighs:
                return Routing(experts_NK, logits_NE, self.weights_of(logits_NE, experts_NK))
            if not learning:
                return Routing(experts_NK, logits_NE)
            # Weights of exactly 1 through which gradients reach the gate: an expert whose output lowers the loss gets
            # a larger logit (straight-through, Bengio et al. 2013, arXiv 1308.3432). The unit is the distance to the
            # least of the chosen; for an added expert, to the 0 that it must exceed.
            chosen_NK = logits_NE.gather(1, experts_NK.clamp_min(0))
            added_NK = experts_NK >= self.budgeted
            least_N1 = chosen_NK.detach().masked_fill((experts_NK < 0) | added_NK, torch.inf).amin(1, keepdim=True)
            p_NK = (chosen_NK - torch.where(added_NK, 0.0, least_N1)).sigmoid()
            return Routing(experts_NK, logits_NE, 1 + p_NK - p_NK.detach())


def _scrambled(logits_NE: torch.Tensor) -> torch.Tensor:
    """Numbers without order, from what another batch's rounding leaves alone: the largest and the least logit's places,
    and of each logit sign, exponent and 4 bits; a column's own number keeps equal logits apart."""
    bits_NE = (logits_NE.float().contiguous().view(torch.int32).long() & 0xFFFFFFFF) + (1 << 18) >> 19
    bits_NE = bits_NE + 0x9E3779B9 * torch.arange(1, logits_NE.shape[1] + 1, device=logits_NE.device)
    places_N = 0x85EBCA6B * logits_NE.argmax(1) + 0xC2B2AE35 * logits_NE.argmin(1)
    bits_NE = bits_NE + places_N[:, None] & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):  # the mixing steps of Wellons' lowbias32
        bits_NE = ((bits_NE ^ ((bits_NE & 0xFFFFFFFF) >> shift)) * factor) & 0xFFFFFFFF
    return (bits_NE ^ (bits_NE >> 16)).float()


def _fingerprint(weight: torch.Tensor) -> tuple:
    """Changes whenever a weight does: by its version counter or, when it was written to behind its back as in
    ``weight.data += delta``, by 64 of its values; those only on a CPU, since a GPU would have to be waited for."""
    version = 0 if weight.is_inference() else weight._version
    probe = ()
    if weight.device.type == "cpu":
        flat = weight.detach().reshape(-1) if weight.is_contiguous() else weight.detach().T.reshape(-1)
        probe = tuple(flat[:: max(1, flat.numel() // 64)][:64].tolist())
    return (weight.data_ptr(), version, weight.dtype, weight.device, probe)
