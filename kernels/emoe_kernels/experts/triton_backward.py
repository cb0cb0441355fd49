"""Triton kernels of the backward pass: through the activation, gradients of the weights and of the biases.

Legend: N tokens, K slots per token, P = N * K slots, E experts, S neurons per expert, D model width. Rows are slots
sorted by expert (triton_common.py). The GEMMs for dh and dx are those of the forward pass: dy Wd_e is `hidden_kernel`
without an activation, dx is `project_kernel` and `combine_kernel` with du and dg for h.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_common import activate, activate_slope, dot


@triton.jit
def activation_backward_kernel(
    dh_ptr,  # (P, S) rows H_P apart, or None: dy Wd_e; overwritten by the gradient of the up pre-activations
    weights_ptr,  # (N, K) contiguous or None
    up_ptr,  # (P, S) pre-activations, rows H_P apart like all that follow
    gate_ptr,  # (P, S) or None
    dg_ptr,  # (P, S) or None: gradient of the gate pre-activations
    hw_ptr,  # (P, S) or None: w h, which the gradient of down is made of
    dw_ptr,  # (P,) fp32 by slot, or None: gradient of the routing weights
    offsets_ptr,
    slots_ptr,
    E: tl.constexpr,
    S: tl.constexpr,
    H_P: tl.constexpr,
    ACT: tl.constexpr,
    BY_SLOT: tl.constexpr,  # (P, S) tensors are indexed by slot instead of by row
    WRITE_DU: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """With t = dy Wd_e: dw = sum over s of t h, dh = w t, du = act(g) dh and dg = act'(g) u dh, or du = act'(u) dh.

    A kernel of its own and not the end of the GEMM before it: there it needs five tiles at a time in registers and
    spills, and what it moves, (P, S), is little beside the (P, D) that the GEMM gathers.
    """
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    row_ok = rows < tl.load(offsets_ptr + E)
    slots = tl.load(slots_ptr + rows, mask=row_ok, other=0)
    index = slots if BY_SLOT else rows
    dw = tl.zeros((BM,), tl.float32)
    if weights_ptr is not None:
        w = tl.load(weights_ptr + slots, mask=row_ok, other=0.0).to(tl.float32)[:, None]
    for s_start in range(0, S, BN):
        s = s_start + tl.arange(0, BN)
        ok = row_ok[:, None] & (s < S)[None, :]
        at = index.to(tl.int64)[:, None] * H_P + s[None, :]
        up = tl.load(up_ptr + at, mask=ok, other=0.0).to(tl.float32)
        if gate_ptr is not None:
            gate = tl.load(gate_ptr + at, mask=ok, other=0.0).to(tl.float32)
            a = activate(gate, ACT)
            h = a * up
        else:
            h = activate(up, ACT)
        if dh_ptr is not None:
            dh = tl.load(dh_ptr + at, mask=ok, other=0.0).to(tl.float32)
            dw += tl.sum(dh * h, 1)
            if weights_ptr is not None:
                dh *= w
            if WRITE_DU:
                if gate_ptr is not None:
                    tl.store(dh_ptr + at, (a * dh).to(dh_ptr.dtype.element_ty), mask=ok)
                    dg = activate_slope(gate, ACT) * up * dh
                    tl.store(dg_ptr + at, dg.to(dg_ptr.dtype.element_ty), mask=ok)
                else:
                    tl.store(dh_ptr + at, (activate_slope(up, ACT) * dh).to(dh_ptr.dtype.element_ty), mask=ok)
        if hw_ptr is not None:
            if weights_ptr is not None:
                h *= w
            tl.store(hw_ptr + at, h.to(hw_ptr.dtype.element_ty), mask=ok)
    if dw_ptr is not None:
        tl.store(dw_ptr + slots, dw, mask=row_ok)


@triton.jit
def grad_weight_kernel(
    a_ptr,  # (P, S) rows A_P apart
    x_ptr,  # (N, D) rows x_stride apart
    grad_ptr,  # (E, S, D), any strides
    offsets_ptr,
    slots_ptr,
    x_stride,
    K: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    A_P: tl.constexpr,
    G_E: tl.constexpr,
    G_S: tl.constexpr,
    G_D: tl.constexpr,
    BY_SLOT: tl.constexpr,  # a is indexed by slot instead of by row
    BM: tl.constexpr,  # neurons
    BN: tl.constexpr,  # columns of D
    BK: tl.constexpr,  # rows at a time
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """grad_e[s, d] = sum over the rows of e of a[row, s] x[token, d]; zero for experts nobody chose.

    One program owns one tile of the gradient: nothing is added by two, so two runs give the same bits.
    """
    D_BLOCKS: tl.constexpr = (D + BN - 1) // BN
    S_BLOCKS: tl.constexpr = (S + BM - 1) // BM
    pid = tl.program_id(0)
    d = (pid % D_BLOCKS) * BN + tl.arange(0, BN)
    s = ((pid // D_BLOCKS) % S_BLOCKS) * BM + tl.arange(0, BM)
    expert = pid // (D_BLOCKS * S_BLOCKS)
    start = tl.load(offsets_ptr + expert)
    end = tl.load(offsets_ptr + expert + 1)
    d_ok = d < D
    s_ok = s < S
    acc = tl.zeros((BM, BN), tl.float32)
    for row in range(start, end, BK):
        rows = row + tl.arange(0, BK)
        row_ok = rows < end
        slots = tl.load(slots_ptr + rows, mask=row_ok, other=0)
        index = slots if BY_SLOT else rows
        tokens = (slots // K).to(tl.int64)
        a_ok = s_ok[:, None] & row_ok[None, :]
        a = tl.load(a_ptr + index.to(tl.int64)[None, :] * A_P + s[:, None], mask=a_ok, other=0.0)
        x = tl.load(x_ptr + tokens[:, None] * x_stride + d[None, :], mask=row_ok[:, None] & d_ok[None, :], other=0.0)
        acc = dot(a, x, acc, PRECISION, UPCAST)
    out = expert.to(tl.int64) * G_E + s.to(tl.int64)[:, None] * G_S + d.to(tl.int64)[None, :] * G_D
    tl.store(grad_ptr + out, acc.to(grad_ptr.dtype.element_ty), mask=s_ok[:, None] & d_ok[None, :])


@triton.jit
def grad_bias_kernel(
    a_ptr,  # (P, S) rows A_P apart
    grad_ptr,  # (E, S) contiguous
    offsets_ptr,
    slots_ptr,
    S: tl.constexpr,
    A_P: tl.constexpr,
    BY_SLOT: tl.constexpr,
    BM: tl.constexpr,  # rows at a time
    BN: tl.constexpr,  # neurons
):
    """grad_e[s] = sum over the rows of e of a[row, s]."""
    S_BLOCKS: tl.constexpr = (S + BN - 1) // BN
    expert = tl.program_id(0) // S_BLOCKS
    s = (tl.program_id(0) % S_BLOCKS) * BN + tl.arange(0, BN)
    start = tl.load(offsets_ptr + expert)
    end = tl.load(offsets_ptr + expert + 1)
    acc = tl.zeros((BM, BN), tl.float32)
    for row in range(start, end, BM):
        rows = row + tl.arange(0, BM)
        row_ok = rows < end
        index = tl.load(slots_ptr + rows, mask=row_ok, other=0) if BY_SLOT else rows
        at = index.to(tl.int64)[:, None] * A_P + s[None, :]
        acc += tl.load(a_ptr + at, mask=row_ok[:, None] & (s < S)[None, :], other=0.0).to(tl.float32)
    out = expert.to(tl.int64) * S + s
    tl.store(grad_ptr + out, tl.sum(acc, 0).to(grad_ptr.dtype.element_ty), mask=s < S)
