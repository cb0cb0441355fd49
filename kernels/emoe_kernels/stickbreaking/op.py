"""The public stick-breaking attention: checks its arguments and hands them to an implementation.

Legend: B batch, H query heads, G key heads, T queries, L keys, A width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch import requested
from ..experts.op import choose
from . import portable, reference

__all__ = ["StickBreaking", "stick_breaking_attention"]


class StickBreaking(NamedTuple):
    """What the attention gives, all in the dtype of the queries."""

    y_BHTA: Tensor
    remainder_BHT: Tensor | None
    """What is left of each stick; None unless it was asked for."""
    weights_BHTL: Tensor | None
    """Zero where a query does not see a key; None unless they were asked for."""


def _any(*tensors: Tensor) -> str | None:
    return None


_IMPLEMENTATIONS: dict[str, tuple[Callable[..., tuple[Tensor, ...]], Callable[..., str | None]]] = {
    "reference": (reference.stick_breaking_attention, _any),
    "portable": (portable.stick_breaking_attention, _any),
}
"""Name → the function, and `supports(q, k, v)`: None, or why it cannot take these tensors."""


def _load(name: str) -> None:
    """Import what only some machines have."""
    if name == "cpu":
        from . import cpu as module
    else:
        from . import triton_op as module
    _IMPLEMENTATIONS[name] = (module.stick_breaking_attention, module.supports)


def stick_breaking_attention(
    q_BHTA: Tensor,
    k_BGLA: Tensor,
    v_BGLA: Tensor,
    *,
    key_mask_BL: Tensor | None = None,
    attend_current: bool = True,
    scale: float | None = None,
    return_remainder: bool = False,
    return_weights: bool = False,
) -> StickBreaking:
    """Attention without a softmax or positions: keys, nearest first, break their share off a stick of length one.

    With z_ij = scale * q_i . k_j over the keys j that query i sees:

        weights_ij = sigmoid(z_ij) * prod over m, j < m <= i, of (1 - sigmoid(z_im))
        y_i = sum_j weights_ij v_j            remainder_i = prod_m (1 - sigmoid(z_im)) = 1 - sum_j weights_ij

    The queries are the last T of the L positions: query t stands at i = L - T + t and sees the keys j <= i, or j < i
    if not `attend_current`. T = L is training and prefill, T = 1 a step of decoding with L keys in the cache.

    Source: Shen et al., "ModuleFormer", arXiv 2306.04640, sec. 3.2, with the current token; Tan et al., "Stick-breaking
    Attention", arXiv 2410.17980, sec. 2, without it. Difference: a masked key is left out of the product, so that left
    padding changes nothing.

    Args:
        q_BHTA: (B, H, T, A) queries, T <= L.
        k_BGLA, v_BGLA: (B, G, L, A) keys and values, H a multiple of G. They may be one tensor. Query head h looks at
            key head h % G: with the heads of K experts flattened from (K, G), each expert has all key heads.
        key_mask_BL: bool, False marks a position that takes nothing of any stick, such as padding. A query that sees
            no key gives y = 0 and remainder 1.
        attend_current: whether a query sees the key of its own position.
        scale: of the logits; by default A ** -0.5.
        return_remainder, return_weights: both can be differentiated. Weights take memory T * L a head, and come from
            plain torch whatever implementation was asked for.

    Returns:
        `StickBreaking`. Autocast does not act inside: arguments are used in the dtype they come in, sums are fp32.

    Raises:
        ValueError: an argument does not fit (the message names it), or an implementation was asked for that cannot take
            these tensors.
        RuntimeError: the implementation asked for is not to be had here.
    """
    _check(q_BHTA, k_BGLA, v_BGLA, key_mask_BL)
    scale = q_BHTA.shape[3] ** -0.5 if scale is None else float(scale)
    arguments = q_BHTA, k_BGLA, v_BGLA, key_mask_BL, attend_current, scale
    weights = None
    if not return_weights:
        y, remainder, *_ = choose(_IMPLEMENTATIONS, _load, q_BHTA, k_BGLA, v_BGLA)(*arguments)
    elif requested() == "reference":
        y, remainder, weights = reference.stick_breaking_attention(*arguments)
    else:  # whoever wants (T, L) weights has given up on what the kernels are for
        y, remainder, weights = portable.dense(*arguments)
    return StickBreaking(y, remainder if return_remainder else None, weights)


def _check(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> None:
    """ValueError naming the first argument that does not fit."""
    for name, tensor in (("q_BHTA", q), ("k_BGLA", k)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected four dimensions")
    (B, H, T, A), (G, L) = q.shape, k.shape[1:3]
    if not q.is_floating_point():
        raise ValueError(f"q_BHTA has dtype {q.dtype}; expected a floating dtype")
    if A == 0 or G == 0 or H % G:
        raise ValueError(f"q_BHTA has H={H} heads of width A={A}; expected a multiple of the G={G} heads of k_BGLA")
    if L == 0:
        raise ValueError(f"k_BGLA has shape {tuple(k.shape)}; expected at least one position")
    if T > L:
        raise ValueError(f"q_BHTA has T={T} queries, but k_BGLA only L={L} positions; queries are the last of them")
    for name, tensor in (("k_BGLA", k), ("v_BGLA", v)):
        if tensor.shape != (B, G, L, A):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; expected {(B, G, L, A)} (q_BHTA {tuple(q.shape)})"
            )
        if tensor.dtype != q.dtype:
            raise ValueError(f"{name} has dtype {tensor.dtype}, q_BHTA has {q.dtype}; cast one of them")
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device}, q_BHTA is on {q.device}")
    if key_mask is not None:
        if key_mask.shape != (B, L):
            raise ValueError(f"key_mask_BL has shape {tuple(key_mask.shape)}; expected {(B, L)}")
        if key_mask.dtype != torch.bool:
            raise ValueError(f"key_mask_BL has dtype {key_mask.dtype}; expected torch.bool, True for keys to be seen")
        if key_mask.device != q.device:
            raise ValueError(f"key_mask_BL is on {key_mask.device}, q_BHTA is on {q.device}")
