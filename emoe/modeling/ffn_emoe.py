"""FFNs of stock modules that compute only the experts chosen for a token.

Legend: N tokens, D model width, F hidden width, E experts, S = F // E neurons per expert, K experts chosen.

Copied beside each converted checkpoint, as `modeling_emoe` says; needs nothing but torch and transformers.
"""

from operator import attrgetter
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from .configuration_emoe import PREFIX
from .routing_emoe import Router, Routing

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

    That holds for torch's parametrisations, too. torchao leaves the linear alone and puts a tensor of a class of its
    own into it.
    """
    if type_before_parametrizations(linear) not in (nn.Linear, Conv1D):
        return False
    weight = linear.weight
    if type(weight) not in (nn.Parameter, torch.Tensor) or weight.is_meta:
        return False
    return not (linear._forward_hooks or linear._forward_pre_hooks)


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
