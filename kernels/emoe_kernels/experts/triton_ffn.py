"""Sparse expert FFN on Triton: registration with torch, autograd, the public function.

Legend: N tokens, K slots per token, P = N * K slots, E experts, S neurons per expert, D model width.

Every launch sits in an op registered with torch.library, with a fake implementation that tells shapes, so that
torch.compile takes a model through here without a graph break, and nothing here waits for the device. The grid is
sized for the worst case and programs without work leave at once.

Memory beyond inputs, output and gradients, in elements (S' = S rounded up to 16):
    forward   P S' for h, and while gradients are wanted 1 or 2 P S' for the pre-activations, kept until backward
    backward  up to 3 P S' for the gradients of the pre-activations and w h
    both      what is summed over k, P D but at most 32 MiB or P bn, whichever is more (bn columns a tile of `project`)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op

from . import triton_host as host
from .triton_launch import check_device
from .triton_plan import Plan
from .triton_shared import check, plan_experts, spread, sum_rows


@custom_op("emoe_kernels::triton_ffn", mutates_args=())
def _ffn(
    x: Tensor,
    experts: Tensor,
    offsets: Tensor,
    slots: Tensor,
    up: Tensor,
    down: Tensor,
    gate: Tensor | None,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    down_bias: Tensor | None,
    weights: Tensor | None,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (N, D), and the pre-activations (P, S') if `keep`, else empty tensors."""
    check_device(x.device)
    plan, (E, S, D), K = Plan(offsets, slots), up.shape, experts.shape[-1]
    check(
        x,
        experts,
        plan,
        E,
        weights,
        x_ND=(x, (x.shape[0], D)),
        down_EDS=(down, (E, D, S)),
        up_ESD=(up, (E, S, D)),
        gate_ESD=(gate, (E, S, D)),
        up_bias_ES=(up_bias, (E, S)),
        gate_bias_ES=(gate_bias, (E, S)),
        down_bias_D=(down_bias, (D,)),
    )
    h = host.padded_rows(x, slots.numel(), S)
    up_P = torch.empty_like(h) if keep else None
    gate_P = torch.empty_like(h) if keep and gate is not None else None
    host.hidden(x, plan, K, up, gate, up_bias, gate_bias, h, up_P, gate_P, activation, by_slot=False)
    y = host.project(h, down.transpose(1, 2), None, None, experts, plan, weights, down_bias, by_slot=False)
    return y, x.new_empty(0) if up_P is None else up_P, x.new_empty(0) if gate_P is None else gate_P


@_ffn.register_fake
def _(x, experts, offsets, slots, up, down, gate, up_bias, gate_bias, down_bias, weights, activation, keep):
    kept = host.padded_rows(x, slots.numel(), up.shape[1])
    up_P = kept if keep else x.new_empty(0)
    return x.new_empty(x.shape), up_P, torch.empty_like(kept) if keep and gate is not None else x.new_empty(0)


@custom_op("emoe_kernels::triton_ffn_backward", mutates_args=())
def _ffn_backward(
    dy: Tensor,
    x: Tensor,
    experts: Tensor,
    offsets: Tensor,
    slots: Tensor,
    up: Tensor,
    down: Tensor,
    gate: Tensor | None,
    weights: Tensor | None,
    up_P: Tensor,
    gate_P: Tensor,
    activation: str,
    need: list[bool],
) -> list[Tensor]:
    """Gradients of x, up, down, gate, up_bias, gate_bias and weights, those marked in `need` and no others."""
    need_x, need_up, need_down, need_gate, need_bu, need_bg, need_w = need
    plan, K, (E, S, _) = Plan(offsets, slots), experts.shape[1], up.shape
    need_du = need_x or need_up or need_gate or need_bu or need_bg
    du = torch.empty_like(up_P) if need_du or need_w else None
    dg = torch.empty_like(up_P) if need_du and gate is not None else None
    hw = torch.empty_like(up_P) if need_down else None
    # zeros: nobody writes the gradient of an unused slot's weight
    dw = torch.zeros(slots.numel(), dtype=torch.float32, device=x.device) if need_w else None
    if du is not None:
        host.hidden(dy, plan, K, down.transpose(1, 2), None, None, None, du, None, None, "none", by_slot=False)
    pre_gate = None if gate is None else gate_P
    host.activation_backward(
        plan, E, S, weights, du, up_P, pre_gate, dg, hw, dw, activation, by_slot=False, write_du=need_du
    )
    grads = []
    if need_x:
        grads.append(host.project(du, up, dg, gate, experts, plan, None, None, by_slot=False))
    if need_up:
        grads.append(torch.empty_like(up))
        host.grad_weight(du, x, grads[-1], plan, K, by_slot=False)
    if need_down:
        grads.append(torch.empty_like(down))
        host.grad_weight(hw, dy, grads[-1].transpose(1, 2), plan, K, by_slot=False)
    if need_gate:
        grads.append(torch.empty_like(gate))
        host.grad_weight(dg, x, grads[-1], plan, K, by_slot=False)
    if need_bu:
        grads.append(host.grad_bias(du, E, S, plan, by_slot=False))
    if need_bg:
        grads.append(host.grad_bias(dg, E, S, plan, by_slot=False))
    if need_w:
        grads.append(dw.view(experts.shape).to(weights.dtype))
    return grads


