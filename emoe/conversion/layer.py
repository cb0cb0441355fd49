"""Convert one layer that is in memory: group its neurons, reorder them, build the gate.

Legend: N tokens, D model width, F neurons, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from emoe.calibration.statistics import NeuronStatistics
from emoe.calibration.stream import HiddenStates, StreamedModel
from emoe.checkpoint.partition import check_labels, order_of
from emoe.clustering import SplitInputs
from emoe.conversion.plan import Plan
from emoe.families.neurons import neuron_axis, reorder
from emoe.gating.oracle import expert_energies
from emoe.modeling.modeling_emoe import SparseFFN


class FFNProbe:
    """Watches a stock layer's FFN while the layer runs: its inputs x and the hidden activations h of every neuron."""

    def __init__(self, layer: nn.Module, plan: Plan) -> None:
        spec = plan.reader.spec
        self.holder = layer.get_submodule(spec.ffn) if spec.ffn else layer
        self.key, self.down = self.holder.get_submodule(spec.key), self.holder.get_submodule(spec.down)
        self.x: torch.Tensor | None = None
        self.h: torch.Tensor | None = None
        self._hooks = [
            self.key.register_forward_pre_hook(lambda _, args: setattr(self, "x", args[0])),
            self.down.register_forward_pre_hook(lambda _, args: setattr(self, "h", args[0])),
        ]

    def output_norms(self, plan: Plan) -> torch.Tensor:
        """‖w_down‖ of each neuron, (F,) fp32."""
        axis = neuron_axis(plan.reader.spec, "down", "weight")
        return torch.linalg.vector_norm(self.down.weight.detach().float(), dim=1 - axis)

    def keys(self, plan: Plan) -> torch.Tensor:
        """Rows of the matrix under the activation, (F, D) fp32."""
        weight = self.key.weight.detach().float()
        weight = weight.T if plan.reader.spec.transposed else weight
        return weight[: plan.num_neurons]

    def remove(self) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()


def layer_seed(plan: Plan, index: int) -> int:
    """Seed of a layer's own randomness: independent of which other layers are converted, and of resuming."""
    return plan.config.seed * 100_003 + index


@torch.inference_mode()
def observe(
    stream: StreamedModel, layer: nn.Module, index: int, states: HiddenStates, plan: Plan
) -> tuple[NeuronStatistics, HiddenStates]:
    """Advance the calibration stream through the stock layer; what its neurons did, and the FFN's inputs."""
    probe = FFNProbe(layer, plan)
    norm_F = probe.output_norms(plan)
    statistics = NeuronStatistics(plan.num_neurons, seed=layer_seed(plan, index))
    inputs = stream.hidden_states(tuple(states.data.shape))
    slices = stream.batches(states.data)
    for _ in stream.run(layer, index, states):
        statistics.update(probe.h.flatten(0, -2), norm_F)
        inputs.data[next(slices)] = probe.x.view(-1, *states.data.shape[1:]).cpu()
    probe.remove()
    return statistics, inputs


def split_neurons(layer: nn.Module, index: int, statistics: NeuronStatistics | None, plan: Plan) -> torch.Tensor:
    """The expert of each neuron, (F,) int32."""
    probe = FFNProbe(layer, plan)
    probe.remove()
    inputs = SplitInputs(
        num_neurons=plan.num_neurons,
        keys_FD=probe.keys(plan).cpu().numpy() if plan.split.needs == "keys" else None,
        features_FP=statistics.features_FP.numpy() if plan.split.needs == "features" else None,
    )
    labels = plan.split.split(
        inputs, plan.config.experts, seed=layer_seed(plan, index), assignment=plan.config.assignment
    )
    labels_F = torch.as_tensor(labels, dtype=torch.int32)
    check_labels(labels_F, plan.config.experts, f"split {plan.config.split}, layer {index}")
    return labels_F


def reorder_layer(layer: nn.Module, index: int, labels_F: torch.Tensor, plan: Plan) -> None:
    """Move the neurons of a layer in memory so that every expert is a contiguous block."""
    order_F, prefix = order_of(labels_F), plan.reader.layer_prefix(index)
    for name, (role, kind) in plan.reader.ffn_tensors(index).items():
        parameter = layer.get_parameter(name.removeprefix(prefix))
        parameter.data = reorder(plan.reader.spec, role, kind, parameter.data, order_F.to(parameter.device))


@torch.inference_mode()
def fit_gate(stream: StreamedModel, ffn: SparseFFN, inputs: HiddenStates, plan: Plan) -> Iterator[None]:
    """Fill the router's buffers from the FFN's inputs on calibration text; iterate to run."""
    fit = plan.gate.fit(plan.config.experts, plan.top_k, inputs.data.shape[-1], plan.num_neurons)
    norm_F = torch.linalg.vector_norm(ffn.weight_views().down_DF.float(), dim=0)
    for batch in stream.batches(inputs.data):
        x_ND = inputs.data[batch].flatten(0, 1).to(stream.device)
        h_NF = ffn.hidden(x_ND)
        fit.update(x_ND, h_NF, expert_energies(h_NF, norm_F, plan.config.experts))
        yield
    for name, value in fit.finish().items():
        buffer = ffn.router.get_buffer(name)
        ffn.router._buffers[name] = value.to(device=stream.device, dtype=buffer.dtype)
