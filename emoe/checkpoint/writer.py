"""Write a sharded safetensors checkpoint piece by piece; the index comes last."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from emoe.checkpoint.reader import INDEX
from emoe.runtime import atomic_write, write_text


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically.

    Raises:
        OSError: a full disk and the like, which safetensors reports as an exception of its own.
    """
    with atomic_write(path) as temporary:
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:
            raise OSError(f"writing {path.name}: {error}") from None


class ShardWriter:
    """Shards named ``model-00001-of-00031.safetensors``; each is written atomically, so a shard is whole or absent."""

    def __init__(self, folder: Path, num_shards: int) -> None:
        self.folder, self.num_shards = folder, num_shards

    def path(self, number: int) -> Path:
        """File of shard ``number``, counted from 0."""
        return self.folder / f"model-{number + 1:05d}-of-{self.num_shards:05d}.safetensors"

    def write(self, number: int, tensors: dict[str, torch.Tensor]) -> None:
        """Write one shard."""
        save_tensors(self.path(number), {name: t.contiguous() for name, t in tensors.items()}, {"format": "pt"})

    def finish(self) -> None:
        """Write the index over all shards."""
        weight_map, total = {}, 0
        for number in range(self.num_shards):
            with safe_open(self.path(number), framework="pt") as file:
                names = list(file.keys())
            weight_map.update(dict.fromkeys(names, self.path(number).name))
            total += self.path(number).stat().st_size
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_text(self.folder / INDEX, json.dumps(index, indent=2) + "\n")
