"""Convert one layer that is in memory: group its neurons, reorder them, fit its router.

Legend: N tokens, D model width, F neurons, E experts, K experts chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from emoe.calibration.stream import HiddenStates, StreamedModel
from emoe.checkpoint.partition import order_of
from emoe.conversion.plan import Plan
from emoe.distributed import Group
from emoe.families.neurons import neuron_axis, reorder
from emoe.gating.energies import ExpertEnergies, log_energies
from emoe.gating.levels import fit_levels, sample_tokens
from emoe.modeling.ffn_emoe import SparseFFN, WeightViews

SMALLEST = 4096
"""Entries of an expert's output matrix below which computing all and masking is faster than computing it alone."""

ROWS = 512
"""Tokens whose (rows, F) tables exist at a time, in fp32: 23 MiB each at F 11,008."""

ORACLE = "oracle"
"""Gate that looks at the answer, for measurement alone: it chooses by the true energies."""


class FFNProbe:
    """Watches a layer's FFN while the layer runs: inputs x, hidden activations h of every neuron, output y."""

    def __init__(self, layer: nn.Module, plan: Plan) -> None:
        spec = plan.reader.spec
        self.holder = layer.get_submodule(spec.ffn) if spec.ffn else layer
        self.key, self.down = self.holder.get_submodule(spec.key), self.holder.get_submodule(spec.down)
        self.x: torch.Tensor | None = None
        self.h: torch.Tensor | None = None
        self.y: torch.Tensor | None = None
        self._hooks = [
            self.key.register_forward_pre_hook(lambda _, args: setattr(self, "x", args[0])),
            self.down.register_forward_pre_hook(lambda _, args: setattr(self, "h", args[0])),
            self.down.register_forward_hook(lambda _, args, out: setattr(self, "y", out)),
        ]

    def output_norms(self, plan: Plan) -> torch.Tensor:
        """‖w_down‖ of each neuron, (F,) fp32."""
        axis = neuron_axis(plan.reader.spec, "down", "weight")
        return torch.linalg.vector_norm(self.down.weight.detach(), dim=1 - axis, dtype=torch.float32)

    def keys(self, plan: Plan) -> torch.Tensor:
        """Rows of the matrix under the activation, (F, D) fp32: a copy."""
        weight = self.key.weight.detach()
        weight = weight.T if plan.reader.spec.transposed else weight
        return weight[: plan.num_neurons].to(torch.float32, copy=True)

    def remove(self) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()


def row_blocks(count: int) -> Iterator[slice]:
    """Slices of at most `ROWS` of `count` rows."""
    return (slice(start, min(start + ROWS, count)) for start in range(0, count, ROWS))


def layer_seed(plan: Plan, index: int) -> int:
    """Seed of a layer's own randomness: independent of which other layers are converted, and of resuming."""
    return plan.config.seed * 100_003 + index


def reordered(plan: Plan, index: int, tensors: dict[str, torch.Tensor], labels_F: torch.Tensor) -> dict[str, Any]:
    """The FFN's tensors, as stored, with the neurons of every expert in one block."""
    order_F = order_of(labels_F)
    return {
        name: reorder(plan.reader.spec, role, kind, tensors[name], order_F)
        for name, (role, kind) in plan.reader.ffn_tensors(index).items()
    }


@torch.inference_mode()
def put_in_order(layer: nn.Module, ffn: SparseFFN, prefix: str, moved: dict[str, torch.Tensor]) -> float:
    """Give the layer its reordered tensors; the greatest relative change of the FFN's output with all experts on."""
    first = next(iter(layer.parameters()))
    generator = torch.Generator().manual_seed(0)
    width = ffn.router.width
    x_ND = torch.randn(16, width, generator=generator).to(device=first.device, dtype=first.dtype)
    ffn.router.top_k = ffn.num_experts
    before_ND = ffn.ffn(x_ND).float()
    for name, tensor in moved.items():
        parameter = layer.get_parameter(name.removeprefix(prefix))
        parameter.data = tensor.to(device=parameter.device, dtype=parameter.dtype)
    after_ND = ffn.ffn(x_ND).float()
    return ((after_ND - before_ND).norm() / before_ND.norm().clamp_min(1e-30)).item()


