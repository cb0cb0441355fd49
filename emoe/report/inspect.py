"""What a checkpoint that we have written says of itself, from its small files alone: no weight is read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from emoe.bytecount import Show
from emoe.checkpoint.converted import read_converted
from emoe.checkpoint.digests import check_digests
from emoe.checkpoint.given import require_folder
from emoe.checkpoint.moduleformer import read_moduleformer
from emoe.checkpoint.partition import NAME as PARTITION
from emoe.checkpoint.partition import Partition
from emoe.checkpoint.reader import shard_map
from emoe.conversion.workspace import EXPORTED, PRETRAINED, is_our_stock_model
from emoe.errors import UserError
from emoe.plainfiles import read_json
from emoe.report.records import Conversion, Export, Pretraining, checked
from emoe.surgery.history import provenance_of


def _count_parameters(config: dict[str, Any]) -> int:
    """Trainable parameters of the model class that the checkpoint names, from its shape alone; tied ones once."""
    import torch

    from emoe.modeling.auto import emoe_config_class, emoe_model_class, stock_classes

    family = config["emoe_source"]["family"]
    stock = (config["emoe_source"].get("architectures") or [stock_classes(family)["AutoModel"]])[0]
    with torch.device("meta"):
        model = emoe_model_class(stock)(emoe_config_class(family).from_dict(config))
    return sum(p.numel() for p in model.parameters())


def _describe_moduleformer(folder: Path) -> dict[str, Any]:
    """The facts of a ModuleFormer: sizes, modules by layer, history."""
    config, parts = read_moduleformer(folder, "inspect"), {}
    for kind, short in (("attention", "att"), ("ffn", "mlp")):
        groups = config.get(f"{short}_groups") or [[config[f"n_{short}_experts"]]] * config["n_layer"]
        parts[kind] = {"groups": groups, "a token": config[f"k_{short}"]}
    return {
        "folder": str(folder),
        "model_type": "moduleformer",
        "num_layers": config["n_layer"],
        "modules": parts,
        "gate": config.get("gate_type", "mlp"),
        "bytes": sum(path.stat().st_size for path in set(shard_map(folder).values())),
        "provenance": config.get("emoe_provenance") or {},
        "pretraining": _pretraining(folder / PRETRAINED),
    }


def _describe_stock(folder: Path) -> dict[str, Any]:
    """The facts of a stock model that a training, pruning or export of ours has written."""
    gguf = not (folder / "config.json").exists()
    weights = folder.glob("*.gguf") if gguf else set(shard_map(folder).values())
    return {
        "folder": str(folder),
        "model_type": "gguf" if gguf else str(read_json(folder / "config.json", "inspect").get("model_type")),
        "stock": True,
        "bytes": sum(path.stat().st_size for path in weights),
        "provenance": provenance_of(folder, "inspect"),
        "pretraining": _pretraining(folder / PRETRAINED),
        "export": _export(folder / EXPORTED),
    }


def _export(path: Path) -> dict[str, Any] | None:
    """What `emoe export` wrote beside its model, as far as it is shown; None if there is nothing."""
    return checked(Export, read_json(path, "inspect"), path).model_dump() if path.is_file() else None


def _pretraining(path: Path) -> dict[str, Any] | None:
    """What `emoe pretrain` wrote beside its model, as far as it is shown; None if that is not what lies there."""
    if not path.is_file():
        return None
    try:
        return Pretraining.model_validate(read_json(path, "inspect")).model_dump()
    except ValidationError:
        return None


def describe(folder: Path, verify: bool = False, show: Show | None = None) -> dict[str, Any]:
    """Config, provenance, partition, gate tables and report of a checkpoint that we have written, as plain types.

    Args:
        folder: the checkpoint.
        verify: read every weight file and compare its digest with what was written.
        show: told how far that is, in MiB.

    Raises:
        UserError: not a checkpoint of ours, or a damaged one.
    """

    require_folder(folder, "inspect")
    if is_our_stock_model(folder, "inspect"):
        found = _describe_stock(folder)
    elif read_json(folder / "config.json", "inspect").get("model_type") == "moduleformer":
        found = _describe_moduleformer(folder)
    else:
        found = _describe_converted(folder)
    return found | {"files_verified": len(check_digests(folder, "inspect", show)) if verify else None}


def _describe_converted(folder: Path) -> dict[str, Any]:
    """The facts of a converted checkpoint."""
    from safetensors import safe_open

    config = read_converted(folder, "inspect")
    partition = Partition.load(folder / PARTITION)
    try:
        parameters = _count_parameters(config)
    except Exception as error:  # transformers and the model classes raise many kinds for a bad config.json
        problem = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"inspect: {folder / 'config.json'} is not usable: {problem}") from None
    gate_entries = 0
    for name, path in shard_map(folder).items():
        if ".router." in name:
            with safe_open(path, framework="pt") as file:
                gate_entries += math.prod(file.get_slice(name).get_shape())
    path = folder / "emoe_report.json"
    report = read_json(path, "inspect") if path.is_file() else None
    if report is not None:
        checked(Conversion, report, path)
    return {
        "folder": str(folder),
        "model_type": config["model_type"],
        "source": config["emoe_source"],
        "num_experts": config["num_experts"],
        "num_experts_per_tok": config["num_experts_per_tok"],
        "layers": config["emoe_layers"],
        "gate": config["emoe_gate"],
        "routing": config.get("emoe_routing", "top-k"),
        "allocation": config.get("emoe_allocation", "uniform"),
        "shared_experts": config.get("emoe_shared_experts", 0),
        "neurons_per_expert": len(next(iter(partition.labels.values()))) // partition.num_experts,
        "groups": config.get("emoe_groups"),
        "parameters": parameters,
        "gate_entries": gate_entries,
        "provenance": config["emoe_provenance"],
        "report": report,
    }
