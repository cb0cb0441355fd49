"""Expert linear layers in PyTorch alone: computes the chosen experts and nothing else, forward and backward.

Legend: N tokens, D model width, E experts, S width of an expert, K experts chosen per token, R <= N * K (token,
expert) pairs sorted by expert, G pairs of one group of neighbouring experts.

The plan and the groups are those of the expert FFN, see `emoe_kernels.experts.portable`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..experts.portable import (
    Plan,
    bad_ids,
    empty_grad,
    groups,
    make_plan,
    pair_weights,
    project,
    wide_dtype,
    without_autocast,
)


def _by_pair(tensor_NKS: Tensor) -> Tensor:
    """(N * K, S): the rows that `Plan.slots_R` numbers."""
    return tensor_NKS.flatten(0, 1)


def _empty_slots(like: Tensor, plan: Plan, slots: int, width: int) -> Tensor:
    """(N * K, S) about to be written at `plan.slots_R`, zero in unused slots."""
    allocate = like.new_empty if plan.slots_R.numel() == slots else like.new_zeros
    return allocate(slots, width)


class _ExpertLinear(torch.autograd.Function):
    """Keeps x."""

    @staticmethod
    def forward(ctx, x_ND, plan, weight_ESD, bias_ES, slots):
        out_XS = _empty_slots(x_ND, plan, slots, weight_ESD.shape[1])
        for pairs, blocks in groups(plan.offsets):
            x_GD = x_ND.index_select(0, plan.tokens_R[pairs])
            out_GS = x_ND.new_empty(len(x_GD), weight_ESD.shape[1])
            project(x_GD, weight_ESD, bias_ES, blocks, out_GS)
            out_XS.index_copy_(0, plan.slots_R[pairs], out_GS)
        ctx.save_for_backward(x_ND, weight_ESD, plan.tokens_R, plan.slots_R)
        ctx.offsets = plan.offsets
        return out_XS

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_XS):
        x_ND, weight_ESD, tokens_R, slots_R = ctx.saved_tensors
        need_x, _, need_weight, need_bias, _ = ctx.needs_input_grad
        wide = wide_dtype(x_ND.dtype)
        dx_ND = torch.zeros_like(x_ND, dtype=wide, memory_format=torch.contiguous_format) if need_x else None
        dweight_ESD = empty_grad(weight_ESD, ctx.offsets) if need_weight else None
        dbias_ES = x_ND.new_zeros(weight_ESD.shape[:2]) if need_bias else None
        with without_autocast(x_ND.device.type):
            for pairs, blocks in groups(ctx.offsets):
                tokens_G = tokens_R[pairs]
                dout_GS = dout_XS.index_select(0, slots_R[pairs])
                x_GD = x_ND.index_select(0, tokens_G) if need_weight else None
                for e, rows in blocks:
                    if need_weight:
                        torch.mm(dout_GS[rows].t(), x_GD[rows], out=dweight_ESD[e])
                    if need_bias:
                        torch.sum(dout_GS[rows], 0, out=dbias_ES[e])
                    if need_x:
                        # Tokens are distinct within an expert, so that the order of the sums is fixed.
                        dx_ND.index_add_(0, tokens_G[rows], torch.mm(dout_GS[rows], weight_ESD[e]).to(wide))
        return dx_ND.to(x_ND.dtype) if need_x else None, None, dweight_ESD, dbias_ES, None


class _ExpertCombine(torch.autograd.Function):
    """Keeps h."""

    @staticmethod
    def forward(ctx, h_XS, plan, weight_EDS, bias_D, weights_NK, tokens):
        dtype, wide = h_XS.dtype, wide_dtype(h_XS.dtype)
        y_ND = h_XS.new_zeros(tokens, weight_EDS.shape[1], dtype=wide)
        weights_R1 = pair_weights(weights_NK, plan, dtype)
        for pairs, blocks in groups(plan.offsets):
            tokens_G = plan.tokens_R[pairs]
            h_GS = h_XS.index_select(0, plan.slots_R[pairs])
            if weights_R1 is not None:
                h_GS = (h_GS.to(wide) * weights_R1[pairs]).to(dtype)
            for e, rows in blocks:
                y_ND.index_add_(0, tokens_G[rows], torch.mm(h_GS[rows], weight_EDS[e].t()).to(wide))
        if bias_D is not None:
            y_ND += bias_D
        ctx.save_for_backward(h_XS, weight_EDS, weights_NK, plan.tokens_R, plan.slots_R)
        ctx.offsets = plan.offsets
        return y_ND.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_ND):
        h_XS, weight_EDS, weights_NK, tokens_R, slots_R = ctx.saved_tensors
        need_h, _, need_weight, need_bias, need_weights, _ = ctx.needs_input_grad
        dtype, wide, plan = h_XS.dtype, wide_dtype(h_XS.dtype), Plan(ctx.offsets, tokens_R, slots_R)
        weights_R1 = pair_weights(weights_NK, plan, dtype)
        dh_XS = _empty_slots(h_XS, plan, *h_XS.shape) if need_h else None
        dweight_EDS = empty_grad(weight_EDS, ctx.offsets) if need_weight else None
        dweights_NK = torch.zeros_like(weights_NK, memory_format=torch.contiguous_format) if need_weights else None
        with without_autocast(dy_ND.device.type):
            for pairs, blocks in groups(ctx.offsets):
                slots_G, w_G1 = slots_R[pairs], None if weights_R1 is None else weights_R1[pairs]
                dy_GD = dy_ND.index_select(0, tokens_R[pairs])
                h_GS = h_XS.index_select(0, slots_G).to(wide) if need_weight or need_weights else None
                if need_weight:
                    hw_GS = (h_GS if w_G1 is None else h_GS * w_G1).to(dtype)
                    for e, rows in blocks:
                        torch.mm(dy_GD[rows].t(), hw_GS[rows], out=dweight_EDS[e])
                if not (need_h or need_weights):
                    continue
                dh_GS = h_XS.new_empty(len(dy_GD), h_XS.shape[1])
                for e, rows in blocks:
                    torch.mm(dy_GD[rows], weight_EDS[e], out=dh_GS[rows])
                if need_weights:
                    dweights_NK.view(-1)[slots_G] = (dh_GS.to(wide) * h_GS).sum(1).to(weights_NK.dtype)
                if need_h:
                    if w_G1 is not None:
                        dh_GS = (dh_GS.to(wide) * w_G1).to(dtype)
                    dh_XS.index_copy_(0, slots_G, dh_GS)
            dbias_D = dy_ND.sum(0, dtype=wide).to(dtype) if need_bias else None
        return dh_XS, None, dweight_EDS, dbias_D, dweights_NK, None


# Where gathering the experts of a few tokens beats a GEMM an expert, which then is all call overhead.
# Microseconds bmm / grouped; AMD Zen 3, fp32, 1 thread, other work beside, E 16 or 32, K 2:
#                 KiB a block   N = 1       N = 4        N = 8        N = 16
#   D 128, S 128       64     146 / 412   319 / 664    371 / 747    587 / 962
#   D 128, S 256      128     396 / 423   453 / 992    966 / 1418  2010 / 2032
#   D 384, S 384      576     211 / 670  1682 / 1677  3659 / 1796  9061 / 3212
_FEW_BYTES = 2 * 1024 * 1024


def is_few(experts_NK: Tensor, weight: Tensor) -> bool:
    """Whether so few pairs and small experts (E, S, D) go through `torch.bmm` on copies of the chosen weights.

    Only under `torch.no_grad`: the gradient of a copy is as large as all experts.
    """
    _, rows, columns = weight.shape
    copied = experts_NK.numel() * rows * columns * weight.element_size()
    return not torch.is_grad_enabled() and copied <= _FEW_BYTES


def _gathered(experts_NK: Tensor, weight_ESD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ids (N * K), their weights transposed (N * K, D, S), and which slots are unused, (N * K, 1), or None."""
    ids_X, E = experts_NK.reshape(-1), weight_ESD.shape[0]
    low, high = map(int, ids_X.aminmax())
    if low < -1 or high >= E:
        raise bad_ids(E)
    unused_X1 = (ids_X < 0).unsqueeze(1) if low < 0 else None
    ids_X = ids_X.clamp_min(0)
    if weight_ESD.stride(1) == 1:  # stored (E, D, S), as ModuleFormer's are: copied in that order
        return ids_X, weight_ESD.mT.index_select(0, ids_X), unused_X1
    return ids_X, weight_ESD.index_select(0, ids_X).mT, unused_X1


