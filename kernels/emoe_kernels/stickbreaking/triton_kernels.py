"""Triton kernels of stick-breaking attention: sticks broken block by block from the right, gradients without atomics.

Legend: B batch, H query heads, G key heads, S = H / G query heads a key head, T queries, L keys, A width of a head.

A launch computes `GN` key heads from `g0` of some sequences; a program finds its own in `place`. Logits are base 2, as
`exp2` and `log2` are what a GPU has: with z of that kind, log2(1 - sigmoid) = -max(z, 0) - l and log2 sigmoid =
min(z, 0) - l, where l = log2(1 + 2^-|z|), and the logarithm of the stick that reaches a key is minus the sum of
max(z, 0) + l over the keys to its right. `carry` is that sum over whole blocks to the right.

Widths. A tile of queries or keys is WIDTH columns wide. Where A is more, logits are summed over pieces of it, and every
piece of a result is a program of its own that computes the logits again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..experts.triton_common import dot


@triton.jit
def place(index, g0, G: tl.constexpr, GN: tl.constexpr, S: tl.constexpr):
    """(sequence, query head, key head) of the `index`-th head of a launch, in 64 bits: they multiply strides."""
    b = index // (S * GN)
    g = g0 + index % GN
    h = index // GN % S * G + g
    return b.to(tl.int64), h.to(tl.int64), g.to(tl.int64)


@triton.jit
def load_tile(ptr, rows, stride, ok, start, A: tl.constexpr, WIDTH: tl.constexpr):
    """Columns start : start + WIDTH of some rows; zeros where there are none."""
    a = start + tl.arange(0, WIDTH)
    at = ptr + rows.to(tl.int64)[:, None] * stride + a[None, :]
    return tl.load(at, mask=ok[:, None] & (a < A)[None, :], other=0.0)


@triton.jit
def store_tile(ptr, rows, ok, start, tile, A: tl.constexpr, WIDTH: tl.constexpr):
    """Into rows of a contiguous matrix."""
    a = start + tl.arange(0, WIDTH)
    at = ptr + rows.to(tl.int64)[:, None] * A + a[None, :]
    tl.store(at, tile.to(ptr.dtype.element_ty), mask=ok[:, None] & (a < A)[None, :])


@triton.jit
def products(
    first_a, a_ptr, a_rows, a_stride, a_ok,
    first_b, b_ptr, b_rows, b_stride, b_ok,
    A: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """a b^T of whole rows in fp32; their first WIDTH columns have been loaded."""
    acc = tl.zeros((first_a.shape[0], first_b.shape[0]), tl.float32)
    acc = dot(first_a, tl.trans(first_b), acc, PRECISION, UPCAST)
    for start in range(WIDTH, A, WIDTH):
        a = load_tile(a_ptr, a_rows, a_stride, a_ok, start, A, WIDTH)
        b = load_tile(b_ptr, b_rows, b_stride, b_ok, start, A, WIDTH)
        acc = dot(a, tl.trans(b), acc, PRECISION, UPCAST)
    return acc


@triton.jit
def visible_keys(mask_ptr, b, rows, row_ok, keys, T, L, CURRENT: tl.constexpr):
    """(rows, keys): what a query sees. It stands at L - T + row."""
    key_ok = keys < L
    if mask_ptr is not None:
        key_ok = key_ok & (tl.load(mask_ptr + b * L + keys, mask=key_ok, other=0) != 0)
    last = L - T + rows
    if not CURRENT:
        last = last - 1
    return row_ok[:, None] & key_ok[None, :] & (keys[None, :] <= last[:, None])


@triton.jit
def break_sticks(z, visible, carry):
    """(weights, logarithm of what each key leaves of its stick, with the sign changed), zeros where not visible."""
    soft = tl.log2(1.0 + tl.exp2(-tl.abs(z)))
    spent = tl.where(visible, tl.maximum(z, 0.0) + soft, 0.0)
    right = tl.cumsum(spent, 1, reverse=True) - spent
    weights = tl.where(visible, tl.exp2(tl.minimum(z, 0.0) - soft - right - carry[:, None]), 0.0)
    return weights, spent


@triton.jit
def weigh(
    q, q_ptr, rows, q_t, row_ok,
    k, k_ptr, keys, k_l,
    mask_ptr, b, carry, T, L,
    A: tl.constexpr, SCALE: tl.constexpr, CURRENT: tl.constexpr,
    WIDTH: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """(z, visible, weights, spent) of a tile of queries and one of keys, the same in all kernels; see `products`."""
    visible = visible_keys(mask_ptr, b, rows, row_ok, keys, T, L, CURRENT)
    z = products(q, q_ptr, rows, q_t, row_ok, k, k_ptr, keys, k_l, keys < L, A, WIDTH, PRECISION, UPCAST) * SCALE
    weights, spent = break_sticks(z, visible, carry)
    return z, visible, weights, spent


@triton.jit
def query_tile(T, BM: tl.constexpr, PIECES: tl.constexpr):
    """(piece of the width, tile of queries, head of the launch) of a program; tiles with most keys come first."""
    tiles = tl.cdiv(T, BM)
    piece = tl.program_id(0) % PIECES
    tile = tiles - 1 - tl.program_id(0) // PIECES % tiles
    return piece, tile, tl.program_id(0) // PIECES // tiles


@triton.jit
def dlogits(z, dlog, visible, before):
    """The derivative by z from that by the logarithms of the weights; `before`: the sum over all keys to the left."""
    taken = tl.exp2(tl.minimum(z, 0.0) - tl.log2(1.0 + tl.exp2(-tl.abs(z))))
    return tl.where(visible, dlog - taken * (tl.cumsum(dlog, 1) + before[:, None]), 0.0)


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr,  # (B, H, T, A), (B, G, L, A) twice; the last dimension adjacent
    mask_ptr,  # (B, L) bytes or None
    y_ptr, remainder_ptr,  # (B, H, T, A) and (B, H, T) contiguous; or None: only the carries are wanted
    carry_ptr,  # (heads of the launch, blocks of keys, T) fp32 or None
    T, L, g0,
    q_b, q_h, q_t, k_b, k_g, k_l, v_b, v_g, v_l,
    H: tl.constexpr, G: tl.constexpr, GN: tl.constexpr, A: tl.constexpr, SCALE: tl.constexpr, CURRENT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """y and what is left of the sticks; one program a (head, BM queries, WIDTH columns)."""
    PIECES: tl.constexpr = (A + WIDTH - 1) // WIDTH if y_ptr is not None else 1
    piece, tile, index = query_tile(T, BM, PIECES)
    b, h, g = place(index, g0, G, GN, H // G)
    q_ptr += b * q_b + h * q_h
    k_ptr += b * k_b + g * k_g
    rows = tile * BM + tl.arange(0, BM)
    row_ok = rows < T
    q = load_tile(q_ptr, rows, q_t, row_ok, 0, A, WIDTH)
    carry = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, WIDTH), tl.float32)
    blocks = tl.cdiv(L - T + tl.minimum(T, tile * BM + BM), BN)
    for i in range(0, blocks):
        block = blocks - 1 - i
        keys = block * BN + tl.arange(0, BN)
        k = load_tile(k_ptr, keys, k_l, keys < L, 0, A, WIDTH)
        _, _, weights, spent = weigh(
            q, q_ptr, rows, q_t, row_ok, k, k_ptr, keys, k_l, mask_ptr, b, carry, T, L,
            A, SCALE, CURRENT, WIDTH, PRECISION, UPCAST,
        )  # fmt: skip
        if carry_ptr is not None:
            at = (index.to(tl.int64) * tl.cdiv(L, BN) + block) * T + rows
            tl.store(carry_ptr + at, carry, mask=row_ok)
        if y_ptr is not None:
            v = load_tile(v_ptr + b * v_b + g * v_g, keys, v_l, keys < L, piece * WIDTH, A, WIDTH)
            acc = dot(weights.to(v.dtype), v, acc, PRECISION, UPCAST)
        carry += tl.sum(spent, 1)
    if y_ptr is not None:
        row0 = (b * H + h) * T
        store_tile(y_ptr, row0 + rows, row_ok, piece * WIDTH, acc, A, WIDTH)
        if piece == 0:
            left = tl.exp2(-carry).to(remainder_ptr.dtype.element_ty)
            tl.store(remainder_ptr + row0 + rows, left, mask=row_ok)


@triton.jit
def grad_query_kernel(
    dy_ptr, dremainder_ptr,  # (B, H, T, A) and (B, H, T), contiguous
    q_ptr, k_ptr, v_ptr, mask_ptr,  # as above
    carry_ptr,  # as above; read
    before_ptr,  # like it; written: the sum of g w over the keys left of a block, plus that of the remainder
    dq_ptr,  # (B, H, T, A) contiguous
    T, L, g0,
    q_b, q_h, q_t, k_b, k_g, k_l, v_b, v_g, v_l,
    H: tl.constexpr, G: tl.constexpr, GN: tl.constexpr, A: tl.constexpr, SCALE: tl.constexpr, CURRENT: tl.constexpr,
    FACTOR: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dq; one program a (head, BM queries, WIDTH columns), block by block from the left. SCALE is of base 2."""
    PIECES: tl.constexpr = (A + WIDTH - 1) // WIDTH
    piece, tile, index = query_tile(T, BM, PIECES)
    b, h, g = place(index, g0, G, GN, H // G)
    row0 = (b * H + h) * T
    q_ptr += b * q_b + h * q_h
    dy_ptr += row0 * A
    k_ptr += b * k_b + g * k_g
    v_ptr += b * v_b + g * v_g
    rows = tile * BM + tl.arange(0, BM)
    row_ok = rows < T
    q = load_tile(q_ptr, rows, q_t, row_ok, 0, A, WIDTH)
    dy = load_tile(dy_ptr, rows, A, row_ok, 0, A, WIDTH)
    before = tl.load(dremainder_ptr + row0 + rows, mask=row_ok, other=0.0).to(tl.float32)
    acc = tl.zeros((BM, WIDTH), tl.float32)
    blocks = tl.cdiv(L - T + tl.minimum(T, tile * BM + BM), BN)
    for block in range(0, blocks):
        keys = block * BN + tl.arange(0, BN)
        key_ok = keys < L
        k = load_tile(k_ptr, keys, k_l, key_ok, 0, A, WIDTH)
        v = load_tile(v_ptr, keys, v_l, key_ok, 0, A, WIDTH)
        slope = products(dy, dy_ptr, rows, A, row_ok, v, v_ptr, keys, v_l, key_ok, A, WIDTH, PRECISION, UPCAST)
        at = (index.to(tl.int64) * tl.cdiv(L, BN) + block) * T + rows
        carry = tl.load(carry_ptr + at, mask=row_ok, other=0.0)
        z, visible, weights, spent = weigh(
            q, q_ptr, rows, q_t, row_ok, k, k_ptr, keys, k_l, mask_ptr, b, carry, T, L,
            A, SCALE, CURRENT, WIDTH, PRECISION, UPCAST,
        )  # fmt: skip
        if block == 0:  # here all that was spent is known
            before *= tl.exp2(-carry - tl.sum(spent, 1))
        if piece == 0:
            tl.store(before_ptr + at, before, mask=row_ok)
        dlog = weights * slope
        dz = dlogits(z, dlog, visible, before)
        if PIECES > 1:
            k = load_tile(k_ptr, keys, k_l, key_ok, piece * WIDTH, A, WIDTH)
        acc = dot(dz.to(k.dtype), k, acc, PRECISION, UPCAST)
        before += tl.sum(dlog, 1)
    store_tile(dq_ptr, row0 + rows, row_ok, piece * WIDTH, acc * FACTOR, A, WIDTH)


@triton.jit
def grad_key_kernel(
    dy_ptr, q_ptr, k_ptr, v_ptr, mask_ptr, carry_ptr, before_ptr,  # as above; all are read
    dk_ptr, dv_ptr,  # (B, G, L, A) contiguous
    T, L, g0,
    q_b, q_h, q_t, k_b, k_g, k_l, v_b, v_g, v_l,
    H: tl.constexpr, G: tl.constexpr, GN: tl.constexpr, A: tl.constexpr, SCALE: tl.constexpr, CURRENT: tl.constexpr,
    FACTOR: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dk and dv; one program a (key head, BN keys, WIDTH columns) goes through all queries that see them."""
    PIECES: tl.constexpr = (A + WIDTH - 1) // WIDTH
    S: tl.constexpr = H // G
    blocks = tl.cdiv(L, BN)
    piece = tl.program_id(0) % PIECES
    block = tl.program_id(0) // PIECES % blocks
    b32 = tl.program_id(0) // PIECES // blocks // GN
    gi = tl.program_id(0) // PIECES // blocks % GN
    b, g = b32.to(tl.int64), (g0 + gi).to(tl.int64)
    k_ptr += b * k_b + g * k_g
    v_ptr += b * v_b + g * v_g
    keys = block * BN + tl.arange(0, BN)
    key_ok = keys < L
    k = load_tile(k_ptr, keys, k_l, key_ok, 0, A, WIDTH)
    v = load_tile(v_ptr, keys, v_l, key_ok, 0, A, WIDTH)
    dk = tl.zeros((BN, WIDTH), tl.float32)
    dv = tl.zeros((BN, WIDTH), tl.float32)
    first = tl.maximum(0, block * BN - (L - T)) // BM
    for s in range(0, S):
        h = s * G + g
        index = (b32 * S + s) * GN + gi
        q_head = q_ptr + b * q_b + h * q_h
        dy_head = dy_ptr + (b * H + h) * T * A
        for tile in range(first, tl.cdiv(T, BM)):
            rows = tile * BM + tl.arange(0, BM)
            row_ok = rows < T
            q = load_tile(q_head, rows, q_t, row_ok, 0, A, WIDTH)
            dy = load_tile(dy_head, rows, A, row_ok, 0, A, WIDTH)
            slope = products(dy, dy_head, rows, A, row_ok, v, v_ptr, keys, v_l, key_ok, A, WIDTH, PRECISION, UPCAST)
            at = (index.to(tl.int64) * blocks + block) * T + rows
            # rows that do not see the block may have been written by nobody: `visible` keeps them out
            carry = tl.load(carry_ptr + at, mask=row_ok, other=0.0)
            before = tl.load(before_ptr + at, mask=row_ok, other=0.0)
            z, visible, weights, _ = weigh(
                q, q_head, rows, q_t, row_ok, k, k_ptr, keys, k_l, mask_ptr, b, carry, T, L,
                A, SCALE, CURRENT, WIDTH, PRECISION, UPCAST,
            )  # fmt: skip
            dz = dlogits(z, weights * slope, visible, before)
            if PIECES > 1:
                q = load_tile(q_head, rows, q_t, row_ok, piece * WIDTH, A, WIDTH)
                dy = load_tile(dy_head, rows, A, row_ok, piece * WIDTH, A, WIDTH)
            dv = dot(tl.trans(weights.to(dy.dtype)), dy, dv, PRECISION, UPCAST)
            dk = dot(tl.trans(dz.to(q.dtype)), q, dk, PRECISION, UPCAST)
    row0 = (b * G + g) * L
    store_tile(dk_ptr, row0 + keys, key_ok, piece * WIDTH, dk * FACTOR, A, WIDTH)
    store_tile(dv_ptr, row0 + keys, key_ok, piece * WIDTH, dv, A, WIDTH)
