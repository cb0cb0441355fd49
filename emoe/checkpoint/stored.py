"""The element types in which a checkpoint stores its tensors, for models that are trained in fp32 and published as
their source: fp32 holds bfloat16 and float16 exactly, so what did not train comes back bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from emoe.checkpoint.reader import shard_map
from emoe.plainfiles import read_json
from emoe.runtime import write_text

_FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
"""What safetensors call them."""

_OF_THE_CLASS = ("architectures", "auto_map")
"""Fields of config.json that say which class has written the weights."""


def stored_types(folder: Path) -> dict[str, torch.dtype]:
    """Tensor name → element type, of those with fractions, from the files' headers alone."""
    shards, found = shard_map(folder), {}
    for path in sorted(set(shards.values())):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                dtype = file.get_slice(name).get_dtype()
                if dtype in _FLOATS and shards.get(name) == path:
                    found[name] = _FLOATS[dtype]
    return found


def spellings(model: nn.Module, name: str) -> tuple[str, str, str]:
    """How a tensor may be called in a model or a checkpoint of it, of which one has a head and the other may not."""
    prefix = f"{model.base_model_prefix}."
    return name, prefix + name, name.removeprefix(prefix)


def _to_change(model: nn.Module, folder: Path) -> list[tuple[torch.Tensor, torch.dtype]]:
    """The tensors of a model that are to be stored in another type than they have, with that type; tied ones once.

    What the checkpoint does not have, such as a new head, gets the type of all that it has, if that is one. New routers
    stay as they are: their tables are fp32 in a model of 16 bits.
    """
    known = stored_types(folder)
    types = {dtype for name, dtype in known.items() if ".router." not in name}
    common = types.pop() if len(types) == 1 else None
    found: dict[int, tuple[torch.Tensor, torch.dtype]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        spelt = next((n for n in spellings(model, name) if n in known), None)
        dtype = known[spelt] if spelt else common
        if dtype and tensor.is_floating_point() and (spelt or (id(tensor) not in found and ".router." not in name)):
            found[id(tensor)] = (tensor, dtype)
    return [(tensor, dtype) for tensor, dtype in found.values() if tensor.dtype != dtype]


@torch.no_grad()
def round_as_stored(model: nn.Module, folder: Path) -> None:
    """Round the weights to what the types in ``folder`` can hold, so that what is measured is what is published."""
    for tensor, dtype in _to_change(model, folder):
        tensor.copy_(tensor.to(dtype))


def cast_as_stored(model: nn.Module, folder: Path) -> None:
    """Give the weights the types in ``folder``; the model is then to be saved, not to be called."""
    for tensor, dtype in _to_change(model, folder):
        tensor.data = tensor.data.to(dtype)


def save_as_stored(model: nn.Module, folder: Path, target: Path, changes: dict[str, Any]) -> None:
    """Save a model that was loaded from ``folder``, with its element types and its config.json but for ``changes``.

    transformers' own config.json would have the type and the ``use_cache`` of training.
    """
    cast_as_stored(model, folder)
    model.config._name_or_path = str(folder)  # where our classes look for the partition
    model.save_pretrained(target)
    config, written = read_json(folder / "config.json"), read_json(target / "config.json")
    config |= {key: written[key] for key in _OF_THE_CLASS if key in written} | changes
    write_text(target / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
