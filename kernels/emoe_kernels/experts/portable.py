"""Sparse expert FFN in PyTorch alone: computes the chosen experts and nothing else, forward and backward.

Legend: N tokens, D model width, F hidden width, E experts, S = F // E neurons per expert, K experts chosen per
token, R <= N * K (token, expert) pairs sorted by expert, G pairs of one group of neighbouring experts.

This file imports only torch and the standard library, because it is copied verbatim beside converted checkpoints,
which then run without this package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_aten = torch.ops.aten


def _quick_gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    s = torch.sigmoid(1.702 * x)
    return grad * (s + 1.702 * x * s * (1 - s))


class Activation(NamedTuple):
    """An elementwise function and the product of a gradient with its derivative, `backward(grad, x)`."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


# aten's own backward functions: one pass over memory, and exactly what torch's autograd would have computed.
ACTIVATIONS: dict[str, Activation] = {
    "silu": Activation(torch.nn.functional.silu, _aten.silu_backward),
    "gelu": Activation(torch.nn.functional.gelu, _aten.gelu_backward),
    "gelu_tanh": Activation(
        lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
        lambda grad, x: _aten.gelu_backward(grad, x, approximate="tanh"),
    ),
    "quick_gelu": Activation(lambda x: x * torch.sigmoid(1.702 * x), _quick_gelu_backward),
    "relu": Activation(torch.relu, lambda grad, x: _aten.threshold_backward(grad, x, 0)),
    "relu_squared": Activation(lambda x: torch.relu(x).square(), lambda grad, x: grad * 2 * torch.relu(x)),
}