@_ffn_backward.register_fake
def _(dy, x, experts, offsets, slots, up, down, gate, weights, up_P, gate_P, activation, need):
    shapes = (
        lambda: x.new_empty(x.shape),
        lambda: torch.empty_like(up),
        lambda: torch.empty_like(down),
        lambda: torch.empty_like(gate),
        lambda: x.new_empty(up.shape[:2]),
        lambda: x.new_empty(up.shape[:2]),
        lambda: weights.new_empty(experts.shape),
    )
    return [make() for make, wanted in zip(shapes, need, strict=True) if wanted]


def _ffn_setup(ctx, inputs, output) -> None:
    x, experts, offsets, slots, up, down, gate, _, _, _, weights, ctx.activation, keep = inputs
    if not keep:
        raise RuntimeError("triton_ffn was called with keep=False, but its gradient is wanted")
    ctx.save_for_backward(x, experts, offsets, slots, up, down, gate, weights, output[1], output[2])
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)


def _ffn_grad(ctx, dy, _up_P, _gate_P):
    if dy is None:
        return (None,) * 13
    x, _, _, _, up, down, gate, bu, bg, bd, weights, _, _ = ctx.needs_input_grad
    need = [x, up, down, gate, bu, bg, weights]
    saved = ctx.saved_tensors
    dx, dup, ddown, dgate, dbu, dbg, dw = spread(_ffn_backward(dy, *saved, ctx.activation, need), need)
    return dx, None, None, None, dup, ddown, dgate, dbu, dbg, sum_rows(dy, bd), dw, None, None


_ffn.register_autograd(_ffn_grad, setup_context=_ffn_setup)


def expert_ffn(
    x_ND: Tensor,
    experts_NK: Tensor,
    up_ESD: Tensor,
    down_EDS: Tensor,
    *,
    gate_ESD: Tensor | None = None,
    up_bias_ES: Tensor | None = None,
    gate_bias_ES: Tensor | None = None,
    down_bias_D: Tensor | None = None,
    activation: str = "silu",
    weights_NK: Tensor | None = None,
) -> Tensor:
    """y_n = sum over k of weights_nk * h_e @ down_e.T + down_bias with e = experts_nk, (N, D) in the dtype of x.

    h_e = activation(x @ gate_e.T + gate_bias_e) * (x @ up_e.T + up_bias_e), or activation(x @ up_e.T + up_bias_e)
    without a gate. Ids are int32 or int64, -1 where a slot is unused. Weights may have any strides (views of a dense
    checkpoint) and none is copied; their gradients have the same strides if the view is dense. Tensors are fp32, bf16
    or fp16, routing weights of any floating dtype, 1 if None. Activations, and sums over experts, are taken in fp32.

    fp32 is multiplied in full unless torch.backends.cuda.matmul allows TF32. Two equal calls give equal bits. Bad ids
    fail a device-side assertion, and are ValueErrors on the CPU. There is no second derivative.

    `emoe_kernels.experts.expert_ffn` checks arguments and names what is wrong with them; the op checks again what its
    memory depends on.
    """
    offsets, slots = plan_experts(experts_NK, up_ESD.shape[0])
    tensors = (up_ESD, down_EDS, gate_ESD, up_bias_ES, gate_bias_ES, down_bias_D, weights_NK)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x_ND, *tensors))
    return _ffn(x_ND, experts_NK, offsets, slots, *tensors, activation, keep)[0]
