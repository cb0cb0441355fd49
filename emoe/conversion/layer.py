"""Convert one layer that is in memory: group its neurons, reorder them, fit its router.

Legend: N tokens, D model width, F neurons, E experts, K experts chosen.
"""

from __future__ import annotations

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
from emoe.modeling.modeling_emoe import SparseFFN

SMALLEST = 4096
"""Entries of an expert's output matrix below which computing all and masking is faster than computing it alone."""

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
        """Rows of the matrix under the activation, (F, D) fp32."""
        weight = self.key.weight.detach()
        weight = weight.T if plan.reader.spec.transposed else weight
        return weight[: plan.num_neurons].float()

    def remove(self) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()


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


class RouterFit:
    """Fits a router on what reaches its layer: the gate, how many experts a token gets, what skipped ones add.

    Args:
        share_E: this layer's share of its experts under the budgets K = 1 … E.
    """

    def __init__(self, stream: StreamedModel, ffn: SparseFFN, plan: Plan, group: Group, share_E: torch.Tensor) -> None:
        self.stream, self.ffn, self.plan, self.group, self.share_E = stream, ffn, plan, group, share_E
        self.energies = ExpertEnergies(ffn.weight_views().down_DF, plan.config.experts)
        self.output_D = torch.zeros(ffn.router.width, dtype=torch.float64)

    @torch.inference_mode()
    def run(self, layer: nn.Module, index: int, states: HiddenStates, *, advance: bool) -> None:
        """See the text through the layer with all experts on, then fill the router's buffers."""
        plan, config = self.plan, self.plan.config
        fit = (
            plan.gate.fit(config.experts, plan.top_k, self.ffn.router.width, plan.num_neurons)
            if plan.gate.fit
            else None
        )
        self.ffn.router.top_k = config.experts
        probe, kept, energies = FFNProbe(layer, plan), [], []
        sample = sample_tokens(config.calibration_tokens, config.experts)
        for _, _, out in self.stream.run(layer, index, states, advance=advance, exact=False):
            x_ND, h_NF = probe.x.flatten(0, -2), probe.h.flatten(0, -2)
            energy_NE = self.energies(h_NF)
            if fit:
                # Relative to the residual stream: a token of great norm needs a great contribution to be moved.
                fit.update(x_ND, h_NF, energy_NE, out.float().square().sum(-1).flatten())
            if config.compensate:
                self.output_D += probe.y.flatten(0, -2).sum(0, dtype=torch.float64).cpu()
            kept.append(x_ND[sample])
            if config.gate == ORACLE:
                energies.append(energy_NE[sample])
        probe.remove()
        if fit:
            fit.reduce(self.group.total)
            self._set(fit.finish())
        if "bounds" in self.ffn.router._buffers:
            logits = (
                [log_energies(e) for e in energies] if energies else [self.ffn.router.logits(x, self.ffn) for x in kept]
            )
            own_NE = torch.cat(logits).cpu() if logits else torch.empty(0, config.experts)
            logits_NE = torch.cat(self.group.gather(own_NE))
            self._set(fit_levels(logits_NE, self.share_E, plan.routing, config.shared_experts))
        self.ffn.router.top_k = plan.top_k
        if config.compensate:
            self._compensate(layer, index, states)

    def _set(self, buffers: dict[str, torch.Tensor]) -> None:
        for name, value in buffers.items():
            old = self.ffn.router._buffers[name]
            self.ffn.router._buffers[name] = value.to(device=old.device, dtype=old.dtype)

    def _compensate(self, layer: nn.Module, index: int, states: HiddenStates) -> None:
        """What the skipped experts would have added, on average."""
        inner, sparse_D, tokens = self.ffn.ffn, torch.zeros_like(self.output_D), torch.zeros(1, dtype=torch.float64)

        def watched(x: torch.Tensor) -> torch.Tensor:
            y = inner(x)
            sparse_D.add_(y.flatten(0, -2).sum(0, dtype=torch.float64).cpu())
            tokens.add_(y.flatten(0, -2).shape[0])
            return y

        self.ffn.ffn = watched
        for _ in self.stream.run(layer, index, states, advance=False, exact=False):
            pass
        del self.ffn.ffn
        self.group.total(sparse_D, self.output_D, tokens)
        self._set({"compensation": (self.output_D - sparse_D) / tokens.clamp_min(1)})
