"""Back to the dense model: the neurons return to their original places, the gates go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from emoe.checkpoint.companions import copy_companions
from emoe.checkpoint.partition import NAME as PARTITION
from emoe.checkpoint.partition import digest_ffn, inverse_of, order_of
from emoe.checkpoint.writer import ShardWriter
from emoe.errors import UserError
from emoe.exporting.source import Source
from emoe.exporting.spec import Cost, Format, Progress, load_stock
from emoe.families.neurons import reorder
from emoe.runtime import write_text


def cost(source: Source) -> Cost:
    """The source's own tensors."""
    exact = "bit for bit the source where nothing has been trained since; the gates go"
    return Cost(source.nbytes(), exact if source.dtype is None else f"rounded to {source.dtype}; the gates go")


def restored(source: Source, index: int) -> tuple[dict[str, Any], bool]:
    """A layer's tensors as the source had them, in the stored element type, and whether they equal the source's."""
    reader, partition = source.reader, source.partition
    names = [name for name in reader.layer_names(index) if ".router." not in name]
    tensors = reader.read(names)
    if index not in partition.labels:
        return tensors, False
    if len(partition.labels[index]) != reader.hidden_width:
        where = source.folder / PARTITION
        raise UserError(f"--model: {where} is of a model of another width; convert again")
    back_F = inverse_of(order_of(partition.labels[index]))
    roles = reader.ffn_tensors(index)
    ffn = {name: reorder(reader.spec, *roles[name], tensors[name], back_F) for name in roles}
    return tensors | ffn, digest_ffn(roles, ffn) == partition.digests[index]


def write(source: Source, folder: Path, progress: Progress) -> dict[str, Any]:
    """The stock checkpoint that the converted one was made from, or became in fine-tuning.

    Returns:
        ``{"layers": converted layers, "identical": how many of them have the source's weights bit for bit}``; the rest
        have been trained since.
    """
    reader, identical = source.reader, 0
    writer = ShardWriter(folder, reader.num_layers + 1)
    writer.write(0, source.outside())
    for index in range(reader.num_layers):
        progress("writing", index, reader.num_layers)
        tensors, same = restored(source, index)
        identical += same
        writer.write(index + 1, {name: source.cast(tensor) for name, tensor in tensors.items()})
    writer.finish()
    config = dict(reader.raw_config)
    if source.dtype:
        config["dtype"] = str(source.dtype).removeprefix("torch.")
    write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    copy_companions(source.folder, folder)
    progress("done", reader.num_layers, reader.num_layers)
    return {"layers": len(source.partition.labels), "identical": identical}


FORMAT = Format(
    name="dense",
    routes=False,
    refusal=lambda source: None,
    cost=cost,
    write=write,
    load=load_stock,
)
