"""The sparse kernels; beside a saved checkpoint, on a machine without our packages, copies of their PyTorch paths.

Legend: B batch, H query heads, G key heads, T queries, L keys, A width of a head.
"""

import torch

try:
    from emoe_kernels.experts import expert_ffn
    from emoe_kernels.linear import expert_combine, expert_linear
    from emoe_kernels.stickbreaking import stick_breaking_attention

    INSTALLED = True
except ImportError:
    from .linear_portable import expert_combine, expert_linear
    from .portable import expert_ffn
    from .stickbreaking_portable import dense, stick_breaking_attention

    INSTALLED = False

__all__ = ["expert_combine", "expert_ffn", "expert_linear", "stick_breaking"]


def stick_breaking(
    q_BHTA: torch.Tensor,
    k_BGLA: torch.Tensor,
    v_BGLA: torch.Tensor,
    key_mask_BL: torch.Tensor | None,
    return_weights: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Stick-breaking attention, (B, H, T, A), and its weights (B, H, T, L) or None; head h looks at key head h % G."""
    if INSTALLED:
        found = stick_breaking_attention(q_BHTA, k_BGLA, v_BGLA, key_mask_BL=key_mask_BL, return_weights=return_weights)
        return found.y_BHTA, found.weights_BHTL
    arguments = (q_BHTA, k_BGLA, v_BGLA, key_mask_BL, True, q_BHTA.shape[3] ** -0.5)
    if return_weights:
        y_BHTA, _, weights_BHTL = dense(*arguments)
        return y_BHTA, weights_BHTL
    return stick_breaking_attention(*arguments)[0], None
