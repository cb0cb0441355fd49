"""The public sparse expert FFN: checks its arguments and hands them to an implementation.

Legend: N tokens, D model width, F hidden width, E experts, S = F // E neurons per expert, K experts chosen per token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..dispatch import AUTO, requested, resolve
from . import portable, reference
from .portable import ACTIVATIONS, get_activation

__all__ = ["ACTIVATIONS", "expert_ffn"]


def _any(*tensors: Tensor) -> str | None:
    """The implementations in plain torch take whatever torch takes."""
    return None


_IMPLEMENTATIONS: dict[str, tuple[Callable, ...]] = {
    "reference": (reference.expert_ffn, _any),
    "portable": (portable.stacked_ffn, _any),
}
"""Name → the function; `supports(x_ND, up_ESD, down_EDS, gate_ESD)`: None, or why it cannot take these tensors; and
perhaps `is_slow` of the same: whether "auto" had better take `portable`.

Weights arrive stacked, up and gate (E, S, D), down (E, D, S), biases (E, S): views, with any strides."""


def _load(name: str) -> None:
    """Import what only some machines have."""
    if name == "cpu":
        from . import cpu

        _IMPLEMENTATIONS[name] = (cpu.expert_ffn, cpu.supports, cpu.is_slow)
    else:
        from . import triton_op

        _IMPLEMENTATIONS[name] = (triton_op.expert_ffn, triton_op.supports)


def expert_ffn(
    x_ND: Tensor,
    experts_NK: Tensor,
    up_FD: Tensor,
    down_DF: Tensor,
    *,
    num_experts: int | None = None,
    gate_FD: Tensor | None = None,
    up_bias_F: Tensor | None = None,
    gate_bias_F: Tensor | None = None,
    down_bias_D: Tensor | None = None,
    activation: str = "silu",
    weights_NK: Tensor | None = None,
) -> Tensor:
    """The feed-forward layer, restricted per token to the chosen experts.

    With h = act(x Wg^T + bg) * (x Wu^T + bu), or h = act(x Wu^T + bu) without a gate, and h_e the S entries of h that
    belong to expert e:

        y_n = sum_k weights_nk * h_e Wd_e^T + bd      with e = experts_nk

    Expert e is the contiguous block of rows e * S : (e + 1) * S of up and gate, and of the same columns of down, so
    that all experts together, with weight 1, are the dense layer.

    Source: Qiu et al., "Unlocking Emergent Modularity in Large Language Models", arXiv 2310.10908, sec. 2-3, on the
    split of Zhang et al., "MoEfication", arXiv 2110.01786. Differences: routing weights other than 0 and 1 are
    allowed, and so are biases; the output bias belongs to no expert and is added once.

    Args:
        x_ND: (N, D) tokens.
        experts_NK: (N, K) integer ids in 0 .. E - 1, distinct within a row; -1 marks an unused slot, so that the
            number of experts may vary from token to token. Distinctness is not checked.
        up_FD, down_DF, gate_FD: the dense weights (F, D), (D, F), (F, D) in the convention of
            `torch.nn.functional.linear`, or the same blocks stacked, (E, S, D), (E, D, S), (E, S, D), as models that
            were born with experts keep them. All in the dtype of x and in one of the two layouts. Any strides, such
            as the transpose of a GPT-2 Conv1D weight or a slice of a fused gate_up_proj; none is copied whole.
        num_experts: E, a divisor of F. Needed with dense weights; stacked ones tell it.
        up_bias_F, gate_bias_F, down_bias_D: biases, or None: (F,), (F,), (D,); stacked (E, S), (E, S), (D,).
        activation: one of `ACTIVATIONS`.
        weights_NK: (N, K) routing weights of any floating dtype; None stands for 1.

    Returns:
        (N, D) in the dtype of x. Autocast does not act inside: arguments are used in the dtype they come in.

    Raises:
        ValueError: an argument's shape or dtype does not fit (the message names it), an id is outside -1 .. E - 1,
            the activation is unknown, or an implementation was asked for that cannot take these tensors.
        RuntimeError: the implementation asked for is not to be had here.
    """
    if activation not in ACTIVATIONS:
        get_activation(activation)  # says which are known
    arguments = x_ND, experts_NK, up_FD, down_DF, num_experts, gate_FD, up_bias_F, gate_bias_F, down_bias_D, weights_NK
    if not _fit(*arguments):
        _refuse(*arguments)
    up_ESD, down_EDS, gate_ESD, up_bias_ES, gate_bias_ES = up_FD, down_DF, gate_FD, up_bias_F, gate_bias_F
    if up_FD.dim() == 2:  # stack_rows and stack_columns, but 1.6 us faster
        (F, D), E = up_FD.shape, num_experts
        S = F // E
        up_ESD, down_EDS = up_FD.view(E, S, D), down_DF.view(D, E, S).transpose(0, 1)
        gate_ESD = None if gate_FD is None else gate_FD.view(E, S, D)
        up_bias_ES = None if up_bias_F is None else up_bias_F.view(E, S)
        gate_bias_ES = None if gate_bias_F is None else gate_bias_F.view(E, S)
    run = choose(_IMPLEMENTATIONS, _load, x_ND, up_ESD, down_EDS, gate_ESD)
    return run(
        x_ND,
        experts_NK,
        up_ESD,
        down_EDS,
        gate_ESD=gate_ESD,
        up_bias_ES=up_bias_ES,
        gate_bias_ES=gate_bias_ES,
        down_bias_D=down_bias_D,
        activation=activation,
        weights_NK=weights_NK,
    )


def choose(implementations: dict, load: Callable[[str], None], x: Tensor, *weights: Tensor | None) -> Callable:
    """The implementation that runs on these tensors. Where "auto" chose one that cannot take them, or takes them
    slowly: `portable`."""
    name = resolve("cuda" if x.is_cuda else "cpu" if x.is_cpu else x.device.type)
    if name not in implementations:
        load(name)
    run, supports, *is_slow = implementations[name]
    reason = supports(x, *weights)
    # A traced function keeps what can be traced: `portable` sorts on the host.
    if reason is None and not (is_slow and not torch.compiler.is_compiling() and is_slow[0](x, *weights)):
        return run
    if requested() != AUTO:
        if reason is None:
            return run
        raise ValueError(f"the implementation {name!r} was asked for, but {reason}")
    return implementations["portable"][0]


def _fit(x, experts, up, down, num_experts, gate, up_bias, gate_bias, down_bias, weights) -> bool:
    """Whether all arguments fit together. Says no more than that, because it runs once a layer and token: 1.6 us."""
    shape, dtype, device, wide = up.shape, x.dtype, x.device, x.shape
    if len(wide) != 2:
        return False
    N, D = wide
    if len(shape) == 2:
        F, E = shape[0], num_experts
        if E is None or E < 1 or F % E or shape[1] != D or down.shape != (D, F):
            return False
        bias_shape = (F,)
    elif len(shape) == 3:
        E, S, bias_shape = shape[0], shape[1], shape[:2]
        if E < 1 or (num_experts is not None and num_experts != E) or shape[2] != D or down.shape != (E, D, S):
            return False
    else:
        return False
    chosen = experts.shape
    if len(chosen) != 2 or chosen[0] != N or chosen[1] > E or experts.device != device:
        return False
    if experts.dtype is not torch.int64 and experts.dtype is not torch.int32:
        return False
    if up.dtype is not dtype or down.dtype is not dtype or up.device != device or down.device != device:
        return False
    if gate is not None and (gate.shape != shape or gate.dtype is not dtype or gate.device != device):
        return False
    if weights is not None and (weights.shape != chosen or weights.device != device or not weights.is_floating_point()):
        return False
    if gate_bias is not None and gate is None:
        return False
    return (
        (up_bias is None or _bias_fits(up_bias, bias_shape, dtype, device))
        and (gate_bias is None or _bias_fits(gate_bias, bias_shape, dtype, device))
        and (down_bias is None or _bias_fits(down_bias, (D,), dtype, device))
    )


def _bias_fits(bias: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> bool:
    return bias.shape == shape and bias.dtype is dtype and bias.device == device


def _refuse(x, experts, up, down, num_experts, gate, up_bias, gate_bias, down_bias, weights) -> None:
    """Name what `_fit` did not like."""
    check_rank("x_ND", x, 2)
    check_rank("experts_NK", experts, 2)
    E, S = check_experts("up_FD", up, 0, num_experts, experts.shape[1])
    if gate is None and gate_bias is not None:
        raise ValueError("gate_bias_F is given without gate_FD")
    (N, D), K = x.shape, experts.shape[1]
    stacked = up.dim() == 3
    rows, columns, bias = ((E, S, D), (E, D, S), (E, S)) if stacked else ((E * S, D), (D, E * S), (E * S,))
    check_tensors(
        "x_ND",
        x,
        {
            "experts_NK": (experts, (N, K)),
            "up_FD": (up, rows),
            "down_DF": (down, columns),
            "gate_FD": (gate, rows),
            "up_bias_F": (up_bias, bias),
            "gate_bias_F": (gate_bias, bias),
            "down_bias_D": (down_bias, (D,)),
            "weights_NK": (weights, (N, K)),
        },
        f"x_ND {(N, D)}, " + (f"E={E}, S={S}" if stacked else f"F={E * S}"),
    )


# Shapes and dtypes alone: reading values would cost more than some calls take.


def check_rank(name: str, tensor: Tensor, *ranks: int) -> None:
    """ValueError unless the tensor has one of these numbers of dimensions."""
    if tensor.dim() not in ranks:
        numbers = " or ".join({2: "two", 3: "three"}[rank] for rank in ranks)
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {numbers} dimensions")


def check_experts(name: str, weight: Tensor, dim: int, num_experts: int | None, chosen: int) -> tuple[int, int]:
    """(E, S) of a weight whose neurons are dimension `dim` if it is dense, or that is stacked; ValueError if none fit.

    `chosen` is K, of which there cannot be more than E.
    """
    check_rank(name, weight, 2, 3)
    if weight.dim() == 3:
        E, S = weight.shape[0], weight.shape[1 + dim]
        if num_experts not in (None, E):
            raise ValueError(f"num_experts={num_experts}, but {name} stacks {E} experts")
    else:
        F = weight.shape[dim]
        if num_experts is None:
            raise ValueError(f"num_experts is missing; {name} of shape {tuple(weight.shape)} does not tell it")
        if num_experts < 1 or F % num_experts:
            near = [e for e in range(1, F + 1) if F % e == 0]
            near = sorted(sorted(near, key=lambda e: abs(e - num_experts))[:2])
            raise ValueError(f"num_experts={num_experts} does not divide F={F}; try {' or '.join(map(str, near))}")
        E, S = num_experts, F // num_experts
    if chosen > E:
        raise ValueError(f"experts_NK chooses K={chosen} experts per token, but num_experts={E}")
    return E, S


def check_tensors(
    first: str, x: Tensor, expected: dict[str, tuple[Tensor | None, tuple[int, ...]]], given: str
) -> None:
    """ValueError naming the first tensor that has not its expected shape, or not the device or dtype of x (`first`).

    `given` says where the expectation comes from.
    """
    experts = expected["experts_NK"][0]
    if experts.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"experts_NK has dtype {experts.dtype}; expected torch.int64")
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape} ({given})")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, {first} is on {x.device}")
        if name not in ("experts_NK", "weights_NK") and tensor.dtype != x.dtype:
            raise ValueError(f"{name} has dtype {tensor.dtype}, {first} has {x.dtype}; cast one of them")
    weights = expected.get("weights_NK", (None, ()))[0]
    if weights is not None and not weights.is_floating_point():
        raise ValueError(f"weights_NK has dtype {weights.dtype}; expected a floating dtype")
