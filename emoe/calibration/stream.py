"""Run a model whose layers are never all in memory: embed, one layer at a time, head.

The stock model is built on the meta device. In place of each layer stands a recorder that notes how the model calls it
(masks, rotary tables, …), once for each batch shape; afterwards each layer is built, filled from its shard, called in
that same way on the cached hidden states, and dropped.

Legend: B sequences a batch, T tokens a sequence, D model width.
"""

from __future__ import annotations

import math
import os
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from emoe.checkpoint.reader import CheckpointReader
from emoe.errors import UserError
from emoe.modeling.auto import stock_classes
from emoe.runtime import format_bytes

LARGEST_BUFFERS = 4 << 30
"""Bytes of tables that a stock model may compute for itself; GPT-J with 2,048 positions has 0.5 MiB."""


class _Embedded(Exception):  # noqa: N818 - a signal, not an error
    """Raised by the last recorder: everything before the layers has run, the rest is not wanted now."""


class _Recorder(nn.Module):
    """Stands where a layer belongs: notes the call, passes hidden states on."""

    def __init__(self, stream: StreamedModel, index: int) -> None:
        super().__init__()
        self._stream, self._index = [stream], index  # in a list, so that nn.Module does not look inside

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        stream, last = self._stream[0], self._index == self._stream[0].reader.num_layers - 1
        if stream.injected is not None:
            hidden_states = stream.injected
        else:
            stream.calls.setdefault((tuple(hidden_states.shape[:2]), self._index), (args, kwargs))
            if last:
                stream.embedded = hidden_states
                raise _Embedded
        return (hidden_states, None) if stream.reader.spec.layer_returns_tuple else hidden_states


