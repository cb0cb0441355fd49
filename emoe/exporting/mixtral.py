"""Mixtral: a softmax over all logits, the K largest, divided by their sum.

Made for routers whose softmax weighs the experts: the gates that ``emoe recover --gates softmax`` trains, without loss.
Others weigh all chosen ones alike, which GraniteMoE and GPT-OSS can say without loss. For runtimes that know only
Mixtral, ``--approximate`` writes what comes nearest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from emoe.exporting import stock
from emoe.exporting.source import Source
from emoe.exporting.spec import Capabilities, Cost, Format, Progress, load_stock

CAN = Capabilities(window=True, lossless=False)


def cost(source: Source) -> Cost:
    """The router is new; it has E rows of D in each layer."""
    router = source.num_experts * source.reader.config.hidden_size
    return Cost(source.moe_nbytes(router), stock.softmax_first_exactness(source))


def write(source: Source, folder: Path, progress: Progress) -> dict[str, Any]:
    """Tensors under the names of Mistral's own checkpoints: w1 is the gate, w3 up, w2 down."""

    def layer(index: int) -> dict[str, torch.Tensor]:
        experts, router_ED = source.experts(index), source.table(index).weight_ED
        found = {"block_sparse_moe.gate.weight": stock.softmax_first(router_ED, source, index)}
        for e in range(source.num_experts):
            name = f"block_sparse_moe.experts.{e}"
            found[f"{name}.w1.weight"] = experts.gate_ESD[e]
            found[f"{name}.w3.weight"] = experts.up_ESD[e]
            found[f"{name}.w2.weight"] = experts.down_EDS[e].float() * source.top_k
        return found

    # Mistral's layers slide all or none; Qwen2's differ, but its biases are refused.
    window = source.reader.config.sliding_window if stock.has_window(source.reader.config) else None
    config = {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "intermediate_size": source.neurons,
        "num_local_experts": source.num_experts,
        "num_experts_per_tok": source.top_k,
        "sliding_window": window,
    }
    stock.write(source, folder, config, layer, progress)
    return {"layers": len(source.layers)}


FORMAT = Format(
    name="mixtral",
    routes=True,
    refusal=lambda source: stock.refusal(source, "mixtral", CAN),
    cost=cost,
    write=write,
    load=load_stock,
    tolerance=stock.SOFTMAX_TOLERANCE,
    margin=stock.SOFTMAX_MARGIN,
)
