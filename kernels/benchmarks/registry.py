"""The implementations that are compared: ours, the dense layer, and what else a user can install.

Legend: N tokens, D model width, F hidden width, E experts, S = F // E neurons per expert, K experts chosen per token,
R = N * K (token, expert) pairs sorted by expert.

Each one computes the same gated SiLU FFN with routing weights 1. It gets its weights in its own layout, prepared
outside of the timing, and the routing as (N, K) ids: sorting and gathering are part of what is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from cases import DTYPES, Case, DenseWeights, Layer, StackedWeights
from torch import Tensor
from torch.nn.functional import linear, silu

from emoe_kernels import use
from emoe_kernels.experts import expert_ffn

OURS = "emoe"
DENSE = "dense"


class Runner(NamedTuple):
    """An implementation with its weights."""

    call: Callable[[Tensor, Tensor], Tensor]
    """(x_ND, experts_NK) → y_ND."""
    leaves: DenseWeights | StackedWeights
    """The weights that collect gradients."""

    def gradients(self) -> dict[str, Tensor]:
        """The weights' gradients in the dense layout; a weight that got none has zeros."""
        grads = [torch.zeros_like(w) if w.grad is None else w.grad for w in self.leaves]
        if isinstance(self.leaves, DenseWeights):
            return dict(zip(("gate", "up", "down"), grads, strict=True))
        gate_ESD, up_ESD = grads[0].chunk(2, dim=1)
        return {
            "gate": gate_ESD.flatten(0, 1),
            "up": up_ESD.flatten(0, 1),
            "down": grads[1].transpose(0, 1).flatten(1),
        }


def _nothing(case: Case) -> int:
    return 0


class Implementation(NamedTuple):
    """One column of the results."""

    name: str
    what: str
    prepare: Callable[[Layer], Runner]
    sparse: bool = True
    """Held to the reference. The dense layer, which ignores the routing, is not."""
    scratch_bytes: Callable[[Case], int] = _nothing
    """Least memory it takes besides weights and output, where that can be too much for a machine."""


def _dense(layer: Layer) -> Runner:
    gate_FD, up_FD, down_DF = layer.dense
    return Runner(lambda x, _: linear(silu(linear(x, gate_FD)) * linear(x, up_FD), down_DF), layer.dense)


def _ours(name: str) -> Callable[[Layer], Runner]:
    def prepare(layer: Layer) -> Runner:
        gate_FD, up_FD, down_DF = layer.dense

        def call(x_ND: Tensor, experts_NK: Tensor) -> Tensor:
            with use(name):
                return expert_ffn(x_ND, experts_NK, up_FD, down_DF, num_experts=layer.num_experts, gate_FD=gate_FD)

        return Runner(call, layer.dense)

    return prepare


def _masked(layer: Layer) -> Runner:
    """The dense layer with the hidden neurons of unchosen experts set to zero."""
    gate_FD, up_FD, down_DF = layer.dense

    def call(x_ND: Tensor, experts_NK: Tensor) -> Tensor:
        mask_NE = x_ND.new_zeros(len(x_ND), layer.num_experts).scatter_(1, experts_NK, 1)
        h_NF = silu(linear(x_ND, gate_FD)) * linear(x_ND, up_FD)
        h_NES = h_NF.unflatten(1, (layer.num_experts, -1)) * mask_NE.unsqueeze(2)
        return linear(h_NES.flatten(1), down_DF)

    return Runner(call, layer.dense)


class _Sorted(NamedTuple):
    """(token, expert) pairs in the order of their experts."""

    order_R: Tensor
    """Position n * K + k of each sorted pair."""
    tokens_R: Tensor
    counts_E: Tensor


