"""What the experts of a converted checkpoint do on some text: who fires together, who is used, and where.

The checkpoint is streamed, one layer in memory at a time, sparse as it stands; of the text are kept a hidden state a
token and, for a few layers, which neurons were active.

Legend: N tokens, F neurons, E experts, L converted layers, B bins of a picture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emoe.calibration.statistics import TOP_FRACTION
from emoe.calibration.stream import StreamedModel
from emoe.calibration.text import load_blocks, read_tokenizer
from emoe.checkpoint.companions import source_config
from emoe.checkpoint.converted import read_converted
from emoe.checkpoint.digests import check_digests
from emoe.checkpoint.partition import NAME as PARTITION
from emoe.checkpoint.partition import Partition, order_of
from emoe.checkpoint.reader import CheckpointReader
from emoe.conversion.quality import Load
from emoe.conversion.workspace import is_our_stock_model
from emoe.errors import UserError
from emoe.modeling.auto import emoe_config_class
from emoe.modeling.ffn_emoe import SparseFFN, make_sparse
from emoe.plainfiles import read_json

MOST_TOKENS = 16_384
"""Tokens of all domains together; at F 11,008 what is kept of three layers then takes 0.5 GiB."""
PICTURES = 3
"""Layers whose co-activation is shown: the first, the middle and the last converted one."""
BINS = 256
"""Rows of a picture, at most, unless there are more experts."""


ROUTER = ".router."
"""Part of the names of a router's tables."""


@dataclass
class CoActivation:
    """Which neurons of one layer fire together: correlations of being among a token's strongest tenth."""

    layer: int
    before_BB: np.ndarray
    """In the source's order of neurons."""
    after_BB: np.ndarray
    """An expert after the other, those that work together side by side (in the picture alone)."""
    before: float
    """Mean over pairs of neurons in equal blocks of the source's order."""
    after: float
    """Mean over pairs of neurons in one expert."""


@dataclass
class Observation:
    """What was seen."""

    tokens: int
    """Of each domain."""
    domains: list[str]
    layers: list[int]
    usage: dict[str, np.ndarray]
    """By domain: share of its tokens that chose each expert, (L, E)."""
    pictures: list[CoActivation]

    @property
    def load(self) -> np.ndarray:
        """Use of each expert over its fair share, all domains together, (L, E)."""
        mean_LE = np.mean(list(self.usage.values()), axis=0)
        return mean_LE / np.maximum(mean_LE.mean(1, keepdims=True), 1e-12)


