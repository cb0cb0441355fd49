"""What the Triton kernels share: activations, the block lookup, the dot product.

Legend: N tokens, K slots per token, P = N * K slots, E experts, S neurons per expert, D model width.
Kernels see the slots sorted by expert: row r stands for slot slots[r] = n * K + k, and expert e owns rows
offsets[e] : offsets[e + 1]. Slots that are unused come last, behind offsets[E], and belong to nobody.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether TRITON_INTERPRET=1 was set when this was imported: kernels then run in NumPy, on CPU tensors."""

ACTIVATION_IDS = {"none": 0, "silu": 1, "gelu": 2, "gelu_tanh": 3, "quick_gelu": 4, "relu": 5, "relu_squared": 6}
"""Activation names as the integers kernels are specialised on; "none" is the identity of the grouped linears."""


@triton.jit
def activate(x, ACT: tl.constexpr):
    """act(x) in fp32, NaN where x is NaN."""
    if ACT == 1:
        y = x * tl.sigmoid(x)
    elif ACT == 2:
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == 3:  # 0.5 (1 + tanh z) = sigmoid(2 z); z = sqrt(2 / pi) (x + 0.044715 x^3)
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACT == 4:
        y = x * tl.sigmoid(1.702 * x)
    elif ACT == 5:
        y = tl.where(x <= 0.0, 0.0, x)  # not maximum(x, 0): that drops a NaN
    elif ACT == 6:
        r = tl.where(x <= 0.0, 0.0, x)
        y = r * r
    else:
        y = x
    return y


@triton.jit
def activate_slope(x, ACT: tl.constexpr):
    """act'(x) in fp32; 0 at the kink of the ReLUs, as in torch."""
    if ACT == 1:
        s = tl.sigmoid(x)
        y = s * (1.0 + x * (1.0 - s))
    elif ACT == 2:
        y = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACT == 3:
        s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        y = s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    elif ACT == 4:
        s = tl.sigmoid(1.702 * x)
        y = s * (1.0 + 1.702 * x * (1.0 - s))
    elif ACT == 5:
        y = tl.where(x <= 0.0, 0.0, 1.0)
    elif ACT == 6:
        y = tl.where(x <= 0.0, 0.0, 2.0 * x)
    else:
        y = tl.full(x.shape, 1.0, tl.float32)
    return y


@triton.jit
def find_block(offsets_ptr, block, E: tl.constexpr, E_POW2: tl.constexpr, BM: tl.constexpr):
    """The `block`-th piece of at most BM rows that lie within one expert.

    Returns:
        (expert, first row, row after the expert's last); expert >= E if there are fewer pieces than that. The grid is
        sized by an upper bound, since the counts never reach the host.
    """
    e = tl.arange(0, E_POW2)
    starts = tl.load(offsets_ptr + e, mask=e < E, other=0)
    ends = tl.load(offsets_ptr + e + 1, mask=e < E, other=0)
    pieces = (ends - starts + BM - 1) // BM
    expert = tl.sum((tl.cumsum(pieces, 0) <= block).to(tl.int32), 0)
    before = tl.sum(tl.where(e < expert, pieces, 0), 0)
    in_range = expert < E
    first = tl.load(offsets_ptr + expert, mask=in_range, other=0) + (block - before) * BM
    end = tl.load(offsets_ptr + expert + 1, mask=in_range, other=0)
    return expert, first, end


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + a @ b with fp32 accumulation. UPCAST: the interpreter multiplies bf16 as if it were integers."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def offset(index, STRIDE: tl.constexpr, SIZE: tl.constexpr):
    """index * STRIDE for index < SIZE, in 64 bits where it may need them: dense matrices may hold 2**31 entries."""
    if SIZE * STRIDE > 2147483647:
        index = index.to(tl.int64)
    return index * STRIDE
