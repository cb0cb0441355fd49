"""Sparse expert FFN in PyTorch alone: computes the chosen experts and nothing else, forward and backward.

Legend: N tokens, D model width, F hidden width, E experts, S = F // E neurons per expert, K experts chosen per
token, R <= N * K (token, expert) pairs sorted by expert, G pairs of one group of neighbouring experts.

Inside, weights are stacked: up and gate (E, S, D), down (E, D, S), their biases (E, S). For a dense checkpoint these
are views of its matrices (`stack_rows`, `stack_columns`); gradients get the strides of those views, so that they too
go back to the dense shape without a copy.

This file imports only torch and the standard library, because it is copied verbatim beside converted checkpoints,
which then run without this package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
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


def stack_rows(weight_FD: Tensor | None, num_experts: int) -> Tensor | None:
    """(F, D) as (E, S, D), or (F,) as (E, S): a view, since splitting one dimension fits any strides. None stays."""
    if weight_FD is None:
        return None
    shape = weight_FD.shape
    return weight_FD.view(num_experts, shape[0] // num_experts, *shape[1:])


def stack_columns(weight_DF: Tensor, num_experts: int) -> Tensor:
    """(D, F) as (E, D, S): a view."""
    D, F = weight_DF.shape
    return weight_DF.view(D, num_experts, F // num_experts).transpose(0, 1)


class Plan(NamedTuple):
    """(token, expert) pairs sorted by expert, and by token within an expert."""

    offsets: list[int]
    """E + 1 positions: the pairs of expert e are offsets[e] : offsets[e + 1]."""
    tokens_R: Tensor
    slots_R: Tensor
    """Where the pair stands in the flattened (N, K) tensors: n * K + k."""


def bad_ids(num_experts: int) -> ValueError:
    return ValueError(f"experts_NK holds ids outside -1 .. {num_experts - 1} (num_experts={num_experts})")


def make_plan(experts_NK: Tensor, num_experts: int) -> Plan:
    """Sort the pairs; slots holding -1 are left out. ValueError for ids outside -1 .. num_experts - 1."""
    flat = experts_NK.reshape(-1).long() + 1  # unused slots become bin 0
    if flat.numel() == 0:
        return Plan([0] * (num_experts + 1), flat, flat)
    if int(flat.min()) < 0 or int(flat.max()) > num_experts:
        raise bad_ids(num_experts)
    unused, *counts = torch.bincount(flat, minlength=num_experts + 1).tolist()
    # stable: tokens stay in ascending order within an expert, so that sums are taken in the same order every time
    slots_R = torch.sort(flat, stable=True).indices[unused:]
    offsets = [0]
    for count in counts:
        offsets.append(offsets[-1] + count)
    return Plan(offsets, slots_R // experts_NK.shape[1], slots_R)


class Block(NamedTuple):
    """One expert within a group, and its pairs: rows of the group."""

    expert: int
    rows: slice


# Elementwise work and gathers are done for several experts at a time, GEMMs for one. Below some hundreds of rows a
# call costs more than its arithmetic; above some thousands the buffers leave the L2 cache.
_GROUP_ROWS = 1024


def groups(offsets: list[int]) -> Iterator[tuple[slice, list[Block]]]:
    """Runs of chosen experts with about `_GROUP_ROWS` pairs together. Experts without pairs are not mentioned."""
    start, blocks = 0, []
    for e in range(len(offsets) - 1):
        low, high = offsets[e], offsets[e + 1]
        if low == high:
            continue
        if blocks and high - start > _GROUP_ROWS:
            yield slice(start, low), blocks
            start, blocks = low, []
        blocks.append(Block(e, slice(low - start, high - start)))
    if blocks:
        yield slice(start, offsets[-1]), blocks


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over experts are taken: K roundings to bf16 would cost log2(K) / 2 bits."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def project(x_GD: Tensor, weight_ESD: Tensor, bias_ES: Tensor | None, blocks: list[Block], out_GS: Tensor) -> None:
    """out = x W_e^T + b_e for the rows of each expert of one group."""
    for e, rows in blocks:
        weight_DS = weight_ESD[e].t()
        if bias_ES is None:
            torch.mm(x_GD[rows], weight_DS, out=out_GS[rows])
        else:
            torch.addmm(bias_ES[e], x_GD[rows], weight_DS, out=out_GS[rows])


def _hidden(act: Activation, up_GS: Tensor, gate_GS: Tensor | None, wide: torch.dtype) -> Tensor:
    """h before the routing weights. Low precision is widened first: one rounding instead of three."""
    if gate_GS is None:
        return act.forward(up_GS.to(wide))
    return act.forward(gate_GS.to(wide)).mul_(up_GS.to(wide))


def _forward(x_ND, plan, up_ESD, down_EDS, gate_ESD, up_bias_ES, gate_bias_ES, down_bias_D, weights_R1, act, keep):
    """y, and the pre-activations (up_RS, gate_RS) if `keep`, else (None, None)."""
    (N, D), S, wide = x_ND.shape, up_ESD.shape[1], wide_dtype(x_ND.dtype)
    y_ND = x_ND.new_zeros(N, D, dtype=wide)
    up_RS = x_ND.new_empty(plan.tokens_R.numel(), S) if keep else None
    gate_RS = x_ND.new_empty(plan.tokens_R.numel(), S) if keep and gate_ESD is not None else None
    for pairs, blocks in groups(plan.offsets):
        tokens_G = plan.tokens_R[pairs]
        x_GD = x_ND.index_select(0, tokens_G)
        up_GS = up_RS[pairs] if keep else x_ND.new_empty(len(tokens_G), S)
        project(x_GD, up_ESD, up_bias_ES, blocks, up_GS)
        gate_GS = None
        if gate_ESD is not None:
            gate_GS = gate_RS[pairs] if keep else torch.empty_like(up_GS)
            project(x_GD, gate_ESD, gate_bias_ES, blocks, gate_GS)
        h_GS = _hidden(act, up_GS, gate_GS, wide)
        if weights_R1 is not None:
            h_GS = h_GS * weights_R1[pairs]
        h_GS = h_GS.to(x_ND.dtype)
        for e, rows in blocks:
            # Tokens are distinct within an expert: no two rows of one index_add_ meet, so the order is fixed.
            part_nD = torch.mm(h_GS[rows], down_EDS[e].t(), out=x_GD[rows])
            y_ND.index_add_(0, tokens_G[rows], part_nD.to(wide))
    if down_bias_D is not None:
        y_ND += down_bias_D
    return y_ND.to(x_ND.dtype), up_RS, gate_RS


def empty_grad(weight: Tensor, offsets: list[int]) -> Tensor:
    """A gradient in the strides of `weight` (E, ...), zero where nobody chose; GEMMs write the other blocks."""
    grad = torch.empty_like(weight)
    for e in range(len(offsets) - 1):
        if offsets[e] == offsets[e + 1]:
            grad[e].zero_()
    return grad


def without_autocast(device_type: str) -> AbstractContextManager:
    """Turns autocast off, at no cost where it is off: entering the context takes 3 us, a tenth of a small layer."""
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


class _ExpertFFN(torch.autograd.Function):
    """Keeps x and the pre-activations (R * S elements each: K / E of what the dense layer keeps) and recomputes h.

    Recomputing the pre-activations too would repeat the up and gate GEMMs, half of a gated forward pass or more.
    """

    @staticmethod
    def forward(ctx, x, plan, up, down, gate, up_bias, gate_bias, down_bias, weights, act):
        weights_R1 = pair_weights(weights, plan, x.dtype)
        y, up_RS, gate_RS = _forward(x, plan, up, down, gate, up_bias, gate_bias, down_bias, weights_R1, act, True)
        ctx.save_for_backward(x, up, down, gate, weights, up_RS, gate_RS, plan.tokens_R, plan.slots_R)
        ctx.offsets, ctx.act = plan.offsets, act
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_ND):
        with without_autocast(dy_ND.device.type):
            return _backward(ctx, dy_ND)


def _backward(ctx, dy_ND: Tensor) -> tuple[Tensor | None, ...]:
    x_ND, up_ESD, down_EDS, gate_ESD, weights_NK, up_RS, gate_RS, tokens_R, slots_R = ctx.saved_tensors
    need_x, _, need_up, need_down, need_gate, need_bu, need_bg, need_bd, need_w, _ = ctx.needs_input_grad
    act, offsets, dtype, wide = ctx.act, ctx.offsets, x_ND.dtype, wide_dtype(x_ND.dtype)
    S = up_RS.shape[1]
    weights_R1 = pair_weights(weights_NK, Plan(offsets, tokens_R, slots_R), dtype)

    dx_ND = torch.zeros_like(x_ND, dtype=wide, memory_format=torch.contiguous_format) if need_x else None
    dup_ESD = empty_grad(up_ESD, offsets) if need_up else None
    dgate_ESD = empty_grad(gate_ESD, offsets) if need_gate else None
    ddown_EDS = empty_grad(down_EDS, offsets) if need_down else None
    dbu_ES = x_ND.new_zeros(up_ESD.shape[:2]) if need_bu else None
    dbg_ES = x_ND.new_zeros(up_ESD.shape[:2]) if need_bg else None
    dbd_D = dy_ND.sum(0, dtype=wide).to(dtype) if need_bd else None
    dweights_NK = torch.zeros_like(weights_NK, memory_format=torch.contiguous_format) if need_w else None
    need_up_side, need_gate_side = need_up or need_bu, need_gate or need_bg
    need_hidden = need_x or need_up_side or need_gate_side or need_w

    for pairs, blocks in groups(offsets) if need_hidden or need_down else ():
        tokens_G = tokens_R[pairs]
        w_G1 = None if weights_R1 is None else weights_R1[pairs]
        up_GS = up_RS[pairs].to(wide)
        gate_GS = None if gate_RS is None else gate_RS[pairs].to(wide)
        dy_GD = dy_ND.index_select(0, tokens_G)

        if need_down or need_w:
            h_GS = _hidden(act, up_GS, gate_GS, wide)
        if need_down:
            hw_GS = (h_GS if w_G1 is None else h_GS * w_G1).to(dtype)
            for e, rows in blocks:
                torch.mm(dy_GD[rows].t(), hw_GS[rows], out=ddown_EDS[e])
        if not need_hidden:
            continue

        dh_GS = x_ND.new_empty(len(tokens_G), S)
        for e, rows in blocks:
            torch.mm(dy_GD[rows], down_EDS[e], out=dh_GS[rows])
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
        for grad_GS, grad_ESD, grad_ES in ((dup_GS, dup_ESD, dbu_ES), (dgate_GS, dgate_ESD, dbg_ES)):
            for e, rows in blocks:
                if grad_ESD is not None:
                    torch.mm(grad_GS[rows].t(), x_GD[rows], out=grad_ESD[e])
                if grad_ES is not None:
                    torch.sum(grad_GS[rows], 0, out=grad_ES[e])
        if need_x:
            for e, rows in blocks:
                part_nD = torch.mm(dup_GS[rows], up_ESD[e], out=dy_GD[rows])  # dy_GD has been used up
                if dgate_GS is not None:
                    part_nD.addmm_(dgate_GS[rows], gate_ESD[e])
                dx_ND.index_add_(0, tokens_G[rows], part_nD.to(wide))

    dx_ND = dx_ND.to(dtype) if need_x else None
    return dx_ND, None, dup_ESD, ddown_EDS, dgate_ESD, dbu_ES, dbg_ES, dbd_D, dweights_NK, None


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
_FEW_TRANSPOSED_BYTES = 16 * 1024
"""Of weights stored (in, out), which a gather turns around. Microseconds few / grouped, AMD Zen 3, fp32, 1 thread:
16 x 64 (4 KiB), N 16, 240 / 605; 24 x 96, N 16, 310 / 569; 768 x 96, N 1, 16,500 / 270."""


def _forward_few(x_ND, experts_NK, up_ESD, down_EDS, gate_ESD, up_bias_ES, gate_bias_ES, down_bias_D, weights_NK, act):
    """A handful of tokens and small experts: gather the U experts that somebody chose, then three dense GEMMs.

    With few rows a GEMM an expert is all call overhead. A token's hidden values in experts chosen by others alone
    are set to zero; experts that nobody chose are not read.
    """
    ids_U, index_NK = torch.unique(experts_NK, return_inverse=True)
    unused = int(ids_U.numel() > 0 and ids_U[0] == -1)
    ids_U = ids_U[unused:]
    U, (E, S, _), wide = ids_U.numel(), up_ESD.shape, wide_dtype(x_ND.dtype)
    if U and (int(ids_U[0]) < 0 or int(ids_U[-1]) >= E):
        raise bad_ids(E)
    column_NK = index_NK + (1 - unused)  # column 0 takes the unused slots and is then dropped
    zeros = x_ND.new_zeros(x_ND.shape[0], U + 1, 1, dtype=wide)
    value = 1.0 if weights_NK is None else weights_NK.to(wide).unsqueeze(-1)
    scale_NU1 = zeros.scatter(1, column_NK.unsqueeze(-1), value)[:, 1:]
    chosen_NU1 = zeros.bool().scatter(1, column_NK.unsqueeze(-1), True)[:, 1:]

    def gather(weight: Tensor | None, dim: int) -> Tensor | None:
        """The chosen experts along `dim`, and that dimension joined with the next: U * S rows or columns."""
        if weight is None:
            return None
        chosen = weight if E == U else weight.index_select(dim, ids_U)
        return chosen.flatten(dim, dim + 1)

    linear = torch.nn.functional.linear
    up = linear(x_ND, gather(up_ESD, 0), gather(up_bias_ES, 0))
    gate = None if gate_ESD is None else linear(x_ND, gather(gate_ESD, 0), gather(gate_bias_ES, 0))
    h_NUS = _hidden(act, up, gate, wide).unflatten(1, (U, S)) * scale_NU1
    h_NUS = h_NUS.masked_fill_(~chosen_NU1, 0.0)  # not left to the zero in scale: 0 * inf is NaN
    return linear(h_NUS.flatten(1).to(x_ND.dtype), gather(down_EDS.transpose(0, 1), 1), down_bias_D)


def pair_weights(weights_NK: Tensor | None, plan: Plan, dtype: torch.dtype) -> Tensor | None:
    """The routing weight of each pair, (R, 1), in the wide dtype."""
    if weights_NK is None:
        return None
    return weights_NK.reshape(-1).index_select(0, plan.slots_R).to(wide_dtype(dtype)).unsqueeze(1)


def stacked_ffn(
    x_ND: Tensor,
    experts_NK: Tensor,
    up_ESD: Tensor,
    down_EDS: Tensor,
    *,
    gate_ESD: Tensor | None = None,
    up_bias_ES: Tensor | None = None,
    gate_bias_ES: Tensor | None = None,
    down_bias_D: Tensor | None = None,
    activation: str = "silu",
    weights_NK: Tensor | None = None,
) -> Tensor:
    """`expert_ffn` on stacked weights: expert e is up_ESD[e], gate_ESD[e], down_EDS[e]. Views of any strides."""
    act = get_activation(activation)
    inputs = (up_ESD, down_EDS, gate_ESD, up_bias_ES, gate_bias_ES, down_bias_D, weights_NK)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x_ND, *inputs))
    E, S, D = up_ESD.shape
    with without_autocast(x_ND.device.type):
        most = _FEW_BLOCK_BYTES if up_ESD.stride(2) == 1 else _FEW_TRANSPOSED_BYTES
        if not needs_grad and x_ND.shape[0] <= _FEW_TOKENS and S * D * up_ESD.element_size() <= most:
            return _forward_few(x_ND, experts_NK, *inputs, act)
        plan = make_plan(experts_NK, E)
        if needs_grad:
            return _ExpertFFN.apply(x_ND, plan, *inputs, act)
        weights_R1 = pair_weights(weights_NK, plan, x_ND.dtype)
        return _forward(x_ND, plan, *inputs[:-1], weights_R1, act, keep=False)[0]


def expert_ffn(
    x_ND: Tensor,
    experts_NK: Tensor,
    up_FD: Tensor,
    down_DF: Tensor,
    *,
    num_experts: int | None = None,
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

    Weights may also come stacked, up and gate (E, S, D), down (E, D, S), biases (E, S); `num_experts` is needed only
    if they do not.

    Sums over experts are taken in fp32 if x is bf16 or fp16. Calls that need no gradient may take another path for
    few tokens, and so differ in the last bits from calls that do. Two equal calls give equal bits.
    """
    up, down, gate, up_bias, gate_bias = up_FD, down_DF, gate_FD, up_bias_F, gate_bias_F
    if up.dim() == 2:
        up, gate, up_bias, gate_bias = (stack_rows(t, num_experts) for t in (up, gate, up_bias, gate_bias))
        down = stack_columns(down, num_experts)
    return stacked_ffn(
        x_ND,
        experts_NK,
        up,
        down,
        gate_ESD=gate,
        up_bias_ES=up_bias,
        gate_bias_ES=gate_bias,
        down_bias_D=down_bias_D,
        activation=activation,
        weights_NK=weights_NK,
    )
