"""Write a sharded safetensors checkpoint piece by piece; the index comes last."""

from __future__ import annotations

import contextlib
import json
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from emoe.checkpoint.reader import INDEX
from emoe.runtime import atomic_write, sha256_file, write_text


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically.

    Raises:
        OSError: a full disk and the like, which safetensors reports as an exception of its own.
    """
    with atomic_write(path) as temporary:
        save_file_or_oserror(tensors, temporary, metadata)


def save_file_or_oserror(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None) -> None:
    """safetensors' `save_file`, but for its exception."""
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"writing {path.name}: {error}") from None


class ShardWriter:
    """Shards named ``model-00001-of-00031.safetensors``; each is written atomically, so a shard is whole or absent."""

    def __init__(self, folder: Path, num_shards: int) -> None:
        self.folder, self.num_shards = folder, num_shards
        self.digests: dict[str, str] = {}
        """Hex sha256 of the shards written by this object, by file name."""
        self._disk = ThreadPoolExecutor(1)
        self._pending: list[Future] = []

    def path(self, number: int) -> Path:
        """File of shard ``number``, counted from 0."""
        return self.folder / f"model-{number + 1:05d}-of-{self.num_shards:05d}.safetensors"

    def write(self, number: int, tensors: dict[str, torch.Tensor], *, wait: bool = True) -> None:
        """Write one shard. Without `wait` the disk has until `flush`; the tensors are no longer needed either way.

        Raises:
            OSError: a full disk and the like.
        """
        with contextlib.ExitStack() as stack:
            temporary = stack.enter_context(atomic_write(self.path(number)))
            save_file_or_oserror({n: t.contiguous() for n, t in tensors.items()}, temporary, {"format": "pt"})
            self._pending.append(self._disk.submit(self._settle, stack.pop_all(), self.path(number)))
        if wait:
            self.flush()

    def _settle(self, written: contextlib.ExitStack, path: Path) -> None:
        written.close()
        self.digests[path.name] = sha256_file(path)

    def flush(self) -> None:
        """Wait until every shard is safe on disk."""
        while self._pending:
            self._pending.pop(0).result()

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
