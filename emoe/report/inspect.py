"""What a converted checkpoint says of itself, from its small files alone: no weight is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from emoe.checkpoint.partition import NAME as PARTITION
from emoe.checkpoint.partition import Partition
from emoe.checkpoint.reader import read_json, shard_map
from emoe.errors import UserError


def describe(folder: Path) -> dict[str, Any]:
    """Config, provenance, partition, gate tables and report of a converted checkpoint, as plain types.

    Raises:
        UserError: not a converted checkpoint, or a damaged one.
    """
    from safetensors import safe_open

    if not folder.is_dir():
        raise UserError(f"inspect: {folder} is not a folder; give the folder of a converted checkpoint")
    config = read_json(folder / "config.json", "inspect")
    if not str(config.get("model_type", "")).startswith("emoe_"):
        raise UserError(f"inspect: {folder} is not a converted checkpoint (model_type '{config.get('model_type')}')")
    partition = Partition.load(folder / PARTITION)
    trainable = gate_entries = 0
    for path in sorted(set(shard_map(folder).values())):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                count = 1
                for length in file.get_slice(name).get_shape():
                    count *= length
                if ".router." in name:
                    gate_entries += count
                else:
                    trainable += count
    report = folder / "emoe_report.json"
    return {
        "folder": str(folder),
        "model_type": config["model_type"],
        "source": config["emoe_source"],
        "num_experts": config["num_experts"],
        "num_experts_per_tok": config["num_experts_per_tok"],
        "layers": config["emoe_layers"],
        "gate": config["emoe_gate"],
        "neurons_per_expert": len(next(iter(partition.labels.values()))) // partition.num_experts,
        "parameters": trainable,
        "gate_entries": gate_entries,
        "provenance": config["emoe_provenance"],
        "report": read_json(report, "inspect") if report.is_file() else None,
    }
