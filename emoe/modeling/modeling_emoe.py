"""Emergent Mixture-of-Experts: a stock transformers model whose FFNs compute only the experts chosen for a token.

Source: Qiu, Huang, Fu, "Unlocking Emergent Modularity in Large Language Models" (NAACL 2024, arXiv 2310.10908), sec. 3.

Legend: N tokens, D model width, F hidden width, E experts, S = F // E neurons per expert, K experts chosen.

The weights stay where the source has them (``mlp.gate_proj.weight`` and so on), reordered so that expert e is the block
of neurons e*S … (e+1)*S. Nothing trainable is added: a gate is derived from the weights, or is a table in a buffer.
``EMoELlamaForCausalLM`` is ``LlamaForCausalLM`` with sparse FFNs; likewise for every other stock class. The classes are
made on first use, by name, so that one file serves every family. Two exceptions serve as baselines in fine-tuning: the
gate "cosine" is trained, and with ``emoe_copies`` an expert is a copy of the whole FFN (GMoE). This file is copied
beside each converted checkpoint and needs nothing but torch and transformers; with ``emoe_kernels`` installed it runs
on those kernels.
"""

import shutil
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from torch import nn
from transformers.activations import ACT2FN
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file, logging

from . import configuration_emoe
from .configuration_emoe import PREFIX

try:
    from emoe_kernels.experts.op import expert_ffn
except ImportError:  # a converted checkpoint on a machine without our packages: its own copy of the PyTorch path
    from .portable import expert_ffn

logger = logging.get_logger(__name__)

KERNEL_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "quick_gelu": "quick_gelu",
}
"""Activation names of transformers → those of the kernels; an FFN with another one runs masked."""


class Routing(NamedTuple):
    """The experts chosen for N tokens."""

    experts_NK: torch.Tensor
    """int64, distinct in a row; -1 marks an unused slot."""
    logits_NE: torch.Tensor
    """Raw gate logits in fp32."""
    weights_NK: torch.Tensor | None = None
    """Weights of the chosen experts; None means 1 for each, so that all experts together are the dense FFN."""


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

    def forward(self, x_ND: torch.Tensor) -> torch.Tensor:
        x_NA, c_EA = self.projection(x_ND.to(self.projection.weight.dtype)), self.centroids.weight
        cosine_NE = nn.functional.normalize(x_NA.float(), dim=-1) @ nn.functional.normalize(c_EA.float(), dim=-1).T
        return cosine_NE / self.temperature


class Router(nn.Module):
    """Chooses experts by their gate logits. Only the cosine gate is trained, others if `learn` is called; fp32.

    Gates, with key_j the row of neuron j in the FFN's input matrix:

    - average-key (EMoE, sec. 3.2): logit_e = x · mean of the keys of expert e, without input bias. From the weights,
    - representative (after CMoE, arXiv 2502.04416): logit_e = scale_e · |activation of one neuron of e|, the one that
      told the expert's energy best in calibration. Buffers: ``neuron`` (E,), ``scale`` (E,).
    - discriminant: logit_e = x · weight_e + bias_e, a closed-form linear discriminant. Buffers: ``weight`` (E, D),
      ``bias`` (E,).
    - cosine: a trained `CosineGate`, module ``cosine``. The chosen experts are weighted by the softmax of their logits,
      times K, so that the weights are 1 on average and the FFN keeps its scale; copies of a whole FFN without that
      factor. The paper's code has no factor: K experts of S neurons then start as one K-th of the FFN.

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
        elif self.gate == "discriminant":
            self.register_buffer("weight", torch.zeros(self.num_experts, width, dtype=torch.float32))
            self.register_buffer("bias", torch.zeros(self.num_experts, dtype=torch.float32))
        elif self.gate == "cosine":
            self.cosine = CosineGate(width, self.num_experts)
        elif self.gate != "average-key":
            raise ValueError(
                f"unknown emoe_gate {self.gate!r}; known: average-key, representative, discriminant, cosine"
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
        if self.gate == "discriminant":
            return torch.nn.functional.linear(x_ND.float(), self.weight, self.bias)
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
        if self.shared:
            logits_NE = torch.cat(
                [torch.full_like(logits_NE[:, : self.shared], torch.inf), logits_NE[:, self.shared :]], 1
            )
        if self.rule == "bottom-k":
            logits_NE = -logits_NE
        elif self.rule == "random":
            logits_NE = _scrambled(logits_NE)
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

    def _trained_weights(self, logits_NE: torch.Tensor, experts_NK: torch.Tensor) -> torch.Tensor:
        """Weights (N, K) of a cosine gate: the softmax over experts in the budget; sigmoid(logit) of added ones."""
        chosen_NK = logits_NE.gather(1, experts_NK.clamp_min(0)).masked_fill(experts_NK < 0, -torch.inf)
        added = self.num_experts - self.budgeted
        in_budget_NK = chosen_NK[:, : chosen_NK.shape[1] - added]
        weights_NK = in_budget_NK.softmax(-1) * (1 if self.copies else in_budget_NK.shape[1])
        return torch.cat([weights_NK, chosen_NK[:, -added:].sigmoid()], 1) if added else weights_NK

    def forward(self, x_ND: torch.Tensor, ffn) -> Routing:
        """Tokens (N, D) → `Routing`. Chosen by raw logits: a softmax underflows into ties."""
        learning = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        with torch.autocast(x_ND.device.type, enabled=False), torch.set_grad_enabled(learning):
            logits_NE = self.logits(x_ND, ffn)
            with torch.no_grad():
                experts_NK = self.choose(logits_NE)
            if self.gate == "cosine":
                return Routing(experts_NK, logits_NE, self._trained_weights(logits_NE, experts_NK))
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
    """Numbers without order from the bits of fp32 logits; a column's own number keeps equal logits apart."""
    bits_NE = logits_NE.float().contiguous().view(torch.int32).long() & 0xFFFFFFFF
    bits_NE = bits_NE + 0x9E3779B9 * torch.arange(1, logits_NE.shape[1] + 1, device=logits_NE.device)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):  # the mixing steps of Wellons' lowbias32
        bits_NE = ((bits_NE ^ ((bits_NE & 0xFFFFFFFF) >> shift)) * factor) & 0xFFFFFFFF
    return (bits_NE ^ (bits_NE >> 16)).float()


