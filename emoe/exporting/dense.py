"""The way back to the source's architecture: neurons in their original order, no gate.

After pruning that is a smaller dense model, after extending a wider one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from emoe.checkpoint.companions import copy_companions
from emoe.checkpoint.converted import SOURCE_S
from emoe.checkpoint.partition import digest_ffn, inverse_of, order_of
from emoe.checkpoint.writer import ShardWriter
from emoe.exporting.source import Source, dtype_name
from emoe.exporting.spec import Cost, Format, Progress, load_stock
from emoe.families import FamilySpec
from emoe.families.neurons import neuron_axis, reorder
from emoe.runtime import write_text
from emoe.surgery.history import provenance_of


def refusal(source: Source) -> str | None:
    """Layers of different widths, or experts that are no parts of one FFN."""
    if source.config.get("emoe_copies"):
        return "its experts are copies of whole FFNs; there is no dense model of them"
    least = min(source.widths.values())
    if least != source.width and not source.pad:
        return (
            f"the FFNs have {least} to {source.width} neurons, a stock {source.reader.spec.model_type} needs the same "
            "in all layers; prune all layers with --scope layer, or add --pad for neurons of zeros"
        )
    return None


def cost(source: Source) -> Cost:
    """The source's own tensors, and zeros."""
    gates = "added experts are on for every token" if source.extended else "the gates go"
    exact = f"{_origin(source)} weights {source.fidelity}; {gates}"
    return Cost(source.nbytes(_zeros(source)), exact)


def _origin(source: Source) -> str:
    """Whose weights they are, in words."""
    provenance = provenance_of(source.folder)
    verbs = list(dict.fromkeys(step.get("verb") for step in provenance.get("history", [])))
    if not verbs and provenance.get("outputs", SOURCE_S) == SOURCE_S:
        return SOURCE_S
    return f"the checkpoint's own (changed since the conversion: {', '.join(verbs) or 'outputs refitted'})"


def _zeros(source: Source) -> int:
    """Entries that `_padded` adds, in all layers together."""
    reader, entries = source.reader, 0
    for index, width in source.widths.items():
        for name, (role, parameter) in reader.ffn_tensors(index).items():
            axis = neuron_axis(reader.spec, role, parameter)
            if axis is not None:
                shape = list(reader.shape(name))
                shape[axis] = (source.width - width) * (2 if reader.spec.fused and role == "up" else 1)
                entries += math.prod(shape)
    return entries


def restored(
    source: Source, index: int, cast: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[dict[str, torch.Tensor], bool]:
    """A layer's tensors as the source had them, in the stored element type, and whether they are the source's numbers,
    also after the cast."""
    reader, partition = source.reader, source.partition
    names = [name for name in reader.layer_names(index) if ".router." not in name]
    tensors = reader.read(names)
    if index not in partition.labels:
        return tensors, False
    back_F = inverse_of(order_of(partition.labels[index]))
    back_F = torch.cat([back_F, torch.arange(len(back_F), source.widths[index])])  # added neurons stay behind
    roles = reader.ffn_tensors(index)
    ffn = {name: reorder(reader.spec, *roles[name], tensors[name], back_F) for name in roles}
    lossless = all(torch.equal(cast(tensor).to(tensor.dtype), tensor) for tensor in ffn.values())
    return tensors | ffn, lossless and digest_ffn(roles, ffn) == partition.digests[index]


def write(source: Source, folder: Path, progress: Progress) -> dict[str, Any]:
    """The stock checkpoint that the converted one was made from, or became in fine-tuning or surgery.

    Returns:
        ``{"layers": converted layers, "identical": how many of them have exactly the source's weights}``; the rest
        have been trained since, or rounded. After surgery also ``{"width": F, "padded": neurons of zeros}``.
    """
    reader, identical = source.reader, 0
    writer = ShardWriter(folder, reader.num_layers + 1)
    writer.write(0, source.outside())
    for index in range(reader.num_layers):
        progress("writing", index, reader.num_layers)
        tensors, same = restored(source, index, source.cast)
        identical += same
        roles = reader.ffn_tensors(index)
        tensors |= {name: _padded(reader.spec, *roles[name], tensors[name], source.width) for name in roles}
        writer.write(index + 1, {name: source.cast(tensor) for name, tensor in tensors.items()})
    writer.finish()
    own = reader.spec.hidden_width(reader.config)
    config = dict(reader.raw_config)
    if source.width != own:
        config[reader.spec.width_key(config)] = source.width
    if source.dtype:
        config["dtype"] = dtype_name(source.dtype)
    write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    copy_companions(source.folder, folder)
    progress("done", reader.num_layers, reader.num_layers)
    result = {"layers": len(source.partition.labels), "identical": identical}
    if set(source.widths.values()) == {own}:
        return result
    return result | {"width": source.width, "padded": sum(source.width - width for width in source.widths.values())}


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


FORMAT = Format(
    name="dense",
    routes=False,
    refusal=refusal,
    cost=cost,
    write=write,
    load=load_stock,
)
