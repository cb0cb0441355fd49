"""First pass of a conversion: text through the dense model, to learn which neurons belong together and which layers
need more experts than others.

Legend: N tokens, D model width, F neurons, E experts, Q quantiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from emoe.calibration.statistics import NeuronStatistics
from emoe.calibration.stream import HiddenStates
from emoe.checkpoint.partition import check_labels
from emoe.clustering import SplitInputs
from emoe.clustering.capture import refine_by_capture
from emoe.conversion.layer import FFNProbe, layer_seed, row_blocks
from emoe.gating.energies import log_energies
from emoe.gating.levels import quantiles, sample_tokens, share_budget

if TYPE_CHECKING:
    from emoe.conversion.engine import Engine


MOST_BLOCKS = 4096
"""More than the blocks of any batch: keeps their numbers apart."""


@dataclass
class Survey:
    """What the first pass found, by layer index."""

    labels: dict[int, torch.Tensor] = field(default_factory=dict)
    """Expert of each neuron of the source, (F,) int32."""
    quantiles: dict[int, torch.Tensor] = field(default_factory=dict)
    """Of log(expert's energy / squared length of the residual stream), (Q,)."""
    reports: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Facts for people."""

    def shares(self, layers: list[int], num_experts: int) -> dict[int, torch.Tensor]:
        """Each layer's share of its experts under the budgets K = 1 … E, (E,); by sensitivity where measured."""
        if not self.quantiles:
            return dict.fromkeys(layers, torch.arange(1, num_experts + 1, dtype=torch.float64) / num_experts)
        share_EL = share_budget(torch.stack([self.quantiles[i] for i in layers]), num_experts)
        return {index: share_EL[:, place] for place, index in enumerate(layers)}

    def tensors(self) -> dict[str, torch.Tensor]:
        """For a state file."""
        found = {f"labels/{i}": t for i, t in self.labels.items()}
        return found | {f"quantiles/{i}": t for i, t in self.quantiles.items()}


@dataclass
class _Watched:
    """What the neurons of one layer did on the calibration text."""

    statistics: NeuronStatistics
    inputs: HiddenStates | None
    """FFN inputs, (sequences, T, D)."""
    shares: HiddenStates | None
    """Each neuron's share (h_j ‖w_j‖)² of its token's energy, (sequences, T, F)."""
    offset_N: torch.Tensor | None
    """Log of the token's energy over the squared length of the residual stream."""

    def batches(self, engine: Engine) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """(number, x (N, D), share_NF), a batch at a time."""
        for number, batch in engine.stream.numbered_batches(self.inputs.data):
            x_ND = self.inputs.data[batch].flatten(0, 1).to(engine.stream.device)
            yield number, x_ND, self.shares.data[batch].flatten(0, 1).to(engine.stream.device).float()


@torch.inference_mode()
def survey_layer(engine: Engine, layer: nn.Module, index: int, states: HiddenStates, survey: Survey) -> None:
    """Advance the text through the stock layer and add to the survey what is learnt of it."""
    with engine.watch("calibration"):
        watched = _watch(engine, layer, index, states)
    with engine.watch("clustering"):
        labels_F = split_neurons(engine, layer, index, watched.statistics)
    report = {"neurons": watched.statistics.report()}
    if engine.plan.refine_rounds:
        with engine.watch("refining"):
            labels_F, report["energy_held"] = _refine(engine, watched, labels_F)
    labels_F = torch.as_tensor(labels_F, dtype=torch.int32)
    check_labels(labels_F, engine.config.experts, f"split {engine.config.split}, layer {index}")
    survey.labels[index], survey.reports[index] = labels_F, report
    if engine.plan.allocation == "sensitivity":
        with engine.watch("calibration"):
            survey.quantiles[index] = quantiles(_scores(engine, watched, labels_F))


def _watch(engine: Engine, layer: nn.Module, index: int, states: HiddenStates) -> _Watched:
    stream, plan = engine.stream, engine.plan
    shape = tuple(states.data.shape)
    probe = FFNProbe(layer, plan)
    norm_F = probe.output_norms(plan)
    statistics = NeuronStatistics(plan.num_neurons, seed=layer_seed(plan, index), kind=plan.config.features)
    watched = _Watched(statistics, None, None, None)
    if plan.needs_magnitudes:
        watched.inputs = stream.hidden_states(shape)
        watched.shares = stream.hidden_states((*shape[:2], plan.num_neurons))
        watched.offset_N = torch.empty(shape[:2])
    for number, batch, out in stream.run(layer, index, states, exact=False):
        h_NF = probe.h.flatten(0, -2)
        if plan.needs_magnitudes:
            watched.inputs.data[batch] = probe.x.view(-1, *shape[1:]).cpu()
            offset_N = -out.float().square().sum(-1).flatten().clamp_min_(1e-30).log()
            share_NF = watched.shares.data[batch].flatten(0, 1)  # a view
        for part, rows in enumerate(row_blocks(len(h_NF))):
            h_RF = h_NF[rows].float()
            statistics.update(h_RF, norm_F, number * MOST_BLOCKS + part)
            if plan.needs_magnitudes:
                energy_RF = (h_RF * norm_F).square_()
                energy_R1 = energy_RF.sum(1, keepdim=True).clamp_min_(1e-30)
                share_NF[rows] = energy_RF.div_(energy_R1).to(share_NF)
                offset_N[rows] += energy_R1[:, 0].log()
        if plan.needs_magnitudes:
            watched.offset_N[batch] = offset_N.view(-1, shape[1]).cpu()
    probe.remove()
    statistics.reduce(engine.group.total)
    return watched


def split_neurons(engine: Engine, layer: nn.Module, index: int, statistics: NeuronStatistics | None) -> np.ndarray:
    """The expert of each neuron, (F,) int32: shared experts first, made of the neurons of most energy."""
    plan, c = engine.plan, engine.plan.config
    probe = FFNProbe(layer, plan)
    probe.remove()
    keys_FD = probe.keys(plan).cpu().numpy() if plan.split.needs == "keys" else None
    features_FP = statistics.features_FP.numpy() if plan.split.needs == "features" else None
    rest_F = np.arange(plan.num_neurons)
    labels_F = np.empty(plan.num_neurons, dtype=np.int32)
    if c.shared_experts:
        by_energy_F = statistics.energy_F.sort(descending=True, stable=True).indices.numpy()
        size = plan.num_neurons // c.experts
        labels_F[by_energy_F[: c.shared_experts * size]] = np.repeat(np.arange(c.shared_experts), size)
        rest_F = np.sort(by_energy_F[c.shared_experts * size :])
        keys_FD, features_FP = (None if t is None else t[rest_F] for t in (keys_FD, features_FP))
    inputs = SplitInputs(num_neurons=len(rest_F), keys_FD=keys_FD, features_FP=features_FP)
    found = plan.split.split(
        inputs,
        c.experts - c.shared_experts,
        seed=layer_seed(plan, index),
        assignment=c.assignment,
        rough=plan.refine_rounds > 0,
    )
    labels_F[rest_F] = found + c.shared_experts
    return labels_F


def _refine(engine: Engine, watched: _Watched, labels_F: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """Refinement of the experts that are not shared."""
    shared = engine.config.shared_experts
    chosen_F = labels_F >= shared
    columns = torch.as_tensor(np.flatnonzero(chosen_F)) if shared else slice(None)

    def batches() -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        return ((number, x_ND, share_NF[:, columns]) for number, x_ND, share_NF in watched.batches(engine))

    better_F = labels_F.copy()
    better_F[chosen_F], held = refine_by_capture(
        batches,
        labels_F[chosen_F] - shared,
        engine.config.experts - shared,
        rounds=engine.plan.refine_rounds,
        width=watched.inputs.data.shape[2],
        device=engine.stream.device,
        total=engine.group.total,
    )
    better_F[chosen_F] += shared
    return better_F, [round(value, 4) for value in held]


def _scores(engine: Engine, watched: _Watched, labels_F: torch.Tensor) -> torch.Tensor:
    """log(energy / squared length of the residual stream) of experts on a sample of tokens, (N, E)."""
    experts = engine.config.experts
    rows = torch.arange(watched.offset_N.numel()).view_as(watched.offset_N)
    parts = [rows[:0].flatten()]
    for number, batch in engine.stream.numbered_batches(rows):
        mine = rows[batch].flatten()
        parts.append(mine[sample_tokens(len(mine), engine.config.calibration_tokens, experts, number)])
    sample = torch.cat(parts)
    share_NF = watched.shares.data.flatten(0, 1)[sample].float()
    share_NE = torch.zeros(len(share_NF), experts).index_add_(1, labels_F.long(), share_NF)
    score_NE = log_energies(share_NE) + watched.offset_N.flatten()[sample][:, None]
    score_NE[:, : engine.config.shared_experts] = 1e6  # every token wants them
    return torch.cat(engine.group.gather(score_NE))
