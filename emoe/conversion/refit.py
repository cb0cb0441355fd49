"""Closed-form recovery: solve a layer's output matrix anew, so that chosen experts make up for those that are skipped.

Legend: N tokens, D model width, F neurons, E experts.
"""

from __future__ import annotations

import torch

from emoe.calibration.stream import HiddenStates
from emoe.conversion.layer import RouterFit
from emoe.families.neurons import neuron_axis

RIDGE = 1.0
"""Pull towards the source's matrix, in units of the mean square of a neuron's activation where it is chosen."""


@torch.inference_mode()
def refit_output(fit: RouterFit, states: HiddenStates) -> dict[str, torch.Tensor]:
    """Replace the output matrix, and its bias where there is one, by the ridge solution W of

        Σ_n |A_n W - y_n|² / |r_n|² + λ |W - W_source|²

    with A_n the activations of the neurons chosen for token n, y_n what all neurons give, r_n the residual stream
    (`states`, behind the layer). The tokens are those that reach the layer through the converted prefix. Ours, in the
    manner of OBC's reconstruction (Frantar and Alistarh 2022, arXiv 2208.11580, sec. 3). Memory: F² + F·D floats.

    Returns:
        The new tensors, "weight" and "bias", in the layer's own layout.
    """
    plan, down = fit.plan, fit.ffn.linear("down")
    transposed = neuron_axis(plan.reader.spec, "down", "weight") == 0
    weight_FD = (down.weight if transposed else down.weight.T).detach().float()
    extra = int(down.bias is not None)  # a column of ones stands for the bias
    size, device = plan.num_neurons + extra, weight_FD.device
    gram_FF, cross_FD = torch.zeros(size, size, device=device), torch.zeros(size, weight_FD.shape[1], device=device)
    for rows, h_NF, chosen_NF in fit.chosen():
        out_ND = states.data.flatten(0, 1)[rows].to(device)
        scale_N1 = torch.linalg.vector_norm(out_ND, dim=1, keepdim=True, dtype=torch.float32).clamp_min_(1e-15)
        missing_ND = (h_NF * (1 - chosen_NF)) @ weight_FD  # y - A W_source; the bias is in both
        a_NF = h_NF * chosen_NF
        if extra:
            a_NF = torch.cat([a_NF, torch.ones_like(a_NF[:, :1])], 1)
        a_NF /= scale_N1
        gram_FF.addmm_(a_NF.T, a_NF)
        cross_FD.addmm_(a_NF.T, missing_ND / scale_N1)
    fit.group.total(gram_FF, cross_FD)
    diagonal_F = gram_FF.diagonal()
    diagonal_F += RIDGE * diagonal_F[: plan.num_neurons].mean().clamp_min(1e-30)
    change_FD = torch.cholesky_solve(cross_FD, torch.linalg.cholesky(gram_FF))
    weight_FD = weight_FD + change_FD[: plan.num_neurons]
    down.weight.data = (weight_FD if transposed else weight_FD.T).to(down.weight.dtype).contiguous()
    found = {"weight": down.weight.data}
    if extra:
        down.bias.data = (down.bias.float() + change_FD[-1]).to(down.bias.dtype)
        found["bias"] = down.bias.data
    return found
