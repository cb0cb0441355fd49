"""A converted checkpoint as exports read it: a layer at a time, routing as facts.

Legend: E experts, S neurons per expert, with `ALIGNMENT`, D model width, F hidden width, K experts chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from emoe.checkpoint.companions import source_config
from emoe.checkpoint.converted import read_converted
from emoe.checkpoint.partition import GONE, Partition
from emoe.checkpoint.partition import NAME as PARTITION
from emoe.checkpoint.reader import CheckpointReader
from emoe.errors import UserError
from emoe.families.neurons import neuron_axis
from emoe.gating import SOFTMAX

ROUTER = ".router."

ALIGNMENT = 8
"""Neurons of an expert are filled up to a multiple of this with zeros, which changes nothing: transformers' grouped
matrix product wants rows of whole 16 bytes, and Llama-2-7B's 64 experts have 172 neurons, 344 bytes."""


def element_type(name: str | None) -> torch.dtype | None:
    """The type of a name among `emoe.exporting.ELEMENT_TYPES`; None stays None."""
    return getattr(torch, name) if name else None


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16" and so on, as config.json has it."""
    return str(dtype).removeprefix("torch.")


class Experts(NamedTuple):
    """The FFN of a converted layer, cut into its experts."""

    gate_ESD: torch.Tensor
    up_ESD: torch.Tensor
    down_EDS: torch.Tensor


class Table(NamedTuple):
    """A linear gate: logit_e = x · weight_e + bias_e, in fp32."""

    weight_ED: torch.Tensor
    bias_E: torch.Tensor | None


