"""Reordering neurons: one permutation moves rows of the input matrices, their biases, and columns of the output."""

from __future__ import annotations

import torch

from emoe.families.spec import FamilySpec


def neuron_axis(spec: FamilySpec, role: str, parameter: str) -> int | None:
    """Axis of a tensor along which the neurons lie; None where they do not (the shared output bias).

    Args:
        role: "gate", "up" or "down".
        parameter: "weight" or "bias".
    """
    if parameter == "bias":
        return None if role == "down" else 0
    if role == "down":
        return 0 if spec.transposed else 1
    return 1 if spec.transposed else 0


def reorder(spec: FamilySpec, role: str, parameter: str, tensor: torch.Tensor, order_F: torch.Tensor) -> torch.Tensor:
    """The tensor with neuron ``order_F[j]`` at place j; a fused gate-up matrix has both halves reordered alike."""
    axis = neuron_axis(spec, role, parameter)
    if axis is None:
        return tensor
    if spec.fused and role == "up":
        order_F = torch.cat([order_F, order_F + len(order_F)])
    return tensor.index_select(axis, order_F)