@torch.inference_mode()
def observe(folder: Path, texts: list[str], tokens: int, progress: Callable[[str, int, int], None]) -> Observation:
    """Stream `tokens` tokens of each text through a converted checkpoint.

    Raises:
        UserError: too many tokens, unreadable text, damaged weights or other files, or layers that differ in width.
    """
    if not 64 <= tokens * len(texts) <= MOST_TOKENS:
        raise UserError(f"--tokens: {tokens} of {len(texts)} texts; take 64 to {MOST_TOKENS} in all, or 0 for none")
    config = _observable(folder)
    _check_weights(folder)
    partition = Partition.load(folder / PARTITION)
    reader = CheckpointReader(folder, source_config(config))
    stream = StreamedModel(reader, dtype=_dtype(reader), batch_tokens=1024)
    text_NT, domain_N = _read_texts(folder, texts, tokens, reader)
    emoe_config = emoe_config_class(config["emoe_source"]["family"]).from_dict(config)
    layers, experts = sorted(set(config["emoe_layers"])), config["num_experts"]
    shown = {layers[round(i * (len(layers) - 1) / (PICTURES - 1))] for i in range(PICTURES)}

    progress("embedding", 0, layers[-1] + 1)
    stream.load_ends()
    states = stream.embed(text_NT)
    stream.drop_ends()
    loads = {text: [Load(experts) for _ in layers] for text in texts}
    pictures = []
    for index in range(layers[-1] + 1):
        progress("observing", index, layers[-1] + 1)
        names = reader.layer_names(index)
        tensors = reader.read(name for name in names if ROUTER not in name)
        layer = stream.build_layer(index, tensors)
        if index not in layers:
            stream.run_all(layer, index, states)
            continue
        tables = reader.read((name for name in names if ROUTER in name), finite=False)
        ffn = _sparse(layer, emoe_config, tables, reader.layer_prefix(index))
        watch = _Watch(ffn, keep=index in shown)
        for _, batch, _ in stream.run(layer, index, states):
            for text, load in loads.items():
                mine = domain_N[batch].repeat_interleave(text_NT.shape[1]) == texts.index(text)
                load[layers.index(index)].add(watch.experts_NK[mine])
        watch.remove()
        if index in shown:
            pictures.append(_co_activation(index, watch.active(), partition.labels[index], experts))
    progress("done", layers[-1] + 1, layers[-1] + 1)
    usage = {
        text: np.stack([(load.chosen_E / load.tokens_1.clamp_min(1)).numpy() for load in own])
        for text, own in loads.items()
    }
    return Observation(int(text_NT.numel() // len(texts)), texts, layers, usage, pictures)


def unwatchable(folder: Path) -> str | None:
    """What kind of model it is that `observe` cannot take: only layers with the E equal experts of a conversion."""
    if is_our_stock_model(folder, "report"):
        return "a stock model"
    if read_json(folder / "config.json", "report").get("model_type") == "moduleformer":
        return "a ModuleFormer"
    config = read_converted(folder, "report")
    changed = config.get("emoe_groups") or config.get("emoe_copies")
    return "a model with experts taken, added or copied" if changed else None


def _observable(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint that can be watched."""
    if kind := unwatchable(folder):
        raise UserError(f"report: {folder} is {kind}, whose experts cannot be watched; add --tokens 0 for the rest")
    return read_converted(folder, "report")


def _check_weights(folder: Path) -> None:
    """Raise `UserError` where the weights are not what was written: the page would show what the damage does."""
    try:
        check_digests(folder, "report")
    except UserError as error:
        raise UserError(f"{error}; --tokens 0 leaves out what its experts do") from None


def _dtype(reader: CheckpointReader) -> torch.dtype:
    """The checkpoint's; float16 has no fast kernels on a CPU."""
    return torch.float32 if reader.dtype == torch.float16 else reader.dtype


def _read_texts(
    folder: Path, texts: list[str], tokens: int, reader: CheckpointReader
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences of all texts, and the number of the text that each is of."""
    tokenizer = read_tokenizer(folder, "add --tokens 0", "report")
    longest = getattr(reader.config, "max_position_embeddings", None) or tokens
    length = max(8, min(256, tokens, longest - reader.spec.position_offset))
    parts = [
        load_blocks(
            [text], tokenizer, length=length, calibration_tokens=tokens, held_out_tokens=0, seed=0, flag="--text"
        )
        for text in texts
    ]
    numbers = torch.cat([torch.full((len(part.calibration),), i) for i, part in enumerate(parts)])
    found = torch.cat([part.calibration for part in parts])
    if found.max() >= reader.config.vocab_size:
        raise UserError(f"report: the tokenizer in {folder} has more entries than the embedding; add --tokens 0")
    return found, numbers


def _sparse(layer: torch.nn.Module, config, tables: dict[str, torch.Tensor], prefix: str) -> SparseFFN:
    """The layer's FFN with the router that the checkpoint holds."""
    ffn = make_sparse(layer, config)
    path = next(name for name, module in layer.named_modules() if module is ffn.router)
    for name, buffer in ffn.router.named_buffers():
        stored = tables.get(f"{prefix}{path}.{name}")
        if stored is None or stored.shape != buffer.shape:
            raise UserError(f"report: {prefix}{path}.{name} is missing or of another shape; convert the model again")
        ffn.router._buffers[name] = stored.to(buffer.dtype)
    return ffn


class _Watch:
    """Notes what a router chooses and, if it is to be kept, which neurons are among the token's top tenth."""

    def __init__(self, ffn: SparseFFN, keep: bool) -> None:
        self.experts_NK = torch.empty(0, 1, dtype=torch.int64)
        self._kept: list[torch.Tensor] = []
        self._norm_F = torch.linalg.vector_norm(ffn.weight_views().down_DF, dim=0, dtype=torch.float32)
        self._hook = ffn.router.register_forward_hook(self._see_keeping if keep else self._see)

    def _see(self, router, arguments, routing) -> None:
        self.experts_NK = routing.experts_NK

    def _see_keeping(self, router, arguments, routing) -> None:
        self._see(router, arguments, routing)
        x_ND, ffn = arguments
        magnitude_NF = ffn.hidden(x_ND).float().abs() * self._norm_F
        top = max(1, round(TOP_FRACTION * magnitude_NF.shape[1]))
        active_NF = torch.zeros_like(magnitude_NF, dtype=torch.bool)
        self._kept.append(active_NF.scatter_(1, magnitude_NF.topk(top, sorted=False).indices, True))

    def active(self) -> torch.Tensor:
        """1 where a neuron was active."""
        return torch.cat(self._kept)

    def remove(self) -> None:
        """Stop watching."""
        self._hook.remove()


def _co_activation(layer: int, active_NF: torch.Tensor, labels_F: torch.Tensor, experts: int) -> CoActivation:
    """Pictures in both orders; `active_NF` is in the converted one."""
    source_NF = torch.empty_like(active_NF)
    source_NF[:, order_of(labels_F)] = active_NF
    active_NF = active_NF.unflatten(1, (experts, -1))[:, _neighbours(_binned(active_NF, experts))].flatten(1)
    bins = max(experts, min(BINS, active_NF.shape[1]))
    return CoActivation(
        layer,
        before_BB=_binned(source_NF, bins).numpy(),
        after_BB=_binned(active_NF, bins).numpy(),
        before=_binned(source_NF, experts).diagonal().mean().item(),
        after=_binned(active_NF, experts).diagonal().mean().item(),
    )


def _neighbours(correlation_EE: torch.Tensor) -> list[int]:
    """Experts in an order in which those that work together lie side by side (Bar-Joseph et al. 2001)."""
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    if len(correlation_EE) < 3:
        return list(range(len(correlation_EE)))
    distance_EE = (correlation_EE.max() - correlation_EE).fill_diagonal_(0).numpy()
    tree = linkage(squareform(distance_EE, checks=False), method="average", optimal_ordering=True)
    return leaves_list(tree).tolist()


def _binned(active_NF: torch.Tensor, bins: int) -> torch.Tensor:
    """Mean correlation of the pairs of neurons in every two bins of consecutive ones, (B, B); no neuron with itself.

    The cosine, which clustering compares, would show who is busy before it shows who goes with whom.
    """
    tokens, width = active_NF.shape
    bin_F = torch.arange(width) * bins // width
    mean_F = active_NF.sum(0).float() / tokens
    scale_F = (tokens * mean_F * (1 - mean_F)).rsqrt().nan_to_num(posinf=0.0)  # 0 for a neuron that never changes
    table_NB = torch.zeros(tokens, bins)
    for start in range(0, tokens, 512):  # no float copy of the whole table
        rows = slice(start, start + 512)
        table_NB[rows].index_add_(1, bin_F, (active_NF[rows].float() - mean_F) * scale_F)
    sums_BB = table_NB.T @ table_NB
    sums_BB.diagonal().sub_(torch.zeros(bins).index_add_(0, bin_F, (scale_F > 0).float()))
    size_B = torch.bincount(bin_F, minlength=bins).float()
    return sums_BB / (torch.outer(size_B, size_B) - torch.diag(size_B)).clamp_min(1)