@dataclass(frozen=True)
class Source:
    """A converted checkpoint folder.

    Args:
        folder: where it lies.
        pad: where layers differ in width, which no stock config can say, add neurons of zeros to the narrower ones.
        fix_k: route every token of every layer to so many experts, whatever the checkpoint does.
        dtype: element type to write; None for that of each stored tensor.
        approximate: what cannot be lossless may be written.
    """

    folder: Path
    pad: bool = False
    fix_k: int | None = None
    dtype: torch.dtype | None = None
    approximate: bool = False

    def __post_init__(self) -> None:
        experts = self.num_experts  # read first: it says whether this is a converted checkpoint at all
        if self.fix_k is not None and not 1 <= self.fix_k <= experts:
            raise UserError(f"--fix-k: {self.fix_k} must lie between 1 and the model's {experts} experts")

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json as it stands."""
        return read_converted(self.folder)

    @cached_property
    def reader(self) -> CheckpointReader:
        """Reads the tensors under the source's names."""
        return CheckpointReader(self.folder, source_config(self.config))

    @cached_property
    def partition(self) -> Partition:
        """Which expert each neuron belongs to."""
        return Partition.load(self.folder / PARTITION)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.config["num_experts"]

    @cached_property
    def widths(self) -> dict[int, int]:
        """Neurons of every layer's FFN, from config.json; the partition and the weights must agree."""
        stated = self.reader.spec.hidden_width(self.reader.config)
        widths = dict.fromkeys(range(self.reader.num_layers), stated)
        groups = self.config.get("emoe_groups") or [None] * len(self.config["emoe_layers"])
        for index, group in zip(self.config["emoe_layers"], groups, strict=True):
            widths[index] = sum(group) * self.config["emoe_expert_size"] if group else stated
            labels_F = self.partition.labels[index]
            left = int((labels_F != GONE).sum())
            (down,) = (n for n, role in self.reader.ffn_tensors(index).items() if role == ("down", "weight"))
            own = self.reader.shape(down)[neuron_axis(self.reader.spec, "down", "weight")]
            if own != widths[index] or left > own or (group is None and left != own):
                where = self.folder / PARTITION
                raise UserError(f"--model: {where} is of a model of another width; convert again")
        return widths

    @property
    def width(self) -> int:
        """Of the widest layer."""
        return max(self.widths.values())

    @property
    def operated(self) -> bool:
        """Whether experts were taken away or added since the conversion."""
        return bool(self.config.get("emoe_groups"))

    @property
    def extended(self) -> bool:
        """Whether experts were added, which their own gates switch whatever the budget."""
        return any(len(group) > 1 for group in self.config.get("emoe_groups") or [])

    @property
    def neurons(self) -> int:
        """S of the experts that are written."""
        return -(-self.reader.hidden_width // self.num_experts // ALIGNMENT) * ALIGNMENT

    @property
    def top_k(self) -> int:
        """K, an average where the number varies."""
        return self.fix_k or self.config["num_experts_per_tok"]

    @property
    def shared(self) -> int:
        """The first so many experts are always chosen."""
        return self.config.get("emoe_shared_experts", 0)

    @property
    def weighs(self) -> bool:
        """Whether a softmax over the chosen experts' logits weighs them; all get the weight 1 otherwise."""
        return self.config["emoe_gate"] == SOFTMAX

    @property
    def varies(self) -> bool:
        """Whether the number of experts differs by token or layer."""
        routing, allocation = self.config.get("emoe_routing", "top-k"), self.config.get("emoe_allocation", "uniform")
        return self.fix_k is None and (routing, allocation) != ("top-k", "uniform")

    @property
    def layers(self) -> list[int]:
        """Converted layers."""
        return sorted(self.config["emoe_layers"])

    @property
    def dense_layers(self) -> list[int]:
        """The others."""
        return [i for i in range(self.reader.num_layers) if i not in set(self.layers)]

    @cached_property
    def written(self) -> torch.dtype:
        """The element type that is written."""
        return self.dtype or self.reader.dtype

    @cached_property
    def compared(self) -> torch.dtype:
        """The element type in which the checkpoint is run beside the export: its own, or the one that is written where
        that loses nothing."""
        return torch.promote_types(self.written, self.reader.dtype)

    @property
    def narrow(self) -> bool:
        """Whether the written weights have 16 bits."""
        return self.written != torch.float32

    @property
    def fidelity(self) -> str:
        """What the cast leaves of a weight, in words."""
        if self.written == self.reader.dtype:
            return "bit for bit"
        return f"{'the same in' if self.written == self.compared else 'rounded to'} {dtype_name(self.written)}"

    def cast(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor in the element type that is written."""
        return tensor.to(self.dtype) if self.dtype and tensor.is_floating_point() else tensor

    def outside(self) -> dict[str, torch.Tensor]:
        """Everything outside the layers."""
        tensors = self.reader.read(self.reader.layer_names(None))
        return {name: self.cast(tensor) for name, tensor in tensors.items()}

    def rest(self, index: int) -> dict[str, torch.Tensor]:
        """A layer without its router and, if it is converted, without its FFN."""
        ffn = self.reader.ffn_tensors(index) if index in self.partition.labels else {}
        names = [n for n in self.reader.layer_names(index) if ROUTER not in n and n not in ffn]
        return {name: self.cast(tensor) for name, tensor in self.reader.read(names).items()}

    def experts(self, index: int) -> Experts:
        """The FFN of a converted layer of a gated family whose matrices are stored apart."""
        roles = self.reader.ffn_tensors(index)
        by_role = {roles[name][0]: self.cast(tensor) for name, tensor in self.reader.read(roles).items()}
        missing = self.neurons - self.reader.hidden_width // self.num_experts

        def rows(matrix_FD: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.pad(matrix_FD.unflatten(0, (self.num_experts, -1)), (0, 0, 0, missing))

        down_EDS = by_role["down"].unflatten(1, (self.num_experts, -1)).transpose(0, 1)
        return Experts(rows(by_role["gate"]), rows(by_role["up"]), torch.nn.functional.pad(down_EDS, (0, missing)))

    def table(self, index: int) -> Table:
        """The gate of a converted layer, with nothing added that all experts have in common."""
        if self.config["emoe_gate"] == "average-key":
            name = next(n for n, role in self.reader.ffn_tensors(index).items() if role == ("gate", "weight"))
            keys_ESD = self.reader.read([name])[name].unflatten(0, (self.num_experts, -1))
            return Table(keys_ESD.mean(1, dtype=torch.float32), None)
        weight_ED = self.buffer(index, "weight").float()
        if self.weighs:
            return Table(weight_ED, None)
        bias_E = self.buffer(index, "bias").float()
        return Table(weight_ED, bias_E - bias_E.mean())

    def buffer(self, index: int, buffer: str) -> torch.Tensor:
        """A buffer of a layer's router by its own name."""
        name = next(n for n in self.reader.layer_names(index) if n.endswith(ROUTER + buffer))
        return self.reader.read([name])[name]

    def compensation(self, index: int) -> torch.Tensor | None:
        """(D,) fp32: what the layer adds for skipped experts at this K."""
        measured_at = self.config.get("emoe_compensation", 0)
        if not measured_at:
            return None
        share = (self.num_experts - self.top_k) / max(1, self.num_experts - measured_at)
        return share * self.buffer(index, "compensation").float()

    def moe_nbytes(self, layer_entries: int) -> int:
        """`nbytes` of a stock mixture-of-experts with so many further entries in each converted layer."""
        missing = self.num_experts * self.neurons - self.reader.hidden_width
        return self.nbytes(len(self.layers) * (layer_entries + 3 * missing * self.reader.config.hidden_size))

    def nbytes(self, extra_entries: int = 0) -> int:
        """Bytes of the source's own tensors and of further entries, in the element type that is written."""
        total, width = 0, self.reader.dtype.itemsize
        for index in [None, *range(self.reader.num_layers)]:
            for name in self.reader.layer_names(index):
                if ROUTER not in name:
                    total += self.reader.nbytes(name)
        if self.dtype:
            total, width = total * self.dtype.itemsize // width, self.dtype.itemsize
        return total + extra_entries * width

    def biases(self, *modules: str) -> bool:
        """Whether any of these linears of attention has a bias."""
        return any(f".{m}.bias" in name for name in self.reader.layer_names(0) for m in modules)
