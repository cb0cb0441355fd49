"""Closed-form recovery: solve a layer's output matrix anew, so that chosen experts make up for those that are skipped.

Legend: N tokens, D model width, F neurons, E experts.
"""

from __future__ import annotations

import torch
from torch import nn

from emoe.calibration.stream import HiddenStates, StreamedModel
from emoe.conversion.layer import FFNProbe
from emoe.conversion.plan import Plan
from emoe.distributed import Group
from emoe.families.neurons import neuron_axis
from emoe.modeling.modeling_emoe import SparseFFN

RIDGE = 1.0
"""Pull towards the source's matrix, in units of the mean square of a neuron's activation where it is chosen."""


@torch.inference_mode()
def refit_output(
    stream: StreamedModel,
    layer: nn.Module,
    ffn: SparseFFN,
    index: int,
    states: HiddenStates,
    plan: Plan,
    group: Group,
) -> dict[str, torch.Tensor]:
    """Replace the output matrix, and its bias where there is one, by the ridge solution W of

        Σ_n |A_n W - y_n|² / |r_n|² + λ |W - W_source|²

    with A_n the activations of the neurons chosen for token n, y_n what all neurons give, r_n the residual stream. The
    tokens are those that reach the layer through the converted prefix. Ours, in the manner of SparseGPT's and
    OBC's reconstruction (Frantar and Alistarh 2022, arXiv 2208.11580, sec. 3). Memory: F² + F·D floats.

    Returns:
        The new tensors by role, "weight" and "bias", in the layer's own layout.
    """
    down = ffn.linear("down")
    transposed = neuron_axis(plan.reader.spec, "down", "weight") == 0
    weight_FD = (down.weight if transposed else down.weight.T).detach().float()
    extra = int(down.bias is not None)  # a column of ones stands for the bias
    size = plan.num_neurons + extra
    device = weight_FD.device
    gram_FF = torch.zeros(size, size, device=device)
    cross_FD = torch.zeros(size, weight_FD.shape[1], device=device)
    probe = FFNProbe(layer, plan)
    for _, _, out in stream.run(layer, index, states, advance=False, exact=False):
        x_ND, h_NF = probe.x.flatten(0, -2), probe.h.flatten(0, -2).float()
        ffn.router.top_k = plan.top_k
        experts_NK = ffn.router(x_ND, ffn).experts_NK
        ffn.router.top_k = ffn.num_experts
        chosen_NE = torch.zeros(len(x_ND), ffn.num_experts + 1, device=device)
        chosen_NE.scatter_(1, experts_NK % (ffn.num_experts + 1), 1.0)
        chosen_NF = chosen_NE[:, :-1].repeat_interleave(plan.num_neurons // ffn.num_experts, dim=1)
        missing_ND = (h_NF * (1 - chosen_NF)) @ weight_FD  # y - A W_source; the bias is in both
        scale_N1 = torch.linalg.vector_norm(out.float(), dim=-1).flatten()[:, None].clamp_min(1e-15)
        a_NF = h_NF * chosen_NF
        if extra:
            a_NF = torch.cat([a_NF, torch.ones_like(a_NF[:, :1])], 1)
        a_NF /= scale_N1
        gram_FF.addmm_(a_NF.T, a_NF)
        cross_FD.addmm_(a_NF.T, missing_ND / scale_N1)
    probe.remove()
    group.total(gram_FF, cross_FD)
    diagonal_F = gram_FF.diagonal()
    diagonal_F += RIDGE * diagonal_F[: plan.num_neurons].mean().clamp_min(1e-30)
    change_FD = torch.cholesky_solve(cross_FD, torch.linalg.cholesky(gram_FF))
    weight_FD = weight_FD + change_FD[: plan.num_neurons]
    weight = weight_FD if transposed else weight_FD.T
    down.weight.data = weight.to(down.weight.dtype).contiguous()
    found = {"weight": down.weight.data}
    if extra:
        down.bias.data = (down.bias.float() + change_FD[-1]).to(down.bias.dtype)
        found["bias"] = down.bias.data
    ffn.router.top_k = plan.top_k
    return found
