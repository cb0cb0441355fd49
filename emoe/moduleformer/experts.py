"""Experts of a ModuleFormer: stacked weights, a gate, and the FFN made of them.

Legend: N tokens, D model width, F hidden width of an FFN expert, E experts, K experts chosen per token.
"""

import torch
from torch import nn
from transformers.activations import ACT2FN

from .ops import expert_combine, expert_ffn, expert_linear
from .router import Gate, Routing

KERNEL_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu_squared",
    "quick_gelu": "quick_gelu",
}
"""Activation names of transformers → those of the kernels."""


class StackedLinear(nn.Module):
    """E linear layers without bias, stored (E, in, out)."""

    def __init__(self, num_experts: int, width_in: int, width_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, width_in, width_out))

    def extra_repr(self) -> str:
        return "experts={}, in={}, out={}".format(*self.weight.shape)

    def for_kernels(self, x: torch.Tensor) -> torch.Tensor:
        """The weight as kernels want it, (E, out, in), in the dtype of ``x``; a view unless the dtypes differ."""
        return self.weight.to(x.dtype).mT


def kernel_input(x: torch.Tensor) -> torch.Tensor:
    """``x`` in autocast's dtype where autocast is on: it does not act inside the kernels."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


class ExpertPool(nn.Module):
    """E experts of two stacked linears each, and the gate that chooses among them; no gate if all are computed."""

    def __init__(self, config, groups: list[int], top_k: int, width: int):
        super().__init__()
        num_experts = sum(groups)
        self.experts = StackedLinear(num_experts, config.n_embd, width)
        self.output_experts = StackedLinear(num_experts, width, config.n_embd)
        self.gate = Gate(config, groups, top_k) if config.gate_type != "all" else None
        self.num_experts, self.top_k = num_experts, top_k

    def route(self, x_ND: torch.Tensor) -> Routing | None:
        """The gate's choice; None if there is no gate."""
        return None if self.gate is None else self.gate(x_ND)

    def into(self, x_ND: torch.Tensor, routing: Routing | None) -> torch.Tensor:
        """(N, D) → (N, K, width): tokens through the first linear of their experts."""
        if routing is None:
            return torch.matmul(x_ND, self.experts.weight.to(x_ND.dtype)).transpose(0, 1)
        return expert_linear(x_ND, routing.experts_NK, self.experts.for_kernels(x_ND))

    def back(self, h_NKW: torch.Tensor, routing: Routing | None) -> torch.Tensor:
        """(N, K, width) → (N, D): through the second linear, times the gate, summed over experts."""
        if routing is None:
            return h_NKW.flatten(1) @ self.output_experts.weight.to(h_NKW.dtype).flatten(0, 1)
        return expert_combine(
            h_NKW, routing.experts_NK, self.output_experts.for_kernels(h_NKW), weights_NK=routing.weights_NK
        )


class ExpertFFN(ExpertPool):
    """y = Σ_e g_e · W₂ᵉ act(W₁ᵉ x) over the chosen experts e (ModuleFormer, sec. 3.1)."""

    def __init__(self, config, layer_index: int):
        super().__init__(config, config.experts_of("mlp", layer_index), config.k_mlp, config.ffd_hidden)
        self.kernel_activation = KERNEL_ACTIVATIONS.get(config.activation_function)
        fused = self.kernel_activation == "gelu_tanh"  # gelu_new is the same formula in eight passes over memory
        self.act = ACT2FN["gelu_pytorch_tanh" if fused else config.activation_function]

    def forward(self, x_ND: torch.Tensor) -> tuple[torch.Tensor, Routing | None]:
        """Tokens (N, D) → (N, D) and who was chosen."""
        routing = self.route(x_ND)
        x_ND = kernel_input(x_ND)
        if routing is None or self.kernel_activation is None:
            return self.back(self.act(self.into(x_ND, routing)), routing), routing
        y_ND = expert_ffn(
            x_ND,
            routing.experts_NK,
            self.experts.for_kernels(x_ND),
            self.output_experts.for_kernels(x_ND),
            activation=self.kernel_activation,
            weights_NK=routing.weights_NK,
        )
        return y_ND, routing
