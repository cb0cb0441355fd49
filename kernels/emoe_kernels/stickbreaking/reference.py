"""Stick-breaking attention, the equation: every logit takes a fraction of what the keys to its right have left.

Legend: B batch, H query heads, G key heads, T queries, L keys, A width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor


def visible_keys(T: int, L: int, key_mask_BL: Tensor | None, attend_current: bool, device: torch.device) -> Tensor:
    """Which keys a query may see: bool, (1, 1, T, L), or (B, 1, T, L) with a mask. Query t stands at L - T + t."""
    position_T1 = torch.arange(L - T, L, device=device).unsqueeze(1)
    key_L = torch.arange(L, device=device)
    visible_TL = key_L <= position_T1 if attend_current else key_L < position_T1
    visible = visible_TL[None, None]
    return visible if key_mask_BL is None else visible & key_mask_BL[:, None, None, :]


def stick_breaking_attention(
    q_BHTA: Tensor,
    k_BGLA: Tensor,
    v_BGLA: Tensor,
    key_mask_BL: Tensor | None,
    attend_current: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y_BHTA, remainder_BHT, weights_BHTL) of `emoe_kernels.stickbreaking`, differentiated by torch.

    The product is taken as it is written, in fp32 at least.
    """
    dtype, wide = q_BHTA.dtype, torch.promote_types(q_BHTA.dtype, torch.float32)
    with torch.autocast(q_BHTA.device.type, enabled=False):
        shared = q_BHTA.shape[1] // k_BGLA.shape[1]
        q, k, v = q_BHTA.to(wide), k_BGLA.to(wide).repeat(1, shared, 1, 1), v_BGLA.to(wide).repeat(1, shared, 1, 1)
        visible = visible_keys(q.shape[2], k.shape[2], key_mask_BL, attend_current, q.device)
        logits_BHTL = (q @ k.mT * scale).masked_fill(~visible, -torch.inf)

        taken_BHTL = torch.sigmoid(logits_BHTL)
        left_BHTL = (1 - taken_BHTL).flip(3).cumprod(3).flip(3)  # of the stick, after key j and those to its right
        before_BHTL = torch.cat([left_BHTL[..., 1:], torch.ones_like(left_BHTL[..., :1])], 3)
        weights_BHTL = taken_BHTL * before_BHTL
        y_BHTA = weights_BHTL @ v
        return y_BHTA.to(dtype), left_BHTL[..., 0].to(dtype), weights_BHTL.to(dtype)