def let_oracle_choose(ffn: SparseFFN, num_experts: int) -> None:
    """From now on the router chooses by the true energies, which costs as much as the dense layer."""
    energies = ExpertEnergies(ffn.weight_views().down_DF, num_experts)

    def choose(router: nn.Module, arguments: tuple, routing: Any) -> Any:
        logits_NE = log_energies(energies(ffn.hidden(arguments[0])))
        return routing._replace(experts_NK=router.choose(logits_NE), logits_NE=logits_NE)

    ffn.router.register_forward_hook(choose)
    if ffn.linear("down").weight.numel() // num_experts < SMALLEST:
        ffn.activation = None  # masked: a product for each of so many tiny experts takes longer


def let_go_of_file(layer: nn.Module, tensors: dict[str, torch.Tensor], moved: dict[str, torch.Tensor]) -> None:
    """Copy what has not been copied yet: one tensor that still lies in the mapped file keeps all its pages resident."""
    copies = {tensor.data_ptr(): tensor.clone() for name, tensor in tensors.items() if name not in moved}
    for name, tensor in tensors.items():
        tensors[name] = copies.get(tensor.data_ptr(), tensor)
    for parameter in layer.parameters():
        parameter.data = copies.get(parameter.data_ptr(), parameter.data)


class RouterFit:
    """Fits a converted layer to what reaches it: the gate, how many experts a token gets, what makes up for the rest.

    Args:
        share_E: this layer's share of its experts under the budgets K = 1 … E.
    """

    def __init__(self, stream: StreamedModel, ffn: SparseFFN, plan: Plan, group: Group, share_E: torch.Tensor) -> None:
        self.stream, self.ffn, self.plan, self.group, self.share_E = stream, ffn, plan, group, share_E
        self.experts = plan.config.experts
        self.inputs: HiddenStates | None = None
        self.hidden: HiddenStates | None = None

    @torch.inference_mode()
    def run(self, layer: nn.Module, index: int, states: HiddenStates) -> None:
        """Advance the text through the layer with all experts on, and fill the router's buffers."""
        plan, config, stream = self.plan, self.plan.config, self.stream
        # Detached: refitting puts another tensor into the parameter, and these must stay what they are.
        self.dense = WeightViews(*(None if t is None else t.detach() for t in self.ffn.weight_views()))
        energies = ExpertEnergies(self.dense.down_DF, self.experts)
        shape = tuple(states.data.shape)
        self.inputs, self.hidden = stream.hidden_states(shape), stream.hidden_states((*shape[:2], plan.num_neurons))
        fit = None
        if plan.gate.fit:
            fit = plan.gate.fit(self.experts, plan.top_k, self.ffn.router.width, plan.num_neurons)
        self.ffn.router.top_k = self.experts
        probe, sampled = FFNProbe(layer, plan), []
        for number, batch, out in stream.run(layer, index, states, exact=False):
            x_ND, h_NF = probe.x.flatten(0, -2), probe.h.flatten(0, -2)
            self.inputs.data[batch] = x_ND.view(-1, *shape[1:]).cpu()
            self.hidden.data[batch] = h_NF.view(-1, shape[1], plan.num_neurons).cpu()
            # Relative to the residual stream: a token of great norm needs a great contribution to be moved.
            scale_N = out.float().square().sum(-1).flatten()
            energy_NE = torch.empty(len(x_ND), self.experts, device=x_ND.device)
            for rows in row_blocks(len(x_ND)):
                h_RF = h_NF[rows].float()
                energy_NE[rows] = energies(h_RF)
                if fit:
                    fit.update(x_ND[rows], h_RF, energy_NE[rows], scale_N[rows])
            sample = sample_tokens(len(x_ND), config.calibration_tokens, self.experts, number)
            sampled.append(energy_NE[sample] if config.gate == ORACLE else x_ND[sample])
        probe.remove()
        if fit:
            fit.reduce(self.group.total)
            self._set(fit.finish())
        if "bounds" in self.ffn.router._buffers:
            score = log_energies if config.gate == ORACLE else lambda x_ND: self.ffn.router.logits(x_ND, self.ffn)
            own_NE = torch.cat([score(part).cpu() for part in sampled] or [torch.empty(0, self.experts)])
            logits_NE = torch.cat(self.group.gather(own_NE))
            self._set(fit_levels(logits_NE, self.share_E, plan.routing, config.shared_experts))
        self.ffn.router.top_k = plan.top_k

    def chosen(self) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """(tokens, activations (N, F), 1 where the neuron's expert is chosen and 0 elsewhere), a block at a time."""
        inputs_ND, hidden_NF = self.inputs.data.flatten(0, 1), self.hidden.data.flatten(0, 1)
        for rows in row_blocks(len(inputs_ND)):
            x_ND = inputs_ND[rows].to(self.stream.device)
            experts_NK = self.ffn.router(x_ND, self.ffn).experts_NK
            mask_NE = torch.zeros(len(x_ND), self.experts + 1, device=x_ND.device)
            mask_NE.scatter_(1, experts_NK % (self.experts + 1), 1.0)
            chosen_NF = mask_NE[:, :-1].repeat_interleave(self.plan.num_neurons // self.experts, dim=1)
            yield rows, hidden_NF[rows].to(self.stream.device).float(), chosen_NF

    @torch.inference_mode()
    def compensate(self) -> None:
        """Put into the router what all experts give on average, less what the chosen ones give."""
        before, after = self.dense, self.ffn.weight_views()
        sums_2F = torch.zeros(2, self.plan.num_neurons, dtype=torch.float64)
        tokens = torch.zeros(1, dtype=torch.float64)
        for _, h_NF, chosen_NF in self.chosen():
            sums_2F += torch.stack([h_NF.sum(0), (h_NF * chosen_NF).sum(0)]).cpu()
            tokens += len(h_NF)
        self.group.total(sums_2F, tokens)
        all_F, chosen_F = (sums_2F / tokens.clamp_min(1)).float().to(before.down_DF.device)
        missing_D = torch.zeros(self.ffn.router.width, device=all_F.device)
        for rows in row_blocks(len(all_F)):  # no fp32 copy of a whole matrix
            missing_D += all_F[rows] @ before.down_DF.T[rows].float() - chosen_F[rows] @ after.down_DF.T[rows].float()
        if before.down_bias_D is not None:
            missing_D += before.down_bias_D.float() - after.down_bias_D.float()
        self._set({"compensation": missing_D})

    @torch.inference_mode()
    def make_sparse(self, states: HiddenStates) -> None:
        """From what the layer gave with all experts on to what it gives with the chosen ones, without another pass.

        Only where the family adds the FFN's output to the residual stream as it is. `states` are as `run` left them.
        """
        before, after = self.dense, self.ffn.weight_views()
        before_FD, after_FD = before.down_DF.T, after.down_DF.T
        refitted = after.down_DF.data_ptr() != before.down_DF.data_ptr()
        states_ND = states.data.flatten(0, 1)  # a view
        for rows, h_NF, chosen_NF in self.chosen():
            times = lambda a_NF, b_FD: (a_NF.to(b_FD.dtype) @ b_FD).float()  # noqa: E731 - in the layer's own type
            change_ND = times(h_NF * (chosen_NF - 1), before_FD)
            if refitted:
                change_ND += times(h_NF * chosen_NF, after_FD) - times(h_NF * chosen_NF, before_FD)
                if after.down_bias_D is not None:
                    change_ND += after.down_bias_D - before.down_bias_D
            change_ND = self.ffn._compensated(change_ND)
            states_ND[rows] += change_ND.to(states_ND.dtype).cpu()

    def _set(self, buffers: dict[str, torch.Tensor]) -> None:
        for name, value in buffers.items():
            old = self.ffn.router._buffers[name]
            self.ffn.router._buffers[name] = value.to(device=old.device, dtype=old.dtype)
