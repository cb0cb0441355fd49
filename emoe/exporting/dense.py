"""Back to the dense model: the neurons return to their original places, the gates go."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from emoe.checkpoint.companions import copy_companions, source_config
from emoe.checkpoint.converted import read_converted
from emoe.checkpoint.digests import check_digests
from emoe.checkpoint.partition import NAME as PARTITION
from emoe.checkpoint.partition import Partition, digest_ffn, inverse_of, order_of
from emoe.checkpoint.reader import CheckpointReader
from emoe.checkpoint.writer import ShardWriter
from emoe.errors import UserError
from emoe.families.neurons import reorder
from emoe.runtime import atomic_directory, require_space, write_text


def export_dense(model: Path, output: Path, progress: Callable[[str, int, int], None]) -> dict:
    """Write the stock checkpoint that a converted one was made from, or became in fine-tuning.

    Returns:
        ``{"layers": converted layers, "identical": how many of them have the source's weights bit for bit}``; the rest
        have been trained since.

    Raises:
        UserError: not a converted checkpoint, or a damaged one.
    """
    config = read_converted(model)
    check_digests(model)
    reader = CheckpointReader(model, source_config(config))
    partition = Partition.load(model / PARTITION)
    if sorted(partition.labels) != sorted(config["emoe_layers"]):
        raise UserError(f"--model: {model / PARTITION} and config.json name different layers; convert the model again")
    require_space(output, reader.total_bytes(), "--output")
    identical = 0
    with atomic_directory(output, exclusive=True) as folder:
        writer = ShardWriter(folder, reader.num_layers + 1)
        writer.write(0, reader.read(reader.layer_names(None)))
        for index in range(reader.num_layers):
            progress("writing", index, reader.num_layers)
            names = [n for n in reader.layer_names(index) if ".router." not in n]
            tensors = reader.read(names)
            if index in partition.labels:
                if len(partition.labels[index]) != reader.hidden_width:
                    raise UserError(f"--model: {model / PARTITION} is of a model of another width; convert again")
                back_F = inverse_of(order_of(partition.labels[index]))
                roles = reader.ffn_tensors(index)
                restored = {n: reorder(reader.spec, *roles[n], tensors[n], back_F) for n in roles}
                identical += digest_ffn(roles, restored) == partition.digests[index]
                tensors |= restored
            writer.write(index + 1, tensors)
        writer.finish()
        write_text(folder / "config.json", json.dumps(reader.raw_config, indent=2, sort_keys=True) + "\n")
        copy_companions(model, folder)
    progress("done", reader.num_layers, reader.num_layers)
    return {"layers": len(partition.labels), "identical": identical}
