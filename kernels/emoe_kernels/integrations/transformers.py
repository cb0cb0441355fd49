"""`experts_implementation="emoe"`: the mixture-of-experts models of transformers on these kernels.

Legend: N tokens, D model width, E experts, S neurons per expert, K experts chosen per token.

Importing this module registers it:

    import emoe_kernels.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained("allenai/OLMoE-1B-7B-0924", experts_implementation="emoe")
    model.set_experts_implementation("eager")  # and back

transformers hands over the module that holds the weights, with what its decorator `use_experts_implementation` says
about them: `has_gate`, `has_bias`, `is_transposed`, and a method `_apply_gate`. Usual experts, that is an activation of
`ACTIVATIONS` with or without an ordinary gate, are one `expert_ffn`. For any other activation or gate (GPT-OSS clamps
both halves) the module's own function runs between `expert_linear` and `expert_combine`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from transformers.integrations import moe

from ..experts import expert_ffn
from ..linear import expert_combine, expert_linear

__all__ = ["experts_forward"]

# This module may be imported while transformers imports its own modules, so it takes no more of them than `moe`.


@functools.cache
def _activations() -> dict[type[nn.Module], str]:
    """Class of an activation in transformers → name in the kernels."""
    from transformers import activations as theirs

    return {
        nn.SiLU: "silu",
        nn.ReLU: "relu",
        theirs.SiLUActivation: "silu",
        theirs.GELUActivation: "gelu",
        theirs.GELUTanh: "gelu_tanh",
        theirs.NewGELUActivation: "gelu_tanh",
        theirs.FastGELUActivation: "gelu_tanh",
        theirs.QuickGELUActivation: "quick_gelu",
        theirs.ReLUSquaredActivation: "relu_squared",
    }


def _activation(module: nn.Module) -> str | None:
    """The name of the module's activation if its experts are usual ones, else None."""
    if module.has_gate and type(module)._apply_gate is not moe._default_apply_gate:
        return None
    return _activations().get(type(module.act_fn))


def _add_output_bias(y_ND: Tensor, experts_NK: Tensor, weights_NK: Tensor, bias_ED: Tensor) -> Tensor:
    """y + sum_k w_nk b_e: an output bias to each expert, which the kernels do not have, as one small product."""
    E, wide = len(bias_ED), torch.promote_types(weights_NK.dtype, torch.float32)
    weights_NX = weights_NK.new_zeros(len(y_ND), E + 1, dtype=wide)  # one more column, for unused slots
    weights_NX = weights_NX.scatter(1, experts_NK % (E + 1), weights_NK.to(wide))
    return (y_ND + weights_NX[:, :E] @ bias_ED.to(wide)).to(y_ND.dtype)


def experts_forward(module: nn.Module, x_ND: Tensor, experts_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """What the forward method of an experts module of transformers computes: sum_k w_nk expert_e(x_n), (N, D).

    Under autocast x and the weights are cast to its dtype, as its linear layers would be.

    Raises:
        ValueError: the experts end in a norm of their own (`has_post_expert_norm`), which cannot be summed over.
    """
    if module.has_post_expert_norm:
        raise ValueError(
            f'experts_implementation="emoe" does not support {type(module).__name__}: its experts end in a norm; '
            'use "grouped_mm" or "eager"'
        )
    gated, biased = module.has_gate, module.has_bias
    into, back = module.gate_up_proj if gated else module.up_proj, module.down_proj
    into_bias = (module.gate_up_proj_bias if gated else module.up_proj_bias) if biased else None
    back_bias = module.down_proj_bias if biased else None
    if module.is_transposed:
        into, back = into.mT, back.mT
    if module._is_expert_parallel:  # ids from E on mean the experts of other processes
        experts_NK = experts_NK.masked_fill(experts_NK >= len(into), -1)

    dtype = x_ND.dtype
    if torch.is_autocast_enabled(x_ND.device.type):
        cast = torch.get_autocast_dtype(x_ND.device.type)
        x_ND, into, back = x_ND.to(cast), into.to(cast), back.to(cast)
        into_bias = None if into_bias is None else into_bias.to(cast)

    activation = _activation(module)
    if activation is None:
        h_NKX = expert_linear(x_ND, experts_NK, into, into_bias)
        h_XS = (module._apply_gate if gated else module.act_fn)(h_NKX.flatten(0, 1))
        h_NKS = h_XS.to(x_ND.dtype).view(*experts_NK.shape, -1)
        y_ND = expert_combine(h_NKS, experts_NK, back, weights_NK=weights_NK)
    else:
        # chunk, not slices: its gradient is one concatenation, theirs would be two matrices filled up with zeros
        gate, up = into.chunk(2, dim=1) if gated else (None, into)
        gate_bias, up_bias = into_bias.chunk(2, dim=1) if gated and biased else (None, into_bias)
        y_ND = expert_ffn(
            x_ND,
            experts_NK,
            up,
            back,
            gate_FD=gate,
            up_bias_F=up_bias,
            gate_bias_F=gate_bias,
            activation=activation,
            weights_NK=weights_NK,
        )
    if biased:
        y_ND = _add_output_bias(y_ND, experts_NK, weights_NK, back_bias)
    return y_ND.to(dtype)


moe.ALL_EXPERTS_FUNCTIONS.register("emoe", experts_forward)
