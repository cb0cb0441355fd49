"""Stick-breaking attention in PyTorch alone, in log space: strips of queries, recomputed in the backward pass.

Legend: B batch, H query heads, G key heads, S = H / G query heads a key head, T queries, L keys, A width of a head,
t queries of one strip, l keys that the last of them sees.

With z the logits, log(1 - sigmoid(z)) = logsigmoid(-z), and the stick that reaches key j is a sum over the keys to its
right: log weights_j = z_j + sum over m >= j of logsigmoid(-z_m). Derivatives: see kernels/README.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid

from ..experts.portable import wide_dtype, without_autocast

_STRIP_ELEMENTS = 1 << 20
"""Logits of one strip: a handful of buffers of 4 MiB. A strip holds one query at least, so memory grows with B H L."""


def _log_sticks(logits: Tensor) -> Tensor:
    """(..., l): logarithm of what key j and those to its right leave of the stick."""
    return logsigmoid(-logits).flip(-1).cumsum(-1).flip(-1)


def dense(
    q_BHTA: Tensor,
    k_BGLA: Tensor,
    v_BGLA: Tensor,
    key_mask_BL: Tensor | None,
    attend_current: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y_BHTA, remainder_BHT, weights_BHTL), all at once and differentiated by torch: for who wants the weights."""
    dtype, wide = q_BHTA.dtype, wide_dtype(q_BHTA.dtype)
    (B, H, T, A), (G, L) = q_BHTA.shape, k_BGLA.shape[1:3]
    with without_autocast(q_BHTA.device.type):
        q_BSGTA = q_BHTA.to(wide).view(B, H // G, G, T, A)
        logits = q_BSGTA @ k_BGLA.to(wide).mT.unsqueeze(1) * scale
        logits = logits.masked_fill(~_visible(0, T, T, L, key_mask_BL, attend_current, q_BHTA.device), -torch.inf)
        logs = _log_sticks(logits)
        weights_BSGTL = torch.exp(logits + logs)
        y_BHTA = (weights_BSGTL @ v_BGLA.to(wide).unsqueeze(1)).flatten(1, 2)
        remainder = torch.exp(logs[..., 0]).flatten(1, 2)
        return y_BHTA.to(dtype), remainder.to(dtype), weights_BSGTL.flatten(1, 2).to(dtype)


def _visible(
    start: int, stop: int, T: int, L: int, key_mask_BL: Tensor | None, attend_current: bool, device: torch.device
) -> Tensor:
    """(t, l), or (B, 1, 1, t, l) with a mask: what the queries start : stop see of the first l = L - T + stop keys."""
    last = L - T + stop
    positions_t1 = torch.arange(L - T + start, last, device=device).unsqueeze(1)
    keys_l = torch.arange(last, device=device)
    visible = keys_l <= positions_t1 if attend_current else keys_l < positions_t1
    return visible if key_mask_BL is None else visible & key_mask_BL[:, None, None, None, :last]


class _Strip(NamedTuple):
    """Some queries, as rows (S t) of a matrix a key head."""

    rows: slice
    """Of T."""
    keys: slice
    """Of L: those that the last query sees, and no more."""
    visible: Tensor


def _strips(q: Tensor, k: Tensor, key_mask_BL: Tensor | None, attend_current: bool) -> Iterator[_Strip]:
    (B, H, T), L = q.shape[:3], k.shape[2]
    height = max(1, _STRIP_ELEMENTS // max(1, B * H * L))
    for start in range(0, T, height):
        stop = min(T, start + height)
        visible = _visible(start, stop, T, L, key_mask_BL, attend_current, q.device)
        yield _Strip(slice(start, stop), slice(0, L - T + stop), visible)


def _as_rows(x_BHT: Tensor, rows: slice, G: int, dtype: torch.dtype) -> Tensor:
    """(B, H, T, ...) to (B, G, S t, ...): the rows that share a key head, so that one GEMM serves them."""
    shared = x_BHT.shape[1] // G
    return x_BHT[:, :, rows].to(dtype).unflatten(1, (shared, G)).transpose(1, 2).flatten(2, 3)


def _as_heads(x_BGR: Tensor, S: int) -> Tensor:
    """The way back: (B, G, S t, ...) to (B, H, t, ...)."""
    return x_BGR.unflatten(2, (S, x_BGR.shape[2] // S)).transpose(1, 2).flatten(1, 2)


def _logits(q_BGRA: Tensor, k_BGlA: Tensor, visible: Tensor, scale: float) -> Tensor:
    """(B, G, S t, l), minus infinity where a query does not see a key."""
    logits = (q_BGRA @ k_BGlA.mT).mul_(scale)
    t = visible.shape[-2]
    logits.unflatten(2, (logits.shape[2] // t, t)).masked_fill_(~visible, -torch.inf)
    return logits


class _StickBreaking(torch.autograd.Function):
    """Keeps its arguments, and recomputes logits and weights."""

    @staticmethod
    def forward(ctx, q, k, v, key_mask, attend_current, scale):
        ctx.save_for_backward(q, k, v, key_mask)
        ctx.options = attend_current, scale
        G, S, wide = k.shape[1], q.shape[1] // k.shape[1], wide_dtype(q.dtype)
        k, v = k.to(wide), v.to(wide)
        y = q.new_empty(q.shape)
        remainder = q.new_empty(q.shape[:3])
        for strip in _strips(q, k, key_mask, attend_current):
            logits = _logits(_as_rows(q, strip.rows, G, wide), k[:, :, strip.keys], strip.visible, scale)
            logs = _log_sticks(logits)
            weights = logits.add_(logs).exp_()
            y[:, :, strip.rows] = _as_heads(weights @ v[:, :, strip.keys], S)
            remainder[:, :, strip.rows] = _as_heads(logs[..., 0].exp(), S)
        return y, remainder

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dremainder):
        q, k, v, key_mask = ctx.saved_tensors
        attend_current, scale = ctx.options
        G, S, dtype, wide = k.shape[1], q.shape[1] // k.shape[1], q.dtype, wide_dtype(q.dtype)
        k, v = k.to(wide), v.to(wide)
        dq = q.new_empty(q.shape)
        dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (k, v))
        with without_autocast(q.device.type):
            for strip in _strips(q, k, key_mask, attend_current):
                q_rows, dy_rows = _as_rows(q, strip.rows, G, wide), _as_rows(dy, strip.rows, G, wide)
                k_keys, v_keys = k[:, :, strip.keys], v[:, :, strip.keys]
                logits = _logits(q_rows, k_keys, strip.visible, scale)
                logs = _log_sticks(logits)
                taken = torch.sigmoid(logits)
                weights = logits.add_(logs).exp_()
                dv[:, :, strip.keys] += weights.mT @ dy_rows
                dlog = weights.mul_(dy_rows @ v_keys.mT)  # of the logarithms of the weights
                dstick = _as_rows(dremainder, strip.rows, G, wide) * logs[..., 0].exp()
                dlogits = dlog - taken.mul_(dlog.cumsum(-1).add_(dstick.unsqueeze(-1)))
                dlogits.mul_(scale)
                dq[:, :, strip.rows] = _as_heads(dlogits @ k_keys, S)
                dk[:, :, strip.keys] += dlogits.mT @ q_rows
        return dq, dk.to(dtype), dv.to(dtype), None, None, None


def stick_breaking_attention(
    q_BHTA: Tensor,
    k_BGLA: Tensor,
    v_BGLA: Tensor,
    key_mask_BL: Tensor | None,
    attend_current: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(y_BHTA, remainder_BHT) of `emoe_kernels.stickbreaking`, for tensors of any strides."""
    with without_autocast(q_BHTA.device.type):
        return _StickBreaking.apply(q_BHTA, k_BGLA, v_BGLA, key_mask_BL, attend_current, scale)