def _sort(experts_NK: Tensor, num_experts: int) -> _Sorted:
    flat_R = experts_NK.flatten()
    order_R = flat_R.argsort(stable=True)
    return _Sorted(order_R, order_R // experts_NK.shape[1], torch.bincount(flat_R, minlength=num_experts))


def _loop(layer: Layer) -> Runner:
    """A Python loop over the chosen experts, written for speed.

    `unbind(0)` once a call: indexing a 3-D parameter per expert makes autograd build a full-size gradient an expert
    (transformers' `eager` does). Gate and up are one GEMM. Without gradients each expert gathers its own rows and adds
    to y, in fp32; with gradients all rows are gathered and added at once, because each `index_add` an expert would
    have a gradient of the size of x.
    """
    stacked = layer.stacked

    def expert(rows_nD: Tensor, gate_up_2D: Tensor, down_DS: Tensor) -> Tensor:
        gate_nS, up_nS = linear(rows_nD, gate_up_2D).chunk(2, dim=-1)
        return linear(silu(gate_nS) * up_nS, down_DS)

    def call(x_ND: Tensor, experts_NK: Tensor) -> Tensor:
        pairs = _sort(experts_NK, layer.num_experts)
        counts = pairs.counts_E.tolist()
        gate_ups, downs = stacked.gate_up_E2D.unbind(0), stacked.down_EDS.unbind(0)
        y_ND = torch.zeros(x_ND.shape, dtype=torch.float32)
        if torch.is_grad_enabled():
            rows = x_ND[pairs.tokens_R].split(counts)
            parts = [expert(r, g, d) for r, g, d in zip(rows, gate_ups, downs, strict=True) if len(r)]
            return y_ND.index_add(0, pairs.tokens_R, torch.cat(parts).float()).to(x_ND.dtype)
        for tokens_n, g, d in zip(pairs.tokens_R.split(counts), gate_ups, downs, strict=True):
            if len(tokens_n):
                y_ND.index_add_(0, tokens_n, expert(x_ND[tokens_n], g, d).float())
        return y_ND.to(x_ND.dtype)

    return Runner(call, stacked)


def _grouped(layer: Layer) -> Runner:
    """torch's grouped GEMM between one gather and one sum, gate and up in one call."""
    grouped_mm = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    stacked = layer.stacked

    def call(x_ND: Tensor, experts_NK: Tensor) -> Tensor:
        pairs = _sort(experts_NK, layer.num_experts)
        offsets_E = pairs.counts_E.cumsum(0, dtype=torch.int32)
        gate_up_R2 = grouped_mm(x_ND[pairs.tokens_R], stacked.gate_up_E2D.transpose(1, 2), offs=offsets_E)
        gate_RS, up_RS = gate_up_R2.chunk(2, dim=-1)
        y_RD = grouped_mm(silu(gate_RS) * up_RS, stacked.down_EDS.transpose(1, 2), offs=offsets_E)
        # back to the order of the tokens: the sum over K then accumulates in fp32 and needs no index_add
        inverse_R = torch.empty_like(pairs.order_R)
        inverse_R[pairs.order_R] = torch.arange(len(inverse_R))
        return y_RD[inverse_R].unflatten(0, experts_NK.shape).sum(1)

    return Runner(call, stacked)


def _transformers(name: str) -> Callable[[Layer], Runner]:
    def prepare(layer: Layer) -> Runner:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        stacked = layer.stacked
        E, D, S = stacked.down_EDS.shape
        config = MixtralConfig(hidden_size=D, intermediate_size=S, num_local_experts=E, hidden_act="silu")
        config._experts_implementation = name
        with torch.device("meta"):
            experts = MixtralExperts(config)
        experts.gate_up_proj, experts.down_proj = stacked

        def call(x_ND: Tensor, experts_NK: Tensor) -> Tensor:
            return experts(x_ND, experts_NK, torch.ones(experts_NK.shape, dtype=x_ND.dtype))

        return Runner(call, stacked)

    return prepare


def _batched_bytes(case: Case) -> int:
    """transformers' batched_mm copies three S × D blocks a pair, and backward makes their gradients too."""
    copies = 1 if case.pass_ == "fwd" else 2
    pairs, block = case.tokens * case.shape.chosen, case.shape.neurons * case.shape.width
    return copies * pairs * 3 * block * DTYPES[case.dtype].itemsize


IMPLEMENTATIONS = (
    Implementation(DENSE, "three F.linear and SiLU: the ratio's denominator", _dense, sparse=False),
    Implementation(OURS, "emoe_kernels, what `auto` chooses", _ours("auto")),
    Implementation("emoe-portable", "emoe_kernels, in PyTorch alone", _ours("portable")),
    Implementation("masked", "dense, unchosen neurons set to zero", _masked),
    Implementation("loop", "Python loop over the chosen experts", _loop),
    Implementation("F.grouped_mm", "gather, torch.nn.functional.grouped_mm, sum", _grouped),
    Implementation("tf.eager", "transformers' MixtralExperts, eager", _transformers("eager")),
    Implementation("tf.batched_mm", "the same, batched_mm", _transformers("batched_mm"), scratch_bytes=_batched_bytes),
    Implementation("tf.grouped_mm", "the same, grouped_mm", _transformers("grouped_mm")),
)
"""In the order of the results' columns."""


def by_name() -> dict[str, Implementation]:
    """The implementations by name."""
    return {implementation.name: implementation for implementation in IMPLEMENTATIONS}
