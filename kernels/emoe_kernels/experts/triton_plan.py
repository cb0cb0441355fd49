"""Routing on the device: a stable counting sort of the slots by expert, without host synchronisation.

Legend: N tokens, K slots per token, P = N * K slots, E experts, C chunks of the P slots.

`torch.bincount` waits for the device and a radix sort reads 64-bit keys several times; here one launch counts, one
cumulative sum turns counts into positions and one launch places. Ids outside -1 .. E - 1 are never used as an index.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import launch

CHUNK = 128  # slots per program; ranks within a chunk come from a CHUNK x CHUNK comparison


class Plan(NamedTuple):
    """Slots sorted by expert, in ascending order within an expert."""

    offsets_E1: Tensor
    """(E + 1,) int32: expert e owns rows offsets[e] : offsets[e + 1]."""
    slots_P: Tensor
    """(P,) int32: the slot n * K + k of each row. Unused slots are behind row offsets[E]."""


@triton.jit
def _keys(experts_ptr, P, E: tl.constexpr, CHUNK: tl.constexpr):
    """Slot numbers and keys of this chunk: the expert, E for unused slots, E + 1 for bad ids, E + 2 beyond the end."""
    p = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    ids = tl.load(experts_ptr + p, mask=p < P, other=-1)
    key = tl.where((ids >= 0) & (ids < E), ids, tl.where(ids == -1, E, E + 1)).to(tl.int32)
    return p, tl.where(p < P, key, E + 2)


@triton.jit(do_not_specialize=["P", "C"])
def plan_count_kernel(experts_ptr, counts_ptr, P, C, E: tl.constexpr, E_POW2: tl.constexpr, CHUNK: tl.constexpr):
    """counts[key, chunk] for keys 0 .. E + 1."""
    _, key = _keys(experts_ptr, P, E, CHUNK)
    counts = tl.histogram(key, E_POW2)
    e = tl.arange(0, E_POW2)
    tl.store(counts_ptr + e * C + tl.program_id(0), counts, mask=e < E + 2)


@triton.jit(do_not_specialize=["P", "C"])
def plan_place_kernel(
    experts_ptr, ends_ptr, offsets_ptr, slots_ptr, P, C, E: tl.constexpr, E_POW2: tl.constexpr, CHUNK: tl.constexpr
):
    """Each slot to its row. `ends` is the inclusive sum of the counts in (key, chunk) order."""
    chunk = tl.program_id(0)
    p, key = _keys(experts_ptr, P, E, CHUNK)
    i = tl.arange(0, CHUNK)
    rank = tl.sum(((key[:, None] == key[None, :]) & (i[None, :] < i[:, None])).to(tl.int32), 1)
    before = key * C + chunk - 1  # everything with a smaller key, and this key in earlier chunks
    base = tl.load(ends_ptr + before, mask=(before >= 0) & (p < P), other=0)
    tl.store(slots_ptr + base + rank, p, mask=p < P)

    if chunk == 0:
        e = tl.arange(0, E_POW2)
        start = tl.load(ends_ptr + e * C - 1, mask=(e > 0) & (e <= E), other=0)
        tl.store(offsets_ptr + e, start, mask=e <= E)


def make_plan(experts_NK: Tensor, num_experts: int) -> Plan:
    """The plan of (N, K) int32 or int64 ids.

    Ids outside -1 .. E - 1 fail a device-side assertion (`torch._assert_async`: an error at the next synchronisation,
    as for an embedding), and ValueError on the CPU. Until it fires they count as unused.
    """
    P, E = experts_NK.numel(), num_experts
    offsets = torch.empty(E + 1, dtype=torch.int32, device=experts_NK.device)
    slots = torch.empty(P, dtype=torch.int32, device=experts_NK.device)
    if P == 0:
        return Plan(offsets.zero_(), slots)
    flat = experts_NK.contiguous()
    chunks = triton.cdiv(P, CHUNK)
    counts = torch.empty((E + 2) * chunks, dtype=torch.int32, device=flat.device)
    constants = {"E": E, "E_POW2": max(16, triton.next_power_of_2(E + 3)), "CHUNK": CHUNK}
    launch(plan_count_kernel, chunks, (flat, counts, P, chunks), constants, warps=4)
    ends = counts.cumsum(0, dtype=torch.int32)
    no_bad_ids = ends[(E + 1) * chunks - 1] == P
    message = f"experts_NK holds ids outside -1 .. {E - 1} (num_experts={E})"
    if flat.device.type == "cpu":
        if not no_bad_ids:
            raise ValueError(message)
    else:
        torch._assert_async(no_bad_ids, message)
    launch(plan_place_kernel, chunks, (flat, ends, offsets, slots, P, chunks), constants, warps=8)
    return Plan(offsets, slots)
