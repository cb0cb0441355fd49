"""Triton kernels of the forward pass: gathered up projection with activation, down projection, sum over k.

Legend: N tokens, K slots per token, P = N * K slots, E experts, S neurons per expert, D model width. Rows are slots
sorted by expert (triton_common.py). Model dimensions and strides of weights are compile-time constants: masks and trip
counts fold, and address alignment is known exactly, which decides how wide the loads are (S is 88 or 172, not 128).
What may change from call to call, N and the row stride of x, is not one: that would compile again.

Source: the fused gather and the grouping of rows by expert follow ScatterMoE, arXiv 2403.08245, sec. 3. Different
here: the block height follows the rows per expert instead of 128, a block never spans two experts, gate, up and
activation are one kernel, and the down projection goes through a bounded buffer, not an (N * K, D) one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_common import activate, dot, find_block, offset


@triton.jit
def hidden_kernel(
    x_ptr,  # (N, D) rows x_stride apart
    up_ptr,  # (E, S, D), any strides
    gate_ptr,  # (E, S, D) or None
    up_bias_ptr,  # (E, S) contiguous or None
    gate_bias_ptr,  # (E, S) contiguous or None
    h_ptr,  # (P, S) rows H_P apart
    up_out_ptr,  # (P, S) like h: pre-activations kept for the backward pass, or None
    gate_out_ptr,
    offsets_ptr,
    slots_ptr,
    x_stride,
    K: tl.constexpr,
    E: tl.constexpr,
    E_POW2: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    UP_E: tl.constexpr,
    UP_S: tl.constexpr,
    UP_D: tl.constexpr,
    GATE_E: tl.constexpr,
    GATE_S: tl.constexpr,
    GATE_D: tl.constexpr,
    H_P: tl.constexpr,
    ACT: tl.constexpr,
    BY_SLOT: tl.constexpr,  # h is indexed by slot instead of by row
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """h = act(x Wg^T + bg) * (x Wu^T + bu), or act(x Wu^T + bu); one program per (BM rows of an expert, BN neurons)."""
    S_BLOCKS: tl.constexpr = (S + BN - 1) // BN
    expert, first, end = find_block(offsets_ptr, tl.program_id(0) // S_BLOCKS, E, E_POW2, BM)
    if expert < E:
        rows = first + tl.arange(0, BM)
        row_ok = rows < end
        slots = tl.load(slots_ptr + rows, mask=row_ok, other=0)
        tokens = (slots // K).to(tl.int64)
        s = (tl.program_id(0) % S_BLOCKS) * BN + tl.arange(0, BN)
        s_ok = s < S
        e = expert.to(tl.int64)
        up_acc = tl.zeros((BM, BN), tl.float32)
        if gate_ptr is not None:
            gate_acc = tl.zeros((BM, BN), tl.float32)
        for d_start in range(0, D, BK):
            d = d_start + tl.arange(0, BK)
            d_ok = d < D
            x_ok = row_ok[:, None] & d_ok[None, :]
            x = tl.load(x_ptr + tokens[:, None] * x_stride + d[None, :], mask=x_ok, other=0.0)
            w_ok = d_ok[:, None] & s_ok[None, :]
            up_at = e * UP_E + offset(d[:, None], UP_D, D) + offset(s[None, :], UP_S, S)
            up = tl.load(up_ptr + up_at, mask=w_ok, other=0.0)
            up_acc = dot(x, up, up_acc, PRECISION, UPCAST)
            if gate_ptr is not None:
                gate_at = e * GATE_E + offset(d[:, None], GATE_D, D) + offset(s[None, :], GATE_S, S)
                gate = tl.load(gate_ptr + gate_at, mask=w_ok, other=0.0)
                gate_acc = dot(x, gate, gate_acc, PRECISION, UPCAST)

        if up_bias_ptr is not None:
            up_acc += tl.load(up_bias_ptr + e * S + s, mask=s_ok, other=0.0).to(tl.float32)[None, :]
        index = slots if BY_SLOT else rows
        out = index.to(tl.int64)[:, None] * H_P + s[None, :]
        ok = row_ok[:, None] & s_ok[None, :]
        if up_out_ptr is not None:
            tl.store(up_out_ptr + out, up_acc.to(up_out_ptr.dtype.element_ty), mask=ok)
        if gate_ptr is not None:
            if gate_bias_ptr is not None:
                gate_acc += tl.load(gate_bias_ptr + e * S + s, mask=s_ok, other=0.0).to(tl.float32)[None, :]
            if gate_out_ptr is not None:
                tl.store(gate_out_ptr + out, gate_acc.to(gate_out_ptr.dtype.element_ty), mask=ok)
            h = activate(gate_acc, ACT) * up_acc
        else:
            h = activate(up_acc, ACT)
        tl.store(h_ptr + out, h.to(h_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["chunk"])
def project_kernel(
    a_ptr,  # (P, S) rows A_P apart
    wa_ptr,  # (E, S, D), any strides
    b_ptr,  # (P, S) like a, or None
    wb_ptr,  # (E, S, D) or None
    part_ptr,  # (P, WIDTH) by slot, contiguous
    offsets_ptr,
    slots_ptr,
    chunk,  # which WIDTH columns of D
    E: tl.constexpr,
    E_POW2: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    A_P: tl.constexpr,
    WA_E: tl.constexpr,
    WA_S: tl.constexpr,
    WA_D: tl.constexpr,
    WB_E: tl.constexpr,
    WB_S: tl.constexpr,
    WB_D: tl.constexpr,
    WIDTH: tl.constexpr,  # a multiple of BN
    BY_SLOT: tl.constexpr,  # a and b are indexed by slot instead of by row
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """part[slot] = a Wa_e + b Wb_e, for columns chunk * WIDTH : (chunk + 1) * WIDTH of D.

    Stored by slot, so that the sum over k reads neighbouring rows and needs no inverse of the sort.
    """
    D_BLOCKS: tl.constexpr = WIDTH // BN
    expert, first, end = find_block(offsets_ptr, tl.program_id(0) // D_BLOCKS, E, E_POW2, BM)
    if expert < E:
        rows = first + tl.arange(0, BM)
        row_ok = rows < end
        slots = tl.load(slots_ptr + rows, mask=row_ok, other=0).to(tl.int64)
        column = (tl.program_id(0) % D_BLOCKS) * BN + tl.arange(0, BN)
        d = chunk * WIDTH + column
        d_ok = d < D
        e = expert.to(tl.int64)
        index = slots if BY_SLOT else rows.to(tl.int64)
        acc = tl.zeros((BM, BN), tl.float32)
        for s_start in range(0, S, BK):
            s = s_start + tl.arange(0, BK)
            s_ok = s < S
            a_ok = row_ok[:, None] & s_ok[None, :]
            w_ok = s_ok[:, None] & d_ok[None, :]
            a = tl.load(a_ptr + index[:, None] * A_P + s[None, :], mask=a_ok, other=0.0)
            wa_at = e * WA_E + offset(s[:, None], WA_S, S) + offset(d[None, :], WA_D, D)
            wa = tl.load(wa_ptr + wa_at, mask=w_ok, other=0.0)
            acc = dot(a, wa, acc, PRECISION, UPCAST)
            if b_ptr is not None:
                b = tl.load(b_ptr + index[:, None] * A_P + s[None, :], mask=a_ok, other=0.0)
                wb_at = e * WB_E + offset(s[:, None], WB_S, S) + offset(d[None, :], WB_D, D)
                wb = tl.load(wb_ptr + wb_at, mask=w_ok, other=0.0)
                acc = dot(b, wb, acc, PRECISION, UPCAST)
        out = slots[:, None] * WIDTH + column[None, :]
        tl.store(part_ptr + out, acc.to(part_ptr.dtype.element_ty), mask=row_ok[:, None] & d_ok[None, :])


@triton.jit(do_not_specialize=["N", "chunk"])
def combine_kernel(
    part_ptr,  # (P, WIDTH) by slot, contiguous
    experts_ptr,  # (N, K) contiguous
    weights_ptr,  # (N, K) contiguous or None
    bias_ptr,  # (D,) contiguous or None
    y_ptr,  # (N, D) contiguous
    N,
    chunk,
    K: tl.constexpr,
    E: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """y = sum over k of w_nk part[n, k] + bias in fp32, always in the order of k; one program per (BT tokens, BD)."""
    D_BLOCKS: tl.constexpr = (WIDTH + BD - 1) // BD
    n = (tl.program_id(0) // D_BLOCKS) * BT + tl.arange(0, BT)
    column = (tl.program_id(0) % D_BLOCKS) * BD + tl.arange(0, BD)
    d = chunk * WIDTH + column
    d_ok = (d < D) & (column < WIDTH)
    acc = tl.zeros((BT, BD), tl.float32)
    for k in range(K):
        slot = n.to(tl.int64) * K + k
        expert = tl.load(experts_ptr + slot, mask=n < N, other=-1)
        used = (expert >= 0) & (expert < E)
        # masked, not multiplied by zero: nobody wrote the part of an unused slot
        ok = used[:, None] & d_ok[None, :]
        part = tl.load(part_ptr + slot[:, None] * WIDTH + column[None, :], mask=ok, other=0.0).to(tl.float32)
        if weights_ptr is not None:
            part *= tl.load(weights_ptr + slot, mask=used, other=0.0).to(tl.float32)[:, None]
        acc += part
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + d, mask=d_ok, other=0.0).to(tl.float32)[None, :]
    out = n.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(y_ptr + out, acc.to(y_ptr.dtype.element_ty), mask=(n < N)[:, None] & d_ok[None, :])