def _linear_few(x_ND: Tensor, experts_NK: Tensor, weight_ESD: Tensor, bias_ES: Tensor | None) -> Tensor:
    N, K = experts_NK.shape
    ids_X, weight_XDS, unused_X1 = _gathered(experts_NK, weight_ESD)
    x_X1D = x_ND.repeat_interleave(K, 0).unsqueeze(1)
    if bias_ES is None:
        out_XS = torch.bmm(x_X1D, weight_XDS).squeeze(1)
    else:  # one rounding, as in `project`
        out_XS = torch.baddbmm(bias_ES.index_select(0, ids_X).unsqueeze(1), x_X1D, weight_XDS).squeeze(1)
    if unused_X1 is not None:
        out_XS.masked_fill_(unused_X1, 0)
    return out_XS.view(N, K, -1)


def _combine_few(
    h_NKS: Tensor, experts_NK: Tensor, weight_EDS: Tensor, bias_D: Tensor | None, weights_NK: Tensor | None
) -> Tensor:
    (N, K, _), dtype, wide = h_NKS.shape, h_NKS.dtype, wide_dtype(h_NKS.dtype)
    _, weight_XSD, unused_X1 = _gathered(experts_NK, weight_EDS)
    if weights_NK is not None:
        h_NKS = (h_NKS.to(wide) * weights_NK.to(wide).unsqueeze(2)).to(dtype)
    part_XD = torch.bmm(h_NKS.reshape(N * K, 1, -1), weight_XSD).squeeze(1).to(wide)
    if unused_X1 is not None:
        part_XD.masked_fill_(unused_X1, 0)
    y_ND = part_XD.view(N, K, -1).sum(1)
    if bias_D is not None:
        y_ND += bias_D
    return y_ND.to(dtype)


