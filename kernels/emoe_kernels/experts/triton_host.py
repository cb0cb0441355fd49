"""Host side of the Triton kernels: buffers, grids and compile-time constants. No autograd, no synchronisation.

Legend: N tokens, K slots per token, P = N * K slots, E experts, S neurons per expert, D model width. (P, S) tensors
hold one row per slot, in the order of the plan (`by_slot=False`) or of the flattened (N, K) tensors (`by_slot=True`).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from . import triton_configs as configs
from .triton_backward import activation_backward_kernel, grad_bias_kernel, grad_weight_kernel
from .triton_common import ACTIVATION_IDS, INTERPRETING
from .triton_forward import combine_kernel, hidden_kernel, project_kernel
from .triton_launch import launch, recorded_arch
from .triton_plan import Plan

PART_BYTES = 32 * 2**20
"""Bytes of the buffer between a projection and its sum over k: it stays in the L2 cache (A100 40 MiB, H100 50 MiB)."""

_COMBINE = {"BT": 8, "BD": 128}  # tokens, columns: 16-byte loads, eight sums a thread
_ELEMENTWISE = {"BM": 16, "BN": 64}  # rows, neurons
_BIAS = {"BM": 64, "BN": 32}  # rows, neurons

# "half": Triton reads the precision only for fp32, but AMD refuses the name "tf32" whatever the dtype
_PRECISION = {"half": None, "tf32": "tf32", "ieee": "ieee"}


def _rows_last_contiguous(x: Tensor) -> Tensor:
    """Rows may be any distance apart, entries of a row not: a gather over strided entries costs more than a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def padded_rows(like: Tensor, P: int, S: int) -> Tensor:
    """(P, S rounded up to 16) uninitialised: S = 172 would put rows at odd places, and loads would be narrow."""
    return like.new_empty(P, (S + 15) // 16 * 16)


def _config(kernel: str, x: Tensor, P: int, weight_ESD: Tensor) -> tuple[configs.Config, dict[str, Any]]:
    """The tile for this call, and the compile-time constants that follow from it and from the dtype."""
    (E, S, D), kind, recorded = weight_ESD.shape, configs.arithmetic(x.dtype), recorded_arch()
    device, rows = recorded or configs.device_name(x.device), configs.rows_per_block(P, E)
    case = configs.Case(device, kind, kernel, rows, S, D, configs.layout(weight_ESD))
    config = configs.choose(recorded or configs.architecture(x.device), case)
    constants = {
        "BM": config.bm,
        "BN": config.bn,
        "BK": config.bk,
        "PRECISION": _PRECISION[kind],
        "UPCAST": INTERPRETING and x.dtype == torch.bfloat16,
    }
    return config, constants


def _blocks(P: int, E: int, BM: int) -> int:
    """At most so many blocks of BM rows: every chosen expert may end in a block that is not full."""
    return min(P, P // BM + min(E, P))


def _chunk(column_bytes: int, blocks: int, bn: int) -> int:
    """Columns of D that a projection computes at a time: all `blocks` of them if they fit, else a power of two of them.

    A width is compiled for. It depends on the number of tokens, and with powers of two it takes few values.
    """
    fit = max(1, PART_BYTES // max(1, column_bytes * bn))
    return bn * min(blocks, 1 << (fit.bit_length() - 1))


def _expert_constants(E: int) -> dict[str, int]:
    return {"E": E, "E_POW2": triton.next_power_of_2(E)}


def _strides(prefix: str, weight_ESD: Tensor | None, last: str = "D") -> dict[str, int]:
    strides = (0, 0, 0) if weight_ESD is None else weight_ESD.stride()
    return dict(zip((f"{prefix}_E", f"{prefix}_S", f"{prefix}_{last}"), strides, strict=True))


def hidden(
    x_ND: Tensor,
    plan: Plan,
    K: int,
    up_ESD: Tensor,
    gate_ESD: Tensor | None,
    up_bias_ES: Tensor | None,
    gate_bias_ES: Tensor | None,
    h_P: Tensor,
    up_P: Tensor | None,
    gate_P: Tensor | None,
    activation: str,
    by_slot: bool,
) -> None:
    """Writes h, and the pre-activations where there is a place for them; rows of unused slots stay as they are."""
    E, S, D = up_ESD.shape
    P = plan.slots_P.numel()
    x_ND = _rows_last_contiguous(x_ND)
    kernel = "linear" if gate_ESD is None else "hidden"
    config, constants = _config(kernel, x_ND, P, up_ESD)
    constants |= _expert_constants(E) | _strides("UP", up_ESD) | _strides("GATE", gate_ESD)
    constants |= {"K": K, "S": S, "D": D, "H_P": h_P.stride(0)}
    constants |= {"ACT": ACTIVATION_IDS[activation], "BY_SLOT": by_slot}
    up_bias_ES = None if up_bias_ES is None else up_bias_ES.contiguous()
    gate_bias_ES = None if gate_bias_ES is None else gate_bias_ES.contiguous()
    args = (x_ND, up_ESD, gate_ESD, up_bias_ES, gate_bias_ES, h_P, up_P, gate_P, *plan, x_ND.stride(0))
    programs = _blocks(P, E, config.bm) * triton.cdiv(S, config.bn)
    launch(hidden_kernel, programs, args, constants, warps=config.warps, stages=config.stages)


def project(
    a_P: Tensor,
    wa_ESD: Tensor,
    b_P: Tensor | None,
    wb_ESD: Tensor | None,
    experts_NK: Tensor,
    plan: Plan,
    weights_NK: Tensor | None,
    bias_D: Tensor | None,
    by_slot: bool,
) -> Tensor:
    """y_n = sum over k of w_nk (a Wa_e + b Wb_e) + bias, (N, D), in the dtype of a.

    Goes through D a chunk at a time with a (P, chunk) buffer of `PART_BYTES`: (P, D) would be K times the output.
    No atomics: a sum over k is taken by one program in the order of k.
    """
    (E, S, D), (N, K), P = wa_ESD.shape, experts_NK.shape, plan.slots_P.numel()
    config, constants = _config("project", a_P, P, wa_ESD)
    width = _chunk(P * a_P.element_size(), triton.cdiv(D, config.bn), config.bn)
    chunks = triton.cdiv(D, width)
    y_ND, part = a_P.new_empty(N, D), a_P.new_empty(P, width)
    constants |= _expert_constants(E) | _strides("WA", wa_ESD) | _strides("WB", wb_ESD)
    constants |= {"S": S, "D": D, "A_P": a_P.stride(0), "WIDTH": width, "BY_SLOT": by_slot}
    experts_NK = experts_NK.contiguous()
    weights_NK = None if weights_NK is None else weights_NK.contiguous()
    bias_D = None if bias_D is None else bias_D.contiguous()
    combine = dict(K=K, E=E, D=D, WIDTH=width, **_COMBINE)
    for chunk in range(chunks):
        args = (a_P, wa_ESD, b_P, wb_ESD, part, *plan, chunk)
        programs = _blocks(P, E, config.bm) * (width // config.bn)
        launch(project_kernel, programs, args, constants, warps=config.warps, stages=config.stages)
        args = (part, experts_NK, weights_NK, bias_D, y_ND, N, chunk)
        programs = triton.cdiv(N, _COMBINE["BT"]) * triton.cdiv(width, _COMBINE["BD"])
        launch(combine_kernel, programs, args, combine)
    return y_ND


def activation_backward(
    plan: Plan,
    E: int,
    S: int,
    weights_NK: Tensor | None,
    dh_P: Tensor | None,
    up_P: Tensor,
    gate_P: Tensor | None,
    dg_P: Tensor | None,
    hw_P: Tensor | None,
    dw_P: Tensor | None,
    activation: str,
    by_slot: bool,
    write_du: bool,
) -> None:
    """Turns dh = dy Wd_e into du if `write_du`, and writes dg, w h and dw where there is a place for them.

    All (P, S) tensors have the row stride of `up_P`; `dw_P` is (P,) fp32 in the order of slots.
    """
    weights_NK = None if weights_NK is None else weights_NK.contiguous()
    constants = {"E": E, "S": S, "H_P": up_P.stride(0), "ACT": ACTIVATION_IDS[activation]}
    constants |= {"BY_SLOT": by_slot, "WRITE_DU": write_du} | _ELEMENTWISE
    args = (dh_P, weights_NK, up_P, gate_P, dg_P, hw_P, dw_P, *plan)
    programs = triton.cdiv(plan.slots_P.numel(), _ELEMENTWISE["BM"])
    launch(activation_backward_kernel, programs, args, constants)


def grad_weight(a_P: Tensor, x_ND: Tensor, grad_ESD: Tensor, plan: Plan, K: int, by_slot: bool) -> None:
    """grad_e = sum over the rows of e of a_row^T x_token, written into `grad_ESD`, which may have any strides."""
    E, S, D = grad_ESD.shape
    x_ND = _rows_last_contiguous(x_ND)
    config, constants = _config("grad_weight", x_ND, plan.slots_P.numel(), grad_ESD)
    constants |= _strides("G", grad_ESD) | {"K": K, "S": S, "D": D}
    constants |= {"A_P": a_P.stride(0), "BY_SLOT": by_slot}
    programs = E * triton.cdiv(S, config.bm) * triton.cdiv(D, config.bn)
    args = (a_P, x_ND, grad_ESD, *plan, x_ND.stride(0))
    launch(grad_weight_kernel, programs, args, constants, warps=config.warps, stages=config.stages)


def grad_bias(a_P: Tensor, E: int, S: int, plan: Plan, by_slot: bool) -> Tensor:
    """(E, S): for each expert the sum over its rows of a."""
    grad_ES = a_P.new_empty(E, S)
    constants = dict(S=S, A_P=a_P.stride(0), BY_SLOT=by_slot, **_BIAS)
    launch(grad_bias_kernel, E * triton.cdiv(S, _BIAS["BN"]), (a_P, grad_ES, *plan), constants)
    return grad_ES