class HiddenStates:
    """Hidden states of a set of sequences between two layers, (sequences, T, D); in memory or in a mapped file."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, *, in_memory: bool, folder: Path | None) -> None:
        count = math.prod(shape)
        if in_memory:
            self.data = torch.empty(shape, dtype=dtype)
        else:
            # An unlinked temporary file: gone with the process, however it ends. Its blocks are reserved now: a disk
            # that fills up under a mapping kills the process without a word.
            with tempfile.NamedTemporaryFile(dir=folder, prefix=".hidden-", suffix=".tmp") as file:
                os.posix_fallocate(file.fileno(), 0, count * dtype.itemsize)
                self.data = torch.from_file(file.name, shared=True, size=count, dtype=dtype).view(shape)

    def copy(self, stream: StreamedModel) -> HiddenStates:
        """The same hidden states, to go on differently."""
        other = stream.hidden_states(tuple(self.data.shape))
        other.data.copy_(self.data)
        return other


class StreamedModel:
    """A checkpoint of which one layer at a time is in memory.

    Args:
        reader: the checkpoint.
        dtype: element type of the weights while they run.
        device: where they run; hidden states rest on the CPU.
        batch_tokens: tokens a forward call.
        memory_limit: bytes of hidden states that may stay in memory, all sets together; the rest lies in files.
        folder: where such files lie.
        statistics_dtype: type of matrix products while statistics are gathered (`run` with ``exact=False``).
        rank: number of this process among `size` that share the text.
        size: number of processes.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        *,
        dtype: torch.dtype,
        device: str = "cpu",
        batch_tokens: int = 4096,
        memory_limit: int = 1 << 32,
        folder: Path | None = None,
        statistics_dtype: torch.dtype | None = None,
        rank: int = 0,
        size: int = 1,
    ) -> None:
        self.statistics_dtype = statistics_dtype or dtype
        self.rank, self.size = rank, size
        self.reader, self.dtype, self.device, self.batch_tokens = reader, dtype, torch.device(device), batch_tokens
        self.memory_limit, self.folder = memory_limit, folder
        self._memory_used = 0
        self.calls: dict[tuple[tuple[int, ...], int], tuple[tuple, dict]] = {}
        self.injected: torch.Tensor | None = None
        self.embedded: torch.Tensor | None = None
        self.model_class, self.measure = self._choose_class()
        self._check_buffers()
        with init_empty_weights(include_buffers=False):
            self.model = self.model_class._from_config(reader.config).eval()
        base = getattr(self.model, self.model.base_model_prefix, self.model)
        layers = base.get_submodule(reader.spec.layers)
        self.layer_class = type(layers[0])
        for index in range(len(layers)):
            layers[index] = _Recorder(self, index)

    def _choose_class(self) -> tuple[type, str]:
        """The stock class of the checkpoint, and what its quality is measured by."""
        import transformers

        known = stock_classes(self.reader.spec.model_type)
        architecture = (self.reader.raw_config.get("architectures") or [None])[0]
        if architecture is None:
            headed = "lm_head.weight" in self.reader.shards or self.reader.config.tie_word_embeddings
            architecture = known["AutoModelForCausalLM" if headed and not self.reader.spec.encoder else "AutoModel"]
        if architecture not in known.values():
            raise UserError(
                f"--model: architecture {architecture} of config.json is not one of {', '.join(sorted(known.values()))}"
            )
        measures = {
            known.get("AutoModelForCausalLM"): "perplexity",
            known.get("AutoModelForMaskedLM"): "masked-LM loss",
        }
        return getattr(transformers, architecture), measures.get(architecture, "hidden-state error")

    def _check_buffers(self) -> None:
        """Refuse a config.json whose tables (masks, positions) would fill the memory: these are really made."""
        try:
            with torch.device("meta"):
                model = self.model_class._from_config(self.reader.config)
        except (RuntimeError, ValueError, TypeError, ZeroDivisionError, IndexError, OverflowError) as error:
            problem = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"--model: {self.reader.folder / 'config.json'} is not usable: {problem}") from None
        size = sum(buffer.nbytes for buffer in model.buffers())
        if size > LARGEST_BUFFERS:
            raise UserError(
                f"--model: {self.reader.folder / 'config.json'} asks for {format_bytes(size)} of masks and positions; "
                "its max_position_embeddings or head size cannot be right"
            )

    def _fill(self, module: nn.Module, names: dict[str, str], tensors: dict[str, torch.Tensor]) -> None:
        """Make the parameters named by the keys of `names` real, from the tensors named by its values."""
        for name, source in names.items():
            owner, _, leaf = name.rpartition(".")
            value, stated = tensors[source], module.get_parameter(name).shape
            if value.shape != stated:
                raise UserError(
                    f"--model: {source} has shape {tuple(value.shape)}, config.json implies {tuple(stated)}"
                )
            value = value.to(device=self.device, dtype=self.dtype)
            module.get_submodule(owner)._parameters[leaf] = nn.Parameter(value, requires_grad=False)

    def _resolve(self, name: str) -> str | None:
        """Name of a parameter in the checkpoint: with the base model's prefix or without, in old or new spelling."""
        base = f"{self.reader.spec.base_prefix}."
        for candidate in (name, name.removeprefix(base), base + name):
            for spelling in self.reader.spec.spellings(candidate):
                if spelling in self.reader.shards:
                    return spelling
        return None

    def load_ends(self) -> None:
        """Materialise everything outside the layers: embeddings, final norm, head."""
        names = {name: self._resolve(name) for name, p in self.model.named_parameters() if p.is_meta}
        names = {name: source for name, source in names.items() if source is not None}
        self._fill(self.model, names, self.reader.read(set(names.values())))
        self.model.tie_weights()
        missing = [name for name, p in self.model.named_parameters() if p.is_meta]
        if missing:
            raise UserError(f"--model: tensor {missing[0]} is in no shard of {self.reader.folder}; fetch it again")
        self.model.to(self.device)

    def drop_ends(self) -> None:
        """Give the memory of everything outside the layers back."""
        for module in self.model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(parameter.data.to("meta"), requires_grad=False)

    def build_layer(self, index: int, tensors: dict[str, torch.Tensor]) -> nn.Module:
        """The stock layer from its tensors; its non-persistent buffers are computed, never left on meta.

        Raises:
            UserError: a tensor that the layer needs is missing or has another shape than config.json implies.
        """
        with init_empty_weights(include_buffers=False):
            layer = self.layer_class(self.model.config, index).eval()
        prefix = self.reader.layer_prefix(index)
        names = {}
        for name, _ in layer.named_parameters():
            spellings = [s for s in self.reader.spec.spellings(prefix + name) if s in tensors]
            if not spellings:
                raise UserError(
                    f"--model: tensor {prefix + name} is in no shard of {self.reader.folder}; fetch it again"
                )
            names[name] = spellings[0]
        self._fill(layer, names, tensors)
        return layer.to(self.device)

    def _batch_size(self, tokens: torch.Tensor) -> int:
        return max(1, self.batch_tokens // max(1, tokens.shape[1]))

    def batches(self, tokens: torch.Tensor) -> Iterator[slice]:
        """Slices of whole sequences that make up about `batch_tokens` tokens."""
        size = self._batch_size(tokens)
        return (slice(i, min(i + size, len(tokens))) for i in range(0, len(tokens), size))

    def numbered_batches(self, tokens: torch.Tensor) -> Iterator[tuple[int, slice]]:
        """`batches` with the number that each has in the text of all processes (`share`)."""
        return ((self.rank + i * self.size, batch) for i, batch in enumerate(self.batches(tokens)))

    def share(self, tokens: torch.Tensor) -> torch.Tensor:
        """Indices of this process's part of all sequences: every `size`-th batch."""
        index = torch.arange(len(tokens))
        mine = [index[batch] for batch in self.batches(tokens)][self.rank :: self.size]
        return torch.cat(mine) if mine else index[:0]

    @torch.inference_mode()
    def embed(self, tokens: torch.Tensor) -> HiddenStates:
        """Hidden states before layer 0 of token blocks (sequences, T); also notes how the layers are called."""
        states = self.hidden_states((*tokens.shape, self.reader.config.hidden_size))
        for batch in self.batches(tokens):
            try:
                self.model(input_ids=tokens[batch].to(self.device), **self._no_cache())
            except _Embedded:
                states.data[batch] = self.embedded.cpu()
        self.embedded = None
        return states

    def hidden_states(self, shape: tuple[int, ...]) -> HiddenStates:
        """Room for hidden states of (sequences, T, D): in memory while all of them fit under the limit."""
        size = math.prod(shape) * self.dtype.itemsize
        in_memory = self._memory_used + size <= self.memory_limit
        states = HiddenStates(shape, self.dtype, in_memory=in_memory, folder=self.folder)
        if in_memory:
            self._memory_used += size
            weakref.finalize(states, self._give_back, size)
        return states

    def _give_back(self, size: int) -> None:
        self._memory_used -= size

    def _no_cache(self) -> dict[str, Any]:
        return {} if self.reader.spec.encoder else {"use_cache": False}

    @torch.inference_mode()
    def run(
        self, layer: nn.Module, index: int, states: HiddenStates, *, advance: bool = True, exact: bool = True
    ) -> Iterator[tuple[int, slice, torch.Tensor]]:
        """Call a layer on `states`, a batch a step: iterate to run.

        Yields (number of the batch, its sequences, what the layer gave); with `advance` that replaces `states`.
        """
        for number, batch in self.numbered_batches(states.data):
            hidden = states.data[batch].to(self.device)
            args, kwargs = self.calls[(tuple(hidden.shape[:2]), index)]
            cast = not exact and self.statistics_dtype != self.dtype
            with torch.autocast(self.device.type, self.statistics_dtype, enabled=cast):
                out = layer(hidden, *args, **kwargs)
            out = out[0] if isinstance(out, tuple) else out
            if advance:
                states.data[batch] = out.cpu()
            yield number, batch, out

    def run_all(self, layer: nn.Module, index: int, states: HiddenStates, *, exact: bool = True) -> None:
        """`run` to its end."""
        for _ in self.run(layer, index, states, exact=exact):
            pass

    @torch.inference_mode()
    def head_once(self, tokens: torch.Tensor, hidden: torch.Tensor) -> Any:
        """The stock model's output for (B, T) tokens whose hidden states behind the last layer are (B, T, D)."""
        self.injected = hidden.to(self.device)
        try:
            return self.model(input_ids=tokens.to(self.device), **self._no_cache())
        finally:
            self.injected = None