class WeightViews(NamedTuple):
    """The FFN's weights as (F, D) rows and (D, F) columns whatever their storage; views, never copies."""

    keys_FD: torch.Tensor
    key_bias_F: torch.Tensor | None
    up_FD: torch.Tensor | None
    up_bias_F: torch.Tensor | None
    down_DF: torch.Tensor
    down_bias_D: torch.Tensor | None


def _rows(linear) -> torch.Tensor:
    return linear.weight.T if isinstance(linear, Conv1D) else linear.weight


def _untouched(linear) -> bool:
    """A stock linear without hooks, its weight at hand: reading the weight gives what calling it would compute.

    torchao leaves the linear alone and puts a tensor of a class of its own into it.
    """
    if type(linear) not in (nn.Linear, Conv1D) or type(linear.weight) not in (nn.Parameter, torch.Tensor):
        return False
    return not (linear._forward_hooks or linear._forward_pre_hooks or linear.weight.is_meta)


def _fingerprint(weight: torch.Tensor) -> tuple:
    """Changes whenever a weight does: by its version counter or, when it was written to behind its back as in
    ``weight.data += delta``, by 64 of its values; those only on a CPU, since a GPU would have to be waited for."""
    version = 0 if weight.is_inference() else weight._version
    probe = ()
    if weight.device.type == "cpu":
        flat = weight.detach().reshape(-1) if weight.is_contiguous() else weight.detach().T.reshape(-1)
        probe = tuple(flat[:: max(1, flat.numel() // 64)][:64].tolist())
    return (weight.data_ptr(), version, weight.dtype, weight.device, probe)


class SparseFFN:
    """Mixed into the stock module that holds a family's FFN: computes only the chosen experts."""

    def become_sparse(self, config, group: list[int] | None = None) -> None:
        """Attach the router. The stock module's own parameters stay as they are, under their own names.

        Args:
            group: this layer's entry of ``config.emoe_groups``: its linears get as many neurons as that says.
        """
        self.layout, self.num_experts = config.emoe_ffn, sum(group) if group else config.num_experts
        name = getattr(config, self.layout["activation_key"])
        self.act, self.activation = ACT2FN[name], KERNEL_ACTIVATIONS.get(name)
        self.gated = bool(self.layout["gate"] or self.layout["fused"])
        if config.emoe_copies:
            self.widen(config.emoe_copies)
        self.router = Router(config, config.hidden_size, group)
        if group:
            self._resize(self.num_experts * config.emoe_expert_size)
        if config.emoe_compensation:  # of what is skipped at this budget: the mean over calibration text
            self.router.register_buffer("compensation", torch.zeros(config.hidden_size, dtype=torch.float32))
            self.compensated_k = config.emoe_compensation
            self.compensated_of = config.emoe_compensation_of or config.num_experts

    def _resize(self, width: int) -> None:
        """Linears of `width` neurons in place of those of the source's width; a checkpoint fills them."""
        for role in ("gate", "up", "down"):
            if not self.layout[role]:
                continue
            old = self.linear(role)
            into, out = _rows(old).shape[::-1]
            into, out = (width, out) if role == "down" else (into, width * (2 if self.layout["fused"] else 1))
            if isinstance(old, Conv1D):
                new = Conv1D(out, into)
            else:
                new = nn.Linear(into, out, bias=old.bias is not None)
            path, _, name = self.layout[role].rpartition(".")
            setattr(self.get_submodule(path), name, new.to(device=old.weight.device, dtype=old.weight.dtype))

    def widen(self, copies: int) -> None:
        """Repeat the neurons: each expert becomes a copy of the whole FFN (GMoE). The output bias stays one."""
        for role in ("gate", "up", "down"):
            if not self.layout[role]:
                continue
            linear = self.linear(role)
            axis = int(role == "down") ^ int(isinstance(linear, Conv1D))
            parts = 2 if role == "up" and self.layout["fused"] else 1  # gate rows, then up rows
            repeat = lambda t, axis: torch.cat([p for c in t.chunk(parts, axis) for p in [c] * copies], axis)  # noqa: B023, E731
            linear.weight = nn.Parameter(repeat(linear.weight.detach(), axis), linear.weight.requires_grad)
            if role != "down" and linear.bias is not None:
                linear.bias = nn.Parameter(repeat(linear.bias.detach(), 0), linear.bias.requires_grad)
            if isinstance(linear, Conv1D):
                linear.nx, linear.nf = linear.weight.shape
            else:
                linear.out_features, linear.in_features = linear.weight.shape

    def linear(self, role: str) -> nn.Module:
        """The linear that plays `role`: "gate", "up" or "down"."""
        return attrgetter(self.layout[role])(self)  # get_submodule took 2 us, seven times a layer and token

    @property
    def plain(self) -> bool:
        """No adapter, quantiser or hook stands between us and the weights."""
        return all(_untouched(self.linear(role)) for role in ("gate", "up", "down") if self.layout[role])

    def weight_views(self) -> WeightViews:
        """Only for a `plain` FFN."""
        up, down = self.linear("up"), self.linear("down")
        if self.layout["fused"]:
            keys_FD, up_FD = _rows(up).chunk(2)
            key_bias_F, up_bias_F = up.bias.chunk(2) if up.bias is not None else (None, None)
        elif self.gated:
            gate = self.linear("gate")
            keys_FD, key_bias_F, up_FD, up_bias_F = _rows(gate), gate.bias, _rows(up), up.bias
        else:
            keys_FD, key_bias_F, up_FD, up_bias_F = _rows(up), up.bias, _rows(up), up.bias
        return WeightViews(keys_FD, key_bias_F, up_FD, up_bias_F, _rows(down), down.bias)

    def pre_activation(self, x: torch.Tensor) -> torch.Tensor:
        """What goes into the activation, (…, D) → (…, F), through the modules' own calls."""
        if self.layout["fused"]:
            return self.linear("up")(x).chunk(2, dim=-1)[0]
        return self.linear("gate" if self.gated else "up")(x)

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        """All neurons, (…, D) → (…, F), through the modules' own calls: the stock arithmetic, step by step."""
        if self.layout["fused"]:
            gate, up = self.linear("up")(x).chunk(2, dim=-1)
            return up * self.act(gate)
        if self.gated:
            return self.act(self.linear("gate")(x)) * self.linear("up")(x)
        return self.act(self.linear("up")(x))

    def ffn(self, x: torch.Tensor) -> torch.Tensor:
        """The FFN of (…, D) → (…, D), without the dropout and LayerNorm that some families put behind it."""
        if self.router.all_on:
            return self._compensated(self.linear("down")(self.hidden(x)))
        x_ND = x.reshape(-1, x.shape[-1])
        routing = self.router(x_ND, self)
        if self.activation is None or not self.plain:
            logger.warning_once(
                "An FFN's linears are wrapped, hooked or have an unknown activation: masked, not skipped."
            )
            return self._compensated(self._masked(x_ND, routing)).view(x.shape)
        w = self.weight_views()
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x_ND, w = x_ND.to(dtype), WeightViews(*(None if t is None else t.to(dtype) for t in w))
        y_ND = expert_ffn(
            x_ND,
            routing.experts_NK,
            w.up_FD,
            w.down_DF,
            num_experts=self.num_experts,
            gate_FD=w.keys_FD if self.gated else None,
            up_bias_F=w.up_bias_F,
            gate_bias_F=w.key_bias_F if self.gated else None,
            down_bias_D=w.down_bias_D,
            activation=self.activation,
            weights_NK=routing.weights_NK,
        )
        return self._compensated(y_ND).view(x.shape)

    def _compensated(self, y_ND: torch.Tensor) -> torch.Tensor:
        """Adds the mean output of skipped experts, where the checkpoint has it: in full at the budget it was measured
        at, in proportion to what is skipped at others. Experts that were pruned since count as skipped."""
        if "compensation" not in self.router._buffers or self.router.top_k == self.compensated_of:
            return y_ND
        share = (self.compensated_of - self.router.top_k) / max(1, self.compensated_of - self.compensated_k)
        return y_ND + (share * self.router.compensation).to(y_ND.dtype)

    def _masked(self, x_ND: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Computes every neuron and zeroes the unchosen: saves nothing, works through any wrapper of the linears."""
        experts_NK, weights_NK = routing.experts_NK, routing.weights_NK
        if weights_NK is None:
            weights_NK = torch.ones_like(experts_NK, dtype=x_ND.dtype)
        mask_NE = torch.zeros(len(x_ND), self.num_experts + 1, dtype=x_ND.dtype, device=x_ND.device)
        mask_NE = mask_NE.scatter(1, experts_NK % (self.num_experts + 1), weights_NK.to(x_ND.dtype))[:, :-1]
        h_NES = self.hidden(x_ND).unflatten(1, (self.num_experts, -1))
        # where, not product: an unchosen neuron that overflowed must not reach the sum as NaN
        h_NES = torch.where(mask_NE[..., None] != 0, h_NES * mask_NE[..., None], 0)
        return self.linear("down")(h_NES.flatten(1))


class SparseMLP(SparseFFN):
    """Families whose FFN is a module of its own (Llama, GPT-2, Phi-3, …)."""

    def forward(self, hidden_states):
        y = self.ffn(hidden_states)
        return self.get_submodule(self.layout["dropout"])(y) if self.layout["dropout"] else y


class SparseBertLayer(SparseFFN):
    """BERT, RoBERTa: the layer holds the FFN in two modules; dropout and LayerNorm follow."""

    def feed_forward_chunk(self, attention_output):
        y = self.output.dropout(self.ffn(attention_output))
        return self.output.LayerNorm(y + attention_output)


class SparseOPTLayer(SparseFFN):
    """OPT: the FFN is written inline in the layer, before or after whose parts a LayerNorm stands."""

    def forward(
        self, hidden_states, attention_mask=None, past_key_values=None, use_cache=False, position_ids=None, **kwargs
    ):
        drop = lambda x: nn.functional.dropout(x, p=self.dropout, training=self.training)  # noqa: E731
        before = self.do_layer_norm_before

        residual = hidden_states
        attended, _ = self.self_attn(
            hidden_states=self.self_attn_layer_norm(residual) if before else residual,
            past_key_values=past_key_values,
            position_ids=position_ids,
            attention_mask=attention_mask,
            **kwargs,
        )
        residual = residual + drop(attended)
        if not before:
            residual = self.self_attn_layer_norm(residual)

        y = residual + drop(self.ffn(self.final_layer_norm(residual) if before else residual))
        return y if before else self.final_layer_norm(y)


_HOSTS = {"module": SparseMLP, "bert-layer": SparseBertLayer, "opt-layer": SparseOPTLayer}
_SPARSE_CLASSES: dict[type, type] = {}


def make_sparse(layer: nn.Module, config, group: list[int] | None = None) -> SparseFFN:
    """Turn the FFN of one stock layer into a `SparseFFN`, in place: same parameters, same names, another forward."""
    layout = config.emoe_ffn
    holder = layer.get_submodule(layout["ffn"]) if layout["ffn"] else layer
    stock = type(holder)
    if stock not in _SPARSE_CLASSES:
        _SPARSE_CLASSES[stock] = type(f"{PREFIX}{stock.__name__}", (_HOSTS[layout["host"]], stock), {})
    holder.__class__ = _SPARSE_CLASSES[stock]
    holder.become_sparse(config, group)
    return holder


class EMoEModelMixin:
    """Mixed into a stock model class: the layers in ``config.emoe_layers`` get sparse FFNs."""

    _keep_in_fp32_modules_strict = ["router"]  # noqa: RUF012 - transformers wants a list

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        base = getattr(self, self.base_model_prefix, self)
        layers = base.get_submodule(config.emoe_ffn["layers"])
        for place, index in enumerate(config.emoe_layers):
            if not any(isinstance(m, SparseFFN) for m in layers[index].modules()):  # a head may wrap our own base model
                make_sparse(layers[index], config, config.emoe_groups[place] if config.emoe_groups else None)
        if self._no_split_modules:  # layers of the families that hold the FFN inline have got a new class name
            self._no_split_modules = [*self._no_split_modules, *(PREFIX + name for name in self._no_split_modules)]

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As transformers', but no tensor of a router stays a view of the file.

        They stay fp32 in a model of 16 bits, and one view keeps all its file mapped: 410 MiB for SmolLM2 in fp32.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info a tuple
        for ffn in model.sparse_ffns().values():
            ffn.router._apply(lambda tensor: tensor.clone() if tensor.device.type == "cpu" else tensor)
        return loaded

    def sparse_ffns(self) -> dict[int, SparseFFN]:
        """The converted FFNs by layer index."""
        found = [module for module in self.modules() if isinstance(module, SparseFFN)]
        return dict(zip(self.config.emoe_layers, found, strict=True))

    def set_top_k(self, top_k: int) -> None:
        """Use `top_k` experts a token from now on; at ``num_experts`` the model is the dense model.

        Where the number differs by token or layer, `top_k` is the average that calibration text had.

        Raises:
            ValueError: `top_k` is not between 1 and ``config.num_experts``.
        """
        if not 1 <= top_k <= self.config.num_experts:
            raise ValueError(f"top_k={top_k} must lie between 1 and num_experts={self.config.num_experts}")
        self.config.num_experts_per_tok = top_k
        for ffn in self.sparse_ffns().values():
            ffn.router.top_k = top_k

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As transformers', plus the modelling files and the partition, so that the copy loads everywhere too."""
        target = Path(save_directory)
        target.mkdir(parents=True, exist_ok=True)
        for file in code_files():
            shutil.copyfile(file, target / file.name)
        for name in ("partition.safetensors", "emoe_config.yaml"):
            found = cached_file(self.config._name_or_path, name, _raise_exceptions_for_missing_entries=False)
            if found is None:
                logger.warning(f"{name} was not found in {self.config._name_or_path}: the copy has none")
            elif Path(found).resolve() != (target / name).resolve():
                shutil.copyfile(found, target / name)
        super().save_pretrained(save_directory, *args, **kwargs)


def code_files() -> list[Path]:
    """The Python files that a converted checkpoint carries: these two and the kernels' portable path."""
    import sys

    return [Path(sys.modules[module].__file__) for module in (configuration_emoe.__name__, __name__)] + [
        Path(sys.modules[expert_ffn.__module__].__file__).with_name("portable.py")
    ]


def _share_renamings(name: str, stock: type) -> None:
    """Old checkpoints' tensor names are translated by transformers per class; ours are spelt as the source's."""
    found = get_checkpoint_conversion_mapping(stock.__name__)
    found = found or get_checkpoint_conversion_mapping(stock.config_class.model_type)
    if found:
        register_checkpoint_conversion_mapping(name, found, overwrite=True)


def _model_class(name: str) -> type:
    stock = getattr(transformers, name.removeprefix(PREFIX))
    _share_renamings(name, stock)
    config_class = getattr(configuration_emoe, PREFIX + stock.config_class.__name__)
    namespace = {
        "config_class": config_class,
        "__module__": __name__,
        "__doc__": f"`{stock.__name__}` with sparse FFNs; see `EMoEModelMixin`.",
    }
    return type(name, (EMoEModelMixin, stock), namespace)


def __getattr__(name: str) -> type:
    if not name.startswith(PREFIX) or not hasattr(transformers, name.removeprefix(PREFIX)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = _model_class(name)
    return globals()[name]
