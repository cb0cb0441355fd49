"""Read a checkpoint folder one layer at a time, trusting nothing in it.

Weights come from safetensors only. Shard names must stay inside the folder; headers are checked by the safetensors
library; values are checked for NaN and infinity as they are read.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from emoe.checkpoint.limits import check_sizes
from emoe.errors import UserError
from emoe.families import FamilySpec, family
from emoe.plainfiles import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PREFETCH_LIMIT = 8 << 30
"""Bytes of a shard that is still read ahead as a whole."""

ROLES = ("gate", "up", "down")
_ITEM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "F16": 2, "BF16": 2, "I32": 4, "F32": 4, "I64": 8, "F64": 8}


def shard_map(folder: Path) -> dict[str, Path]:
    """Tensor name → the safetensors file that holds it.

    Raises:
        UserError: no safetensors weights (pickles are never opened), a missing or truncated shard, or an index that
            names a file outside the folder.
    """
    if (folder / INDEX).is_file():
        entries = read_json(folder / INDEX).get("weight_map")
        if not isinstance(entries, dict) or not all(isinstance(name, str) for name in entries.values()):
            raise UserError(f"--model: {folder / INDEX} has no valid weight_map; fetch the checkpoint again")
        for name in sorted(set(entries.values())):
            too_long = "\0" in name or len(name.encode("utf-8", "replace")) > 255  # no file has such a name
            if Path(name).name != name or name in ("", ".", "..") or too_long:
                raise UserError(f"--model: {folder / INDEX} names {name!r}, a file outside the folder; do not trust it")
            if not (folder / name).is_file():
                raise UserError(f"--model: shard {name} is missing in {folder}; fetch the checkpoint again")
        held = {name: _tensor_names(folder / name) for name in sorted(set(entries.values()))}
        for tensor, name in entries.items():
            if tensor not in held[name]:
                raise UserError(f"--model: shard {name} lacks tensor {tensor}; fetch the checkpoint again")
        return {tensor: folder / name for tensor, name in entries.items()}
    if (folder / SINGLE).is_file():
        return dict.fromkeys(sorted(_tensor_names(folder / SINGLE)), folder / SINGLE)
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"--model: {folder} has only pickled weights ({pickles[0]}), which can run code when opened; "
            "save it as safetensors first (model.save_pretrained does)"
        )
    raise UserError(f"--model: {folder} holds no {SINGLE} and no {INDEX}; give the folder of a transformers checkpoint")


def _tensor_names(path: Path) -> set[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"--model: {path} is truncated or damaged ({error}); fetch the checkpoint again") from None


def stored_bytes(piece: Any, name: str) -> int:
    """Size in bytes of the tensor that a safetensors slice stands for; its name is for the message.

    Raises:
        UserError: a type that only quantised checkpoints have.
    """
    item = _ITEM_BYTES.get(piece.get_dtype())
    if item is None:
        raise UserError(
            f"--model: tensor {name} is of type {piece.get_dtype()}, which is a quantised checkpoint's; give the "
            "unquantised one"
        )
    return math.prod(piece.get_shape()) * item


class CheckpointReader:
    """A dense checkpoint folder of a known family.

    Args:
        folder: where it lies.
        raw_config: to be read as if this were its config.json; so export reads a converted checkpoint as its source.

    Attributes:
        folder: where it lies.
        raw_config: its config.json as it stands.
        config: the stock configuration object.
        spec: its family.
        prefix: what stands before the base model's own names in the tensor names ("model.", or "").
    """

    def __init__(self, folder: Path | str, raw_config: dict[str, Any] | None = None) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"--model: {self.folder} is not a folder; give the folder of a transformers checkpoint")
        self.raw_config = raw_config or read_json(self.folder / "config.json")
        self.spec: FamilySpec = family(str(self.raw_config.get("model_type")))
        if self.raw_config.get("quantization_config"):
            raise UserError("--model: this checkpoint is quantised; give the unquantised one")
        check_sizes(self.raw_config, self.folder / "config.json")
        self.config = self._stock_config()
        self.shards = shard_map(self.folder)
        self.num_layers: int = self.config.num_hidden_layers
        if not isinstance(self.num_layers, int) or self.num_layers < 1:
            raise UserError(f"--model: {self.folder / 'config.json'} says num_hidden_layers={self.num_layers!r}")
        self.prefix = self._find_prefix()
        self._layers = self._group_by_layer()

    def _stock_config(self) -> Any:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        try:
            return CONFIG_MAPPING[self.spec.model_type].from_dict(self.raw_config)
        except Exception as error:  # transformers raises many kinds for a bad config.json
            problem = " ".join(str(error).split())[:300] or type(error).__name__
            raise UserError(f"--model: {self.folder / 'config.json'} is not usable: {problem}") from None

    def _find_prefix(self) -> str:
        for prefix in (f"{self.spec.base_prefix}.", ""):
            if f"{prefix}{self._layer_path(0)}{self._module('down')}.weight" in self.shards:
                last = f"{prefix}{self._layer_path(self.num_layers - 1)}{self._module('down')}.weight"
                if last not in self.shards:
                    raise UserError(
                        f"--model: num_hidden_layers={self.num_layers} of config.json, but no tensor {last} in "
                        f"{self.folder}; fetch the checkpoint again"
                    )
                return prefix
        raise UserError(
            f"--model: no tensor {self.spec.base_prefix}.{self._layer_path(0)}{self._module('down')}.weight in "
            f"{self.folder}; config.json says {self.spec.model_type}, the weights are of another kind"
        )

    def _layer_path(self, index: int) -> str:
        return f"{self.spec.layers}.{index}."

    def _module(self, role: str) -> str:
        return f"{self.spec.ffn}.{getattr(self.spec, role)}" if self.spec.ffn else getattr(self.spec, role)

    def _group_by_layer(self) -> dict[int | None, list[str]]:
        groups: dict[int | None, list[str]] = {None: [], **{i: [] for i in range(self.num_layers)}}
        start = f"{self.prefix}{self.spec.layers}."
        for name in sorted(self.shards):
            index = name.removeprefix(start).split(".")[0] if name.startswith(start) else ""
            key = int(index) if re.fullmatch(r"[0-9]{1,9}", index) else None
            if key is not None and key >= self.num_layers:
                raise UserError(f"--model: tensor {name} lies past num_hidden_layers={self.num_layers} of config.json")
            groups[key].append(name)
        return groups

    def layer_prefix(self, index: int) -> str:
        """What stands before a layer's own tensor names, with the dot at its end."""
        return f"{self.prefix}{self._layer_path(index)}"

    def layer_names(self, index: int | None) -> list[str]:
        """Tensor names of a layer; of everything outside the layers for None."""
        return self._layers[index]

    def ffn_tensors(self, index: int) -> dict[str, tuple[str, str]]:
        """Tensor name → (role, "weight" or "bias") for the FFN of a layer."""
        found = {}
        for role in ROLES:
            if getattr(self.spec, role):
                for parameter in ("weight", "bias"):
                    name = f"{self.layer_prefix(index)}{self._module(role)}.{parameter}"
                    if name in self.shards:
                        found[name] = (role, parameter)
        return found

    def read(self, names: Iterable[str], *, finite: bool = True) -> dict[str, torch.Tensor]:
        """Tensors by name, as stored. Each shard is opened once and closed again.

        Args:
            names: which.
            finite: they have to be; a router's thresholds may be infinite.

        Raises:
            UserError: a tensor holds NaN or infinity, or its shard cannot be read.
        """
        by_shard: dict[Path, list[str]] = {}
        for name in names:
            by_shard.setdefault(self.shards[name], []).append(name)
        tensors = {}
        for shard, wanted in by_shard.items():
            try:
                with safe_open(shard, framework="pt") as file:
                    for name in wanted:
                        tensors[name] = file.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise UserError(f"--model: {shard} is truncated or damaged ({error}); fetch it again") from None
        for name, tensor in tensors.items():
            if finite and tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise UserError(f"--model: tensor {name} holds NaN or infinite values; this checkpoint is broken")
        return tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from its shard's header alone."""
        with safe_open(self.shards[name], framework="pt") as file:
            return tuple(file.get_slice(name).get_shape())

    def prefetch(self, names: Iterable[str]) -> None:
        """Ask the system to have these tensors' shards in its page cache soon: no memory of ours, no waiting."""
        for shard in {self.shards[name] for name in names}:
            if shard.stat().st_size <= PREFETCH_LIMIT and hasattr(os, "posix_fadvise"):
                with open(shard, "rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    def nbytes(self, name: str) -> int:
        """Size of a tensor in bytes, from its shard's header alone."""
        with safe_open(self.shards[name], framework="pt") as file:
            return stored_bytes(file.get_slice(name), name)

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the first layer's output matrix, the type the checkpoint is said to have."""
        name = f"{self.layer_prefix(0)}{self._module('down')}.weight"
        return self.read([name])[name].dtype

    @property
    def hidden_width(self) -> int:
        """F, from the weights; the config must agree.

        Raises:
            UserError: config.json states another width.
        """
        name = f"{self.layer_prefix(0)}{self._module('down')}.weight"
        width = self.shape(name)[0 if self.spec.transposed else 1]
        stated = self.spec.hidden_width(self.config)
        if width != stated:
            raise UserError(f"--model: config.json says FFN width {stated}, tensor {name} has {width}")
        return width

    def total_bytes(self) -> int:
        """Size of all weight files, in bytes."""
        return sum(path.stat().st_size for path in set(self.shards.values()))