def expert_linear(x_ND: Tensor, experts_NK: Tensor, weight_ESD: Tensor, bias_ES: Tensor | None = None) -> Tensor:
    """What `emoe_kernels.linear.expert_linear` computes, on stacked weights of any strides."""
    N, K = experts_NK.shape
    with without_autocast(x_ND.device.type):
        if N * K and is_few(experts_NK, weight_ESD):
            return _linear_few(x_ND, experts_NK, weight_ESD, bias_ES)
        plan = make_plan(experts_NK, weight_ESD.shape[0])
        return _ExpertLinear.apply(x_ND, plan, weight_ESD, bias_ES, N * K).view(N, K, weight_ESD.shape[1])


def expert_combine(
    h_NKS: Tensor,
    experts_NK: Tensor,
    weight_EDS: Tensor,
    bias_D: Tensor | None = None,
    weights_NK: Tensor | None = None,
) -> Tensor:
    """What `emoe_kernels.linear.expert_combine` computes, on stacked weights of any strides."""
    with without_autocast(h_NKS.device.type):
        if experts_NK.numel() and is_few(experts_NK, weight_EDS):
            return _combine_few(h_NKS, experts_NK, weight_EDS, bias_D, weights_NK)
        plan = make_plan(experts_NK, weight_EDS.shape[0])
        return _ExpertCombine.apply(_by_pair(h_NKS), plan, weight_EDS, bias_D, weights_NK, len(experts_NK))