def get_activation(name: str) -> Activation:
    """The entry of `ACTIVATIONS` called `name`; ValueError listing the known names if there is none."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation={name!r} is unknown; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


class Plan(NamedTuple):
    """(token, expert) pairs sorted by expert, and by token within an expert."""

    offsets: list[int]
    """E + 1 positions: the pairs of expert e are offsets[e] : offsets[e + 1]."""
    tokens_R: Tensor
    slots_R: Tensor
    """Where the pair stands in the flattened (N, K) tensors: n * K + k."""


def _bad_ids(num_experts: int) -> ValueError:
    return ValueError(f"experts_NK holds ids outside -1 .. {num_experts - 1} (num_experts={num_experts})")


def make_plan(experts_NK: Tensor, num_experts: int) -> Plan:
    """Sort the pairs; slots holding -1 are left out. ValueError for ids outside -1 .. num_experts - 1."""
    flat = experts_NK.reshape(-1).long() + 1  # unused slots become bin 0
    if flat.numel() == 0:
        return Plan([0] * (num_experts + 1), flat, flat)
    if int(flat.min()) < 0 or int(flat.max()) > num_experts:
        raise _bad_ids(num_experts)
    unused, *counts = torch.bincount(flat, minlength=num_experts + 1).tolist()
    # stable: tokens stay in ascending order within an expert, so that sums are taken in the same order every time
    slots_R = torch.sort(flat, stable=True).indices[unused:]
    offsets = [0]
    for count in counts:
        offsets.append(offsets[-1] + count)
    return Plan(offsets, slots_R // experts_NK.shape[1], slots_R)


class _Block(NamedTuple):
    """One expert within a group: its pairs (rows of the group) and its neurons (rows of up, columns of down)."""

    expert: int
    rows: slice
    neurons: slice


# Elementwise work and gathers are done for several experts at a time, GEMMs for one. Below some hundreds of rows a
# call costs more than its arithmetic; above some thousands the buffers leave the L2 cache.
_GROUP_ROWS = 1024


def _groups(offsets: list[int], neurons: int) -> Iterator[tuple[slice, list[_Block]]]:
    """Runs of chosen experts with about `_GROUP_ROWS` pairs together. Experts without pairs are not mentioned."""
    start, blocks = 0, []
    for e in range(len(offsets) - 1):
        low, high = offsets[e], offsets[e + 1]
        if low == high:
            continue
        if blocks and high - start > _GROUP_ROWS:
            yield slice(start, low), blocks
            start, blocks = low, []
        blocks.append(_Block(e, slice(low - start, high - start), slice(e * neurons, (e + 1) * neurons)))
    if blocks:
        yield slice(start, offsets[-1]), blocks


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over experts are taken: K roundings to bf16 would cost log2(K) / 2 bits."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _project(x_GD: Tensor, weight_FD: Tensor, bias_F: Tensor | None, blocks: list[_Block], out_GS: Tensor) -> None:
    for _, rows, neurons in blocks:
        weight_DS = weight_FD[neurons].t()
        if bias_F is None:
            torch.mm(x_GD[rows], weight_DS, out=out_GS[rows])
        else:
            torch.addmm(bias_F[neurons], x_GD[rows], weight_DS, out=out_GS[rows])


def _hidden(act: Activation, up_GS: Tensor, gate_GS: Tensor | None, wide: torch.dtype) -> Tensor:
    """h before the routing weights. Low precision is widened first: one rounding instead of three."""
    if gate_GS is None:
        return act.forward(up_GS.to(wide))
    return act.forward(gate_GS.to(wide)).mul_(up_GS.to(wide))


def _forward(x_ND, plan, up_FD, down_DF, gate_FD, up_bias_F, gate_bias_F, down_bias_D, weights_R1, act, keep):
    """y, and the pre-activations (up_RS, gate_RS) if `keep`, else (None, None)."""
    (N, D), E = x_ND.shape, len(plan.offsets) - 1
    S, wide = up_FD.shape[0] // E, _wide(x_ND.dtype)
    y_ND = x_ND.new_zeros(N, D, dtype=wide)
    up_RS = x_ND.new_empty(plan.tokens_R.numel(), S) if keep else None
    gate_RS = x_ND.new_empty(plan.tokens_R.numel(), S) if keep and gate_FD is not None else None
    for pairs, blocks in _groups(plan.offsets, S):
        tokens_G = plan.tokens_R[pairs]
        x_GD = x_ND.index_select(0, tokens_G)
        up_GS = up_RS[pairs] if keep else x_ND.new_empty(len(tokens_G), S)
        _project(x_GD, up_FD, up_bias_F, blocks, up_GS)
        gate_GS = None
        if gate_FD is not None:
            gate_GS = gate_RS[pairs] if keep else torch.empty_like(up_GS)
            _project(x_GD, gate_FD, gate_bias_F, blocks, gate_GS)
        h_GS = _hidden(act, up_GS, gate_GS, wide)
        if weights_R1 is not None:
            h_GS = h_GS * weights_R1[pairs]
        h_GS = h_GS.to(x_ND.dtype)
        for _, rows, neurons in blocks:
            # Tokens are distinct within an expert: no two rows of one index_add_ meet, so the order is fixed.
            part_nD = torch.mm(h_GS[rows], down_DF[:, neurons].t(), out=x_GD[rows])
            y_ND.index_add_(0, tokens_G[rows], part_nD.to(wide))
    if down_bias_D is not None:
        y_ND += down_bias_D
    return y_ND.to(x_ND.dtype), up_RS, gate_RS


def _empty_grad(weight: Tensor, dim: int, offsets: list[int]) -> Tensor:
    """A gradient whose blocks of unchosen experts are zero; the others are about to be written by a GEMM."""
    grad = torch.empty_like(weight)
    per_expert = grad.unflatten(dim, (len(offsets) - 1, -1))
    for e in range(len(offsets) - 1):
        if offsets[e] == offsets[e + 1]:
            per_expert.select(dim, e).zero_()
    return grad


class _ExpertFFN(torch.autograd.Function):
    """Keeps x and the pre-activations (R * S elements each: K / E of what the dense layer keeps) and recomputes h.

    Recomputing the pre-activations too would repeat the up and gate GEMMs, half of a gated forward pass or more.
    """

    @staticmethod
    def forward(ctx, x, plan, up, down, gate, up_bias, gate_bias, down_bias, weights, act):
        weights_R1 = _pair_weights(weights, plan, x.dtype)
        y, up_RS, gate_RS = _forward(x, plan, up, down, gate, up_bias, gate_bias, down_bias, weights_R1, act, True)
        ctx.save_for_backward(x, up, down, gate, weights, up_RS, gate_RS, plan.tokens_R, plan.slots_R)
        ctx.offsets, ctx.act = plan.offsets, act
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_ND):
        with torch.autocast(dy_ND.device.type, enabled=False):
            return _backward(ctx, dy_ND)


def _backward(ctx, dy_ND: Tensor) -> tuple[Tensor | None, ...]:
    x_ND, up_FD, down_DF, gate_FD, weights_NK, up_RS, gate_RS, tokens_R, slots_R = ctx.saved_tensors
    need_x, _, need_up, need_down, need_gate, need_bu, need_bg, need_bd, need_w, _ = ctx.needs_input_grad
    act, offsets, dtype, wide = ctx.act, ctx.offsets, x_ND.dtype, _wide(x_ND.dtype)
    S = up_RS.shape[1]
    weights_R1 = _pair_weights(weights_NK, Plan(offsets, tokens_R, slots_R), dtype)

    dx_ND = torch.zeros_like(x_ND, dtype=wide, memory_format=torch.contiguous_format) if need_x else None
    dup_FD = _empty_grad(up_FD, 0, offsets) if need_up else None
    dgate_FD = _empty_grad(gate_FD, 0, offsets) if need_gate else None
    ddown_DF = _empty_grad(down_DF, 1, offsets) if need_down else None
    dbu_F = x_ND.new_zeros(up_FD.shape[0]) if need_bu else None
    dbg_F = x_ND.new_zeros(up_FD.shape[0]) if need_bg else None
    dbd_D = dy_ND.sum(0, dtype=wide).to(dtype) if need_bd else None
    dweights_NK = torch.zeros_like(weights_NK, memory_format=torch.contiguous_format) if need_w else None
    need_up_side, need_gate_side = need_up or need_bu, need_gate or need_bg
    need_hidden = need_x or need_up_side or need_gate_side or need_w

    for pairs, blocks in _groups(offsets, S) if need_hidden or need_down else ():
        tokens_G = tokens_R[pairs]
        w_G1 = None if weights_R1 is None else weights_R1[pairs]
        up_GS = up_RS[pairs].to(wide)
        gate_GS = None if gate_RS is None else gate_RS[pairs].to(wide)
        dy_GD = dy_ND.index_select(0, tokens_G)

        if need_down or need_w:
            h_GS = _hidden(act, up_GS, gate_GS, wide)
        if need_down:
            hw_GS = (h_GS if w_G1 is None else h_GS * w_G1).to(dtype)
            for _, rows, neurons in blocks:
                torch.mm(dy_GD[rows].t(), hw_GS[rows], out=ddown_DF[:, neurons])
        if not need_hidden:
            continue

        dh_GS = x_ND.new_empty(len(tokens_G), S)
        for _, rows, neurons in blocks:
            torch.mm(dy_GD[rows], down_DF[:, neurons], out=dh_GS[rows])
        dh_GS = dh_GS.to(wide)
        if need_w:
            dweights_NK.view(-1)[slots_R[pairs]] = (dh_GS * h_GS).sum(1).to(weights_NK.dtype)
        if w_G1 is not None:
            dh_GS = dh_GS * w_G1
        if gate_GS is None:
            dup_GS, dgate_GS = act.backward(dh_GS, up_GS).to(dtype), None
        else:
            dup_GS = act.forward(gate_GS).mul_(dh_GS).to(dtype)
            dgate_GS = act.backward(dh_GS * up_GS, gate_GS).to(dtype)

        x_GD = x_ND.index_select(0, tokens_G) if need_up or need_gate else None
        for grad_GS, grad_FD, grad_F in ((dup_GS, dup_FD, dbu_F), (dgate_GS, dgate_FD, dbg_F)):
            for _, rows, neurons in blocks:
                if grad_FD is not None:
                    torch.mm(grad_GS[rows].t(), x_GD[rows], out=grad_FD[neurons])
                if grad_F is not None:
                    torch.sum(grad_GS[rows], 0, out=grad_F[neurons])
        if need_x:
            for _, rows, neurons in blocks:
                part_nD = torch.mm(dup_GS[rows], up_FD[neurons], out=dy_GD[rows])  # dy_GD has been used up
                if dgate_GS is not None:
                    part_nD.addmm_(dgate_GS[rows], gate_FD[neurons])
                dx_ND.index_add_(0, tokens_G[rows], part_nD.to(wide))

    dx_ND = dx_ND.to(dtype) if need_x else None
    return dx_ND, None, dup_FD, ddown_DF, dgate_FD, dbu_F, dbg_F, dbd_D, dweights_NK, None


# Where `_forward_few` beats a GEMM an expert. Milliseconds few / grouped; AMD Zen 4 with AVX-512, torch 2.13, 1 thread
# (CPU time, minimum), gated, E 64, K 16, random routing:
#                                              N = 1          N = 8          N = 16
#   D 576,  F 1536, fp32 ( 54 KiB a block)   0.27 / 0.62     1.1 / 2.6      1.6 / 3.1
#   D 576,  F 1536, bf16 ( 27 KiB)           0.32 / 1.47     0.7 / 5.2      0.8 / 6.0
#   D 2048, F 5632, bf16 (352 KiB)           3.7  / 4.0     11.0 / 13.7    10.5 / 16.2
#   D 2048, F 5632, fp32 (704 KiB)           4.3  / 3.6     80   / 13.8    26.3 / 18.8
# so what decides is the size of an expert's block: a call's overhead against copying the block.
_FEW_TOKENS = 16
_FEW_BLOCK_BYTES = 512 * 1024


def _forward_few(
    x_ND, experts_NK, num_experts, up_FD, down_DF, gate_FD, up_bias_F, gate_bias_F, down_bias_D, weights_NK, act
):
    """A handful of tokens and small experts: gather the U experts that somebody chose, then three dense GEMMs.

    With few rows a GEMM an expert is all call overhead. A token's hidden values in experts chosen by others alone
    are set to zero; experts that nobody chose are not read.
    """
    ids_U, index_NK = torch.unique(experts_NK, return_inverse=True)
    unused = int(ids_U.numel() > 0 and ids_U[0] == -1)
    ids_U = ids_U[unused:]
    U, S, wide = ids_U.numel(), up_FD.shape[0] // num_experts, _wide(x_ND.dtype)
    if U and (int(ids_U[0]) < 0 or int(ids_U[-1]) >= num_experts):
        raise _bad_ids(num_experts)
    column_NK = index_NK + (1 - unused)  # column 0 takes the unused slots and is then dropped
    zeros = x_ND.new_zeros(x_ND.shape[0], U + 1, 1, dtype=wide)
    value = 1.0 if weights_NK is None else weights_NK.to(wide).unsqueeze(-1)
    scale_NU1 = zeros.scatter(1, column_NK.unsqueeze(-1), value)[:, 1:]
    chosen_NU1 = zeros.bool().scatter(1, column_NK.unsqueeze(-1), True)[:, 1:]

    def gather(weight: Tensor | None, dim: int) -> Tensor | None:
        if weight is None or num_experts == U:
            return weight
        return weight.unflatten(dim, (num_experts, -1)).index_select(dim, ids_U).flatten(dim, dim + 1)

    linear = torch.nn.functional.linear
    up = linear(x_ND, gather(up_FD, 0), gather(up_bias_F, 0))
    gate = None if gate_FD is None else linear(x_ND, gather(gate_FD, 0), gather(gate_bias_F, 0))
    h_NUS = _hidden(act, up, gate, wide).unflatten(1, (U, S)) * scale_NU1
    h_NUS = h_NUS.masked_fill_(~chosen_NU1, 0.0)  # not left to the zero in scale: 0 * inf is NaN
    return linear(h_NUS.flatten(1).to(x_ND.dtype), gather(down_DF, 1), down_bias_D)


def _pair_weights(weights_NK: Tensor | None, plan: Plan, dtype: torch.dtype) -> Tensor | None:
    if weights_NK is None:
        return None
    return weights_NK.reshape(-1).index_select(0, plan.slots_R).to(_wide(dtype)).unsqueeze(1)


def expert_ffn(
    x_ND: Tensor,
    experts_NK: Tensor,
    up_FD: Tensor,
    down_DF: Tensor,
    *,
    num_experts: int,
    gate_FD: Tensor | None = None,
    up_bias_F: Tensor | None = None,
    gate_bias_F: Tensor | None = None,
    down_bias_D: Tensor | None = None,
    activation: str = "silu",
    weights_NK: Tensor | None = None,
) -> Tensor:
    """y_n = sum over k of weights_nk * h_block(experts_nk) @ down_block(experts_nk).T + down_bias, of shape (N, D).

    h = activation(x @ gate.T + gate_bias) * (x @ up.T + up_bias), or activation(x @ up.T + up_bias) without a gate.
    Expert e is rows e * S : (e + 1) * S of up and gate, and the same columns of down. `experts_NK` is int64, distinct
    within a row, -1 where a slot is unused; weights are 1 where `weights_NK` is None. Any strides are accepted, and
    no weight is copied whole. Raises ValueError for an unknown activation or expert id.

    Sums over experts are taken in fp32 if x is bf16 or fp16. Calls that need no gradient may take another path for
    few tokens, and so differ in the last bits from calls that do. Two equal calls give equal bits.
    """
    act = get_activation(activation)
    inputs = (up_FD, down_DF, gate_FD, up_bias_F, gate_bias_F, down_bias_D, weights_NK)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x_ND, *inputs))
    block_bytes = up_FD.numel() // num_experts * up_FD.element_size()
    with torch.autocast(x_ND.device.type, enabled=False):
        if not needs_grad and x_ND.shape[0] <= _FEW_TOKENS and block_bytes <= _FEW_BLOCK_BYTES:
            return _forward_few(x_ND, experts_NK, num_experts, *inputs, act)
        plan = make_plan(experts_NK, num_experts)
        if needs_grad:
            return _ExpertFFN.apply(x_ND, plan, *inputs, act)
        weights_R1 = _pair_weights(weights_NK, plan, x_ND.dtype)
        return _forward(x_ND, plan, *inputs[:-1], weights_R1, act, keep=False)[0]
