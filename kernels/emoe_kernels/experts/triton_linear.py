"""Grouped linears on Triton, for ModuleFormer's attention experts: out to the slots, and back with a sum over them.

Legend: N tokens, K slots per token, P = N * K slots, E experts, S width of an expert, D model width.

The kernels are those of the FFN with the identity for an activation, and (N, K, S) tensors in the order of slots.
Source: ModuleFormer, arXiv 2306.04640, sec. 3.2: the experts of its attention hold query and output projections, and
share keys and values.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op

from . import triton_host as host
from .triton_launch import check_device
from .triton_plan import Plan
from .triton_shared import check, plan_experts, spread, sum_rows


@custom_op("emoe_kernels::triton_linear", mutates_args=())
def _linear(x: Tensor, experts: Tensor, offsets: Tensor, slots: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    check_device(x.device)
    plan, (E, S, D) = Plan(offsets, slots), weight.shape
    bias_ES = (bias, (E, S))
    check(x, experts, plan, E, x_ND=(x, (x.shape[0], D)), weight_ESD=(weight, (E, S, D)), bias_ES=bias_ES)
    N, K = experts.shape
    h = x.new_zeros(N * K, S)  # zeros: nobody writes unused slots
    host.hidden(x, plan, K, weight, None, bias, None, h, None, None, "none", by_slot=True)
    return h.view(N, K, S)


@_linear.register_fake
def _(x, experts, offsets, slots, weight, bias):
    return x.new_empty(*experts.shape, weight.shape[1])


@custom_op("emoe_kernels::triton_linear_backward", mutates_args=())
def _linear_backward(
    dh: Tensor, x: Tensor, experts: Tensor, offsets: Tensor, slots: Tensor, weight: Tensor, need: list[bool]
) -> list[Tensor]:
    """Gradients of x, weight and bias, those marked in `need`."""
    plan, (E, S, _) = Plan(offsets, slots), weight.shape
    dh_P = dh.reshape(-1, S).contiguous()
    grads = []
    if need[0]:
        grads.append(host.project(dh_P, weight, None, None, experts, plan, None, None, by_slot=True))
    if need[1]:
        grads.append(torch.empty_like(weight))
        host.grad_weight(dh_P, x, grads[-1], plan, experts.shape[1], by_slot=True)
    if need[2]:
        grads.append(host.grad_bias(dh_P, E, S, plan, by_slot=True))
    return grads


@_linear_backward.register_fake
def _(dh, x, experts, offsets, slots, weight, need):
    shapes = (lambda: x.new_empty(x.shape), lambda: torch.empty_like(weight), lambda: x.new_empty(weight.shape[:2]))
    return [make() for make, wanted in zip(shapes, need, strict=True) if wanted]


def _linear_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:5])


def _linear_grad(ctx, dh):
    needed = ctx.needs_input_grad
    need = [needed[0], needed[4], needed[5]]
    dx, dweight, dbias = spread(_linear_backward(dh, *ctx.saved_tensors, need), need)
    return dx, None, None, None, dweight, dbias


_linear.register_autograd(_linear_grad, setup_context=_linear_setup)


@custom_op("emoe_kernels::triton_combine", mutates_args=())
def _combine(
    h: Tensor,
    experts: Tensor,
    offsets: Tensor,
    slots: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weights: Tensor | None,
) -> Tensor:
    check_device(h.device)
    plan, (E, D, S) = Plan(offsets, slots), weight.shape
    h_NKS = (h, (*experts.shape, S))
    check(h, experts, plan, E, weights, h_NKS=h_NKS, weight_EDS=(weight, (E, D, S)), bias_D=(bias, (D,)))
    h_P = h.reshape(-1, S).contiguous()
    return host.project(h_P, weight.transpose(1, 2), None, None, experts, plan, weights, bias, by_slot=True)


@_combine.register_fake
def _(h, experts, offsets, slots, weight, bias, weights):
    return h.new_empty(h.shape[0], weight.shape[1])


@custom_op("emoe_kernels::triton_combine_backward", mutates_args=())
def _combine_backward(
    dy: Tensor,
    h: Tensor,
    experts: Tensor,
    offsets: Tensor,
    slots: Tensor,
    weight: Tensor,
    weights: Tensor | None,
    need: list[bool],
) -> list[Tensor]:
    """Gradients of h, weight and routing weights, those marked in `need`."""
    need_h, need_weight, need_w = need
    plan, (N, K, S) = Plan(offsets, slots), h.shape
    h_P = h.reshape(N * K, S).contiguous()
    # zeros: nobody writes unused slots
    dh_P = torch.zeros_like(h_P) if need_h or need_w else None
    dw = torch.zeros(N * K, dtype=torch.float32, device=h.device) if need_w else None
    hw_P = torch.empty_like(h_P) if need_weight and weights is not None else None
    if dh_P is not None:
        host.hidden(dy, plan, K, weight.transpose(1, 2), None, None, None, dh_P, None, None, "none", by_slot=True)
    if need_w or hw_P is not None or weights is not None:
        E = weight.shape[0]
        host.activation_backward(
            plan, E, S, weights, dh_P, h_P, None, None, hw_P, dw, "none", by_slot=True, write_du=need_h
        )
    grads = []
    if need_h:
        grads.append(dh_P.view(N, K, S))
    if need_weight:
        grads.append(torch.empty_like(weight))
        source = h_P if hw_P is None else hw_P
        host.grad_weight(source, dy, grads[-1].transpose(1, 2), plan, K, by_slot=True)
    if need_w:
        grads.append(dw.view(N, K).to(weights.dtype))
    return grads


@_combine_backward.register_fake
def _(dy, h, experts, offsets, slots, weight, weights, need):
    shapes = (
        lambda: h.new_empty(h.shape),
        lambda: torch.empty_like(weight),
        lambda: weights.new_empty(experts.shape),
    )
    return [make() for make, wanted in zip(shapes, need, strict=True) if wanted]


def _combine_setup(ctx, inputs, output) -> None:
    h, experts, offsets, slots, weight, _, weights = inputs
    ctx.save_for_backward(h, experts, offsets, slots, weight, weights)


def _combine_grad(ctx, dy):
    needed = ctx.needs_input_grad
    need = [needed[0], needed[4], needed[6]]
    dh, dweight, dw = spread(_combine_backward(dy, *ctx.saved_tensors, need), need)
    return dh, None, None, None, dweight, sum_rows(dy, needed[5]), dw


_combine.register_autograd(_combine_grad, setup_context=_combine_setup)


def expert_linear(
    x_ND: Tensor,
    experts_NK: Tensor,
    weight_ESD: Tensor,
    bias_ES: Tensor | None = None,
    *,
    plan: Plan | None = None,
) -> Tensor:
    """h_nk = x_n @ weight_e.T + bias_e with e = experts_nk, (N, K, S) in the dtype of x; zeros where the id is -1.

    dtypes, strides, ids and gradients as for `expert_ffn`. `plan` is that of `plan_experts(experts_NK, E)`;
    ValueError if it is for another number of experts or of slots.
    """
    plan = plan or plan_experts(experts_NK, weight_ESD.shape[0])
    return _linear(x_ND, experts_NK, *plan, weight_ESD, bias_ES)


def expert_combine(
    h_NKS: Tensor,
    experts_NK: Tensor,
    weight_EDS: Tensor,
    bias_D: Tensor | None = None,
    weights_NK: Tensor | None = None,
    *,
    plan: Plan | None = None,
) -> Tensor:
    """y_n = sum over k of weights_nk * h_nk @ weight_e.T + bias with e = experts_nk, (N, D) in the dtype of h.

    Slots whose id is -1 add nothing, whatever h holds there. dtypes, strides, ids and gradients as for `expert_ffn`.
    """
    plan = plan or plan_experts(experts_NK, weight_EDS.shape[0])
    return _combine(h_NKS, experts_NK, *plan, weight_EDS, bias_D, weights_NK)
