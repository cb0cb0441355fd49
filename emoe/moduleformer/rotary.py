"""Softmax attention with rotary positions: what stick-breaking attention is compared with.

Source: Su et al., "RoFormer", arXiv 2104.09864. Positions count tokens that are not padding.

Legend: B batch, H query heads, G key heads, T queries, L keys, A width of a head.
"""

import torch


def positions(key_mask_BL: torch.Tensor | None, T: int, L: int, device: torch.device) -> torch.Tensor:
    """Positions of the last T of L tokens: (B, T), or (1, T) without a mask."""
    if key_mask_BL is None:
        return torch.arange(L - T, L, device=device)[None]
    return (key_mask_BL.long().cumsum(1) - 1).clamp_min(0)[:, L - T :]


def rotate(x_BHTA: torch.Tensor, position_BT: torch.Tensor, theta: float) -> torch.Tensor:
    """Turn the pairs (a, a + A/2) by angles that grow with the position; computed in fp32."""
    A = x_BHTA.shape[-1]
    rate_a = theta ** (-torch.arange(0, A, 2, device=x_BHTA.device, dtype=torch.float32) / A)
    angle_B1Ta = position_BT[:, None, :, None].float() * rate_a
    first, second = x_BHTA.float().chunk(2, dim=-1)
    cos, sin = angle_B1Ta.cos(), angle_B1Ta.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x_BHTA.dtype)


def _visible(key_mask_BL: torch.Tensor | None, T: int, L: int, device: torch.device) -> torch.Tensor:
    """(B or 1, 1, T, L) bool: keys not after the query and not padding."""
    causal_TL = torch.ones(T, L, dtype=torch.bool, device=device).tril(L - T)
    return causal_TL[None, None] if key_mask_BL is None else causal_TL & key_mask_BL[:, None, None, :]


def softmax_attention(
    q_BHTA: torch.Tensor,
    k_BGLA: torch.Tensor,
    v_BGLA: torch.Tensor,
    key_mask_BL: torch.Tensor | None,
    return_weights: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Causal attention of rotated queries and keys; query head h looks at key head h % G. A query without keys gives 0.

    Returns:
        (B, H, T, A), and the weights (B, H, T, L) or None.
    """
    H, T, A = q_BHTA.shape[1:]
    L = k_BGLA.shape[2]
    repeats = H // k_BGLA.shape[1]
    k_BHLA, v_BHLA = k_BGLA.repeat(1, repeats, 1, 1), v_BGLA.repeat(1, repeats, 1, 1)
    if not return_weights and key_mask_BL is None and T in (1, L):
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(q_BHTA, k_BHLA, v_BHLA, is_causal=T > 1), None
    logits_BHTL = (q_BHTA @ k_BHLA.mT).float() * A**-0.5
    visible = _visible(key_mask_BL, T, L, q_BHTA.device)
    weights_BHTL = (
        logits_BHTL.masked_fill(~visible, torch.finfo(torch.float32).min).softmax(-1).masked_fill(~visible, 0)
    )
    weights_BHTL = weights_BHTL.to(q_BHTA.dtype)
    return weights_BHTL @ v_BHLA, weights_BHTL if return_weights else None
