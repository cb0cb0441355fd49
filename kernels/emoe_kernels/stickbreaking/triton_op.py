"""Stick-breaking attention on Triton: tiles, launches and the ops that torch.compile sees.

Legend: B batch, H query heads, G key heads, S = H / G query heads a key head, T queries, L keys, A width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.library import custom_op

from ..experts import triton_configs
from ..experts.triton_common import INTERPRETING
from ..experts.triton_launch import check_device, launch
from ..experts.triton_op import supports as supports_experts
from .triton_kernels import forward_kernel, grad_key_kernel, grad_query_kernel

CARRY_BYTES = 32 * 2**20
"""What a backward pass may spend on carries, 8 / BN bytes a logit: it takes heads in turns. One head is the least."""


class Tile(NamedTuple):
    bm: int
    """Queries."""
    bn: int
    """Keys. All kernels of an arithmetic have the same: carries are by block."""
    width: int
    """Most columns of A."""
    warps: int
    stages: int


# Nobody has timed these on a GPU. They come from the resources they take (triton_report.py): no spilled register, and
# shared memory within 99 KiB, so that sm86 and sm89 can use them.
TILES: dict[str, dict[str, tuple[Tile, ...]]] = {
    "half": {
        "forward": (Tile(64, 32, 128, 8, 2),),
        "grad_query": (Tile(32, 32, 64, 4, 1), Tile(32, 32, 128, 8, 2)),
        "grad_key": (Tile(32, 32, 64, 4, 2), Tile(32, 32, 128, 8, 1)),
    },
    "tf32": {
        "forward": (Tile(64, 32, 64, 4, 2),),
        "grad_query": (Tile(32, 32, 64, 8, 2),),
        "grad_key": (Tile(32, 32, 64, 4, 1),),
    },
    "ieee": {
        "forward": (Tile(32, 32, 32, 4, 2),),
        "grad_query": (Tile(32, 32, 32, 8, 2),),
        "grad_key": (Tile(32, 32, 32, 4, 2),),
    },
}
"""Arithmetic (`experts.triton_configs.arithmetic`) to kernel to tiles, the narrowest that holds A before wider ones."""

_PRECISION = {"half": None, "tf32": "tf32", "ieee": "ieee"}


def supports(q_BHTA: Tensor, k_BGLA: Tensor, v_BGLA: Tensor) -> str | None:
    """None if the kernels take these tensors, otherwise the reason."""
    return supports_experts(q_BHTA)


def _adjacent(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


class _Call(NamedTuple):
    """The arguments of an op, ready for kernels."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    """(B, L) bytes."""
    current: bool
    scale: float

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, current: bool, scale: float) -> _Call:
        (B, H, _, A), (G, L) = q.shape, k.shape[1:3]
        for name, x in (("k_BGLA", k), ("v_BGLA", v)):
            if x.shape != (B, G, L, A) or x.dtype != q.dtype or x.device != q.device:
                raise ValueError(f"{name} is {x.dtype} {tuple(x.shape)} on {x.device}, which does not fit q_BHTA")
        if H % G or q.shape[2] > L or (key_mask is not None and key_mask.shape != (B, L)):
            raise ValueError(f"q_BHTA {tuple(q.shape)} and key_mask_BL do not fit k_BGLA {tuple(k.shape)}")
        if reason := supports(q, k, v):
            raise ValueError(reason)
        check_device(q.device)
        mask = None if key_mask is None else key_mask.contiguous().view(torch.uint8)
        return cls(_adjacent(q), _adjacent(k), _adjacent(v), mask, current, scale)

    def part(self, sequences: slice) -> _Call:
        mask = None if self.mask is None else self.mask[sequences]
        return self._replace(q=self.q[sequences], k=self.k[sequences], v=self.v[sequences], mask=mask)

    @property
    def kind(self) -> str:
        return triton_configs.arithmetic(self.q.dtype)

    def tile(self, name: str) -> Tile:
        tiles, A = TILES[self.kind][name], self.q.shape[3]
        return next((tile for tile in tiles if tile.width >= A), tiles[-1])

    def launch(self, name: str, kernel, heads: int, blocks: int, pointers: tuple, g0: int, key_heads: int, **more):
        """`heads` heads of `blocks` tiles, in as many pieces as A has."""
        (_, H, T, A), (_, G, L, _), tile = self.q.shape, self.k.shape, self.tile(name)
        width = min(tile.width, max(16, triton.next_power_of_2(A)))
        pieces = more.pop("pieces", triton.cdiv(A, width))
        strides = (*self.q.stride()[:3], *self.k.stride()[:3], *self.v.stride()[:3])
        constants = {"H": H, "G": G, "GN": key_heads, "A": A, "SCALE": self.scale * math.log2(math.e)}
        constants |= {"CURRENT": self.current, "BM": tile.bm, "BN": tile.bn, "WIDTH": width}
        constants |= {"PRECISION": _PRECISION[self.kind], "UPCAST": INTERPRETING and self.q.dtype == torch.bfloat16}
        args = (*pointers, T, L, g0, *strides)
        launch(kernel, heads * blocks * pieces, args, constants | more, warps=tile.warps, stages=tile.stages)


def forward(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, current: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """(y, remainder), without autograd."""
    call = _Call.of(q, k, v, key_mask, current, scale)
    y, remainder = q.new_empty(q.shape), q.new_empty(q.shape[:3])
    (B, H, T, _), G = q.shape, k.shape[1]
    tiles = triton.cdiv(T, call.tile("forward").bm)
    pointers = (call.q, call.k, call.v, call.mask, y, remainder, None)
    call.launch("forward", forward_kernel, B * H, tiles, pointers, 0, G)
    return y, remainder


def _turns(B: int, G: int, head_bytes: int) -> Iterator[tuple[slice, int, int]]:
    """(sequences, first key head, key heads) so that carries fit into `CARRY_BYTES`; a key head's take `head_bytes`."""
    fit = max(1, CARRY_BYTES // max(1, head_bytes))
    if fit >= G:
        for b in range(0, B, fit // G):
            yield slice(b, min(B, b + fit // G)), 0, G
    else:
        for b in range(B):
            for g in range(0, G, fit):
                yield slice(b, b + 1), g, min(fit, G - g)


def backward(
    dy: Tensor,
    dremainder: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    current: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv): carries from the right, then dq from the left, which leaves what dk and dv need."""
    whole = _Call.of(q, k, v, key_mask, current, scale)
    (B, H, T), (G, L) = q.shape[:3], k.shape[1:3]
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    dy, dremainder = dy.contiguous(), dremainder.contiguous()
    blocks, S = triton.cdiv(L, whole.tile("forward").bn), H // G
    for b, g0, key_heads in _turns(B, G, 8 * S * blocks * T):
        call = whole.part(b)
        n = call.q.shape[0]
        carry, before = q.new_empty(2, n * S * key_heads, blocks, T, dtype=torch.float32).unbind()
        inputs = (call.q, call.k, call.v, call.mask)
        heads, tiles = n * S * key_heads, triton.cdiv(T, call.tile("forward").bm)
        call.launch("forward", forward_kernel, heads, tiles, (*inputs, None, None, carry), g0, key_heads, pieces=1)
        pointers = (dy[b], dremainder[b], *inputs, carry, before, dq[b])
        tiles = triton.cdiv(T, call.tile("grad_query").bm)
        call.launch("grad_query", grad_query_kernel, heads, tiles, pointers, g0, key_heads, FACTOR=scale)
        pointers = (dy[b], *inputs, carry, before, dk[b], dv[b])
        call.launch("grad_key", grad_key_kernel, n * key_heads, blocks, pointers, g0, key_heads, FACTOR=scale)
    return dq, dk, dv


@custom_op("emoe_kernels::triton_stick_breaking", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, attend_current: bool, scale: float
) -> tuple[Tensor, Tensor]:
    return forward(q, k, v, key_mask, attend_current, scale)


@_forward.register_fake
def _(q, k, v, key_mask, attend_current, scale):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3])


@custom_op("emoe_kernels::triton_stick_breaking_backward", mutates_args=())
def _backward(
    dy: Tensor,
    dremainder: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    attend_current: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return backward(dy, dremainder, q, k, v, key_mask, attend_current, scale)


@_backward.register_fake
def _(dy, dremainder, q, k, v, key_mask, attend_current, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx, inputs, output) -> None:
    *tensors, attend_current, scale = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = attend_current, scale


def _grad(ctx, dy, dremainder):
    return *_backward(dy, dremainder, *ctx.saved_tensors, *ctx.options), None, None, None


_forward.register_autograd(_grad, setup_context=_setup)


def stick_breaking_attention(
    q_BHTA: Tensor,
    k_BGLA: Tensor,
    v_BGLA: Tensor,
    key_mask_BL: Tensor | None,
    attend_current: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(y_BHTA, remainder_BHT) of `emoe_kernels.stickbreaking`, for tensors that `supports` has passed.

    Sums are fp32; weights and gradients of logits are rounded once to the dtype of the queries, as operands of a
    product. No atomics: two runs give the same bits. Has no second derivative.
    """
    return _forward(q_BHTA, k_BGLA, v_BGLA, key_mask_BL, attend_current, scale)
