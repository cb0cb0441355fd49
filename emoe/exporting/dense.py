"""Back to the dense model: the neurons return to their original places, the gates go.

After pruning that is a smaller dense model of all the neurons that are left; added ones come behind the others.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from emoe.checkpoint.companions import copy_companions, source_config
from emoe.checkpoint.partition import GONE, Partition, digest_ffn, inverse_of, order_of
from emoe.checkpoint.partition import NAME as PARTITION
from emoe.checkpoint.reader import CheckpointReader, read_json
from emoe.checkpoint.writer import ShardWriter
from emoe.errors import UserError
from emoe.families import FamilySpec
from emoe.families.neurons import neuron_axis, reorder
from emoe.runtime import atomic_directory, require_space, write_text


def export_dense(model: Path, output: Path, progress: Callable[[str, int, int], None], *, pad: bool = False) -> dict:
    """Write the stock checkpoint that a converted one was made from, or became in fine-tuning or surgery.

    Args:
        pad: where layers differ in width, which no stock config can say, add neurons of zeros to the narrower ones.

    Returns:
        ``{"layers": converted layers, "identical": how many of them have the source's weights bit for bit}``; the rest
        have been trained since. After surgery also ``{"width": F, "padded": neurons of zeros}``.

    Raises:
        UserError: not a converted checkpoint, a damaged one, or layers of different widths without `pad`.
    """
    config = read_json(model / "config.json")
    if not str(config.get("model_type", "")).startswith("emoe_"):
        raise UserError(f"--model: {model} is not a converted checkpoint (model_type '{config.get('model_type')}')")
    if config.get("emoe_copies"):
        raise UserError(f"--model: the experts of {model} are copies of whole FFNs; there is no dense model of them")
    reader = CheckpointReader(model, source_config(config))
    partition = Partition.load(model / PARTITION)
    if sorted(partition.labels) != sorted(config["emoe_layers"]):
        raise UserError(f"--model: {model / PARTITION} and config.json name different layers; convert the model again")
    widths = _widths(reader, config, partition, model)
    width = max(widths.values())
    if len(set(widths.values())) > 1 and not pad:
        raise UserError(
            f"--to: the FFNs have {min(widths.values())} to {width} neurons, a stock {reader.spec.model_type} needs "
            "the same in all layers; prune all layers with --scope layer, or add --pad for neurons of zeros"
        )
    require_space(output, reader.total_bytes(), "--output")
    identical = 0
    with atomic_directory(output) as folder:
        writer = ShardWriter(folder, reader.num_layers + 1)
        writer.write(0, reader.read(reader.layer_names(None)))
        for index in range(reader.num_layers):
            progress("writing", index, reader.num_layers)
            names = [n for n in reader.layer_names(index) if ".router." not in n]
            tensors, roles = reader.read(names), reader.ffn_tensors(index)
            if index in partition.labels:
                back_F = inverse_of(order_of(partition.labels[index]))
                back_F = torch.cat([back_F, torch.arange(len(back_F), widths[index])])
                restored = {n: reorder(reader.spec, *roles[n], tensors[n], back_F) for n in roles}
                identical += digest_ffn(roles, restored) == partition.digests[index]
                tensors |= restored
            tensors |= {n: _padded(reader.spec, *roles[n], tensors[n], width) for n in roles}
            writer.write(index + 1, tensors)
        writer.finish()
        raw = reader.raw_config if width == reader.spec.hidden_width(reader.config) else _with_width(reader, width)
        write_text(folder / "config.json", json.dumps(raw, indent=2, sort_keys=True) + "\n")
        copy_companions(model, folder)
    progress("done", reader.num_layers, reader.num_layers)
    result = {"layers": len(partition.labels), "identical": identical}
    if set(widths.values()) == {reader.spec.hidden_width(reader.config)}:
        return result
    return result | {"width": width, "padded": sum(width - own for own in widths.values())}


def _widths(reader: CheckpointReader, config: dict[str, Any], partition: Partition, model: Path) -> dict[int, int]:
    """Neurons of every layer's FFN, from config.json; the partition and the weights must agree."""
    stated = reader.spec.hidden_width(reader.config)
    widths = dict.fromkeys(range(reader.num_layers), stated)
    groups = config.get("emoe_groups") or [None] * len(config["emoe_layers"])
    for index, group in zip(config["emoe_layers"], groups, strict=True):
        widths[index] = sum(group) * config["emoe_expert_size"] if group else stated
        left = int((partition.labels[index] != GONE).sum())
        (down,) = (n for n, role in reader.ffn_tensors(index).items() if role == ("down", "weight"))
        own = reader.shape(down)[neuron_axis(reader.spec, "down", "weight")]
        if own != widths[index] or left > own or (group is None and left != own):
            raise UserError(f"--model: {model / PARTITION} is of a model of another width; convert again")
    return widths


def _padded(spec: FamilySpec, role: str, parameter: str, tensor: torch.Tensor, width: int) -> torch.Tensor:
    """The tensor with neurons of zeros behind the others, `width` in all; they add nothing."""
    axis = neuron_axis(spec, role, parameter)
    if axis is None:
        return tensor
    parts = tensor.chunk(2, dim=axis) if spec.fused and role == "up" else [tensor]
    shape = list(parts[0].shape)
    shape[axis] = width - shape[axis]
    blocks = [block for part in parts for block in (part, part.new_zeros(shape))]
    return torch.cat(blocks, dim=axis) if shape[axis] else tensor


def _with_width(reader: CheckpointReader, width: int) -> dict[str, Any]:
    """The source's config.json with another FFN width."""
    return reader.raw_config | {reader.spec.width_key(reader.raw_config): width}
